"""Finds the folds of a block by experiment, for architectures without a table.

A block of each kind runs on a few random tokens. Its linears have no weights here: each of them is
a fixed sparse mixture of all its inputs, which takes no memory at any size. Then

- the weight of a norm is divided by random scales, and the inputs of all modules that read its
  output are multiplied by them. A norm may multiply by weight or by 1 + weight (Gemma);
- the output rows of a linear are multiplied by random scales. If every input of another linear is
  then multiplied by the scale of one row, these two are a fold: v_proj and o_proj, up_proj and
  down_proj, also where queries, keys and values, or gate and up projection, are one matrix.

A fold is used if the block's output stays the same within TOLERANCE. Scales have random signs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blocks import Fold
from lowbit.blocks.capture import call_block
from lowbit.blocks.experts import Expert, ProductLayout, UnfusedExperts
from lowbit.blocks.stream import Batch
from lowbit.kernels.products import is_linear
from lowbit.models.family import Heads

TOLERANCE = 1e-5  # relative, of the block's output
# What a block raises that cannot run so: it reads state that other blocks write, or other shapes.
ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError)


class Mixture:
    """Stands for the forward of a linear: y = mix(scale_in * x) * scale_out.

    Each output is one input, plus 0.6 times the sum of those inputs that fall on it, with random
    signs: so every input counts, and no matrix is needed.
    """

    def __init__(self, rows: int, columns: int, draw: torch.Generator) -> None:
        self.picked = torch.randint(columns, (rows,), generator=draw)
        self.target = torch.randint(rows, (columns,), generator=draw)
        self.signs = torch.randint(2, (columns,), generator=draw) * 2.0 - 1
        self.rows = rows
        self.reset()

    def reset(self) -> None:
        self.scale_in: Tensor | float = 1.0
        self.scale_out: Tensor | float = 1.0
        self.seen: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.seen = x
        x = x * self.scale_in
        mixed = x.new_zeros(*x.shape[:-1], self.rows)
        mixed = mixed.index_add(-1, self.target, x * self.signs.to(x.dtype))
        return (0.6 * mixed + x[..., self.picked]) * self.scale_out


class FoldSearch:
    """Experiments with one block.

    block: with weights, a copy that this changes.
    call: the arguments of a call of the block.
    routers: names of modules that choose experts; their weights have the channels as columns.
    heads: the attention heads of the model, for matrices that hold queries, keys and values; None:
        unknown.
    """

    def __init__(
        self, block: nn.Module, call: Batch, routers: Iterable[str], heads: Heads | None
    ) -> None:
        self.block, self.heads = block, heads
        self.draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(call.hidden.shape, generator=self.draw)
        self.call = replace(call, hidden=hidden)
        self.modules = dict(block.named_modules())
        self.experts = {n: m for n, m in self.modules.items() if isinstance(m, UnfusedExperts)}
        inside = tuple(f"{name}." for name in self.experts)
        self.mixtures: dict[str, Mixture] = {}
        for name, module in self.modules.items():
            if is_linear(module) and not name.startswith(inside):
                assert isinstance(module, nn.Linear)
                made = Mixture(module.out_features, module.in_features, self.draw)
                self.mixtures[name] = made
                module.forward = made  # type: ignore[method-assign, assignment]
        for name, module in self.experts.items():
            self.mixtures[name] = self._expert_mixture(module)
        self.routers = [n for n in routers if n not in self.mixtures]
        for name, module in self.modules.items():
            weight = getattr(module, "weight", None)
            if name not in self.mixtures and isinstance(weight, nn.Parameter) and weight.dim() == 1:
                weight.data = 0.5 + torch.rand(weight.shape, generator=self.draw)
        self.output = self._run()

    def folds(self) -> tuple[Fold, ...]:
        """Returns all folds of the block."""
        return (*self._norms(), *self._pairs(), *self._in_experts())

    def _expert_mixture(self, experts: UnfusedExperts) -> Mixture:
        """Returns a mixture in place of all experts of a layer, which depends on the routing."""
        layout = experts.layout
        rows = layout.inner if isinstance(layout, ProductLayout) else layout.hidden
        mixture = Mixture(rows, layout.hidden, self.draw)

        def forward(hidden: Tensor, *routing: Any) -> Tensor:
            out = mixture(hidden)
            if len(routing) == 2 and isinstance(routing[1], Tensor):
                index, weights = routing
                factor = ((1 + index) * weights).sum(-1).view(*hidden.shape[:-1], 1)
                out = out * (1 + factor)
            return out + hidden if experts.identity else out

        experts.forward = forward  # type: ignore[method-assign, assignment]
        return mixture

    def _run(self) -> Tensor:
        for mixture in self.mixtures.values():
            mixture.seen = None
        with torch.no_grad():
            copied = Batch(self.call.hidden.clone(), dict(self.call.kwargs))
            return call_block(self.block, copied).clone()

    def _unchanged(self) -> bool:
        with suppress(*ERRORS):
            found = self._run()
            return bool((found - self.output).norm() <= TOLERANCE * self.output.norm())
        return False

    def _scales(self, count: int) -> Tensor:
        """Random scales from 0.5 to 2 of both signs, no two of which are close."""
        signs = torch.randint(2, (count,), generator=self.draw) * 2.0 - 1
        return signs * torch.linspace(0.5, 2, count)[torch.randperm(count, generator=self.draw)]

    # Norms

    def _norms(self) -> Iterator[Fold]:
        for name, readers in self._readers_of_norms().items():
            norm = self.modules[name]
            size = int(norm.weight.numel())
            for offset in (0.0, 1.0):
                channels = torch.arange(self._width(readers[0])) % size
                with self._scaled_norm(norm, offset, readers, self._scales(size), channels):
                    if self._unchanged():
                        yield self._norm_fold(name, readers, size, offset, channels)
                        break

    def _readers_of_norms(self) -> dict[str, list[str]]:
        """Returns the modules that read the output of each norm itself, by the norm's name."""
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        handles = []
        for name, module in self.modules.items():
            weight = getattr(module, "weight", None)
            if name in self.mixtures or name in self.routers:
                handles.append(module.register_forward_pre_hook(_noting(inputs, name)))
            elif isinstance(weight, nn.Parameter) and weight.dim() == 1:
                handles.append(module.register_forward_hook(_noting_output(outputs, name)))
        self._run()
        for handle in handles:
            handle.remove()
        found = {}
        for norm, out in outputs.items():
            width = self.modules[norm].weight.numel()
            readers = [
                name
                for name, x in inputs.items()
                if x.data_ptr() == out.data_ptr() and x.numel() == out.numel()
            ]
            widths = {self._width(reader) for reader in readers}
            # A norm of the channels of one head is the same for all heads.
            same = len(widths) == 1 and widths.pop() % width == 0 and out.shape[-1] == width
            if same and any(reader in self.mixtures for reader in readers):
                found[norm] = readers
        return found

    def _width(self, reader: str) -> int:
        """The number of columns of a module that reads a norm."""
        if reader in self.mixtures:
            return len(self.mixtures[reader].target)
        weight: Any = self.modules[reader].weight
        return int(weight.shape[-1])

    def _scaled_norm(
        self, norm: nn.Module, offset: float, readers: list[str], scale: Tensor, channels: Tensor
    ) -> "_Changed":
        changes: list[tuple[Any, str, Any]] = []
        for part in ("weight", "bias"):
            tensor = getattr(norm, part, None)
            if isinstance(tensor, Tensor):
                shift = offset if part == "weight" else 0.0
                changes.append((tensor, "data", (tensor.data + shift) / scale - shift))
        for reader in readers:
            if reader in self.mixtures:
                changes.append((self.mixtures[reader], "scale_in", scale[channels]))
            else:
                weight: Any = self.modules[reader].weight
                changes.append((weight, "data", weight.data * scale[channels]))
        return _Changed(changes)

    def _norm_fold(
        self, name: str, readers: list[str], size: int, offset: float, channels: Tensor
    ) -> Fold:
        linears: list[str] = []
        for reader in readers:
            if reader in self.experts:
                for path, expert in self.experts[reader].named_children():
                    linears += [f"{reader}.{path}.{n}" for n in expert.groups()[0]]  # type: ignore
            else:
                linears.append(reader)
        ends = [self.modules[end] for end in (name, *linears)]
        biased = all(isinstance(getattr(end, "bias", None), Tensor) for end in ends)
        return Fold(
            kind="norm",
            source=name,
            readers=tuple(linears),
            size=size,
            reader_channels=None if len(channels) == size else channels,
            shiftable=biased and isinstance(self.modules[name], nn.LayerNorm),
            offset=offset,
        )

    # Pairs of linears

    def _pairs(self) -> Iterator[Fold]:
        for source, mixture in self.mixtures.items():
            if source in self.experts:
                continue
            for rows in self._row_sets(mixture.rows):
                fold = self._pair(source, rows)
                if fold is not None:
                    yield fold
                    break

    def _row_sets(self, count: int) -> Iterator[Tensor]:
        """Sets of rows of a matrix that may be a source: all, the last ones, or those of values."""
        every = torch.arange(count)
        yield every
        if count % 2 == 0:
            yield every[count // 2 :]
            yield every[: count // 2]
            yield every[1::2]
        if self.heads is not None:
            keys, width = self.heads.keys, self.heads.width
            each = self.heads.queries // keys + 2
            if count == keys * each * width:
                yield every[-keys * width :]
                yield every.view(keys, each, width)[:, -1].flatten()
        if count % 3 == 0:
            yield every[-count // 3 :]

    def _pair(self, source: str, rows: Tensor) -> Fold | None:
        self._run()
        before = {n: m.seen for n, m in self.mixtures.items() if m.seen is not None}
        mixture = self.mixtures[source]
        scale = self._scales(len(rows))
        every = torch.ones(mixture.rows).index_copy(0, rows, scale)
        with _Changed([(mixture, "scale_out", every)]):
            self._run()
            after = {n: m.seen for n, m in self.mixtures.items() if m.seen is not None}
        for reader, x in before.items():
            if reader == source or reader in self.experts:
                continue
            channels = _channels(x, after[reader], scale)
            if channels is None:
                continue
            inverse = [
                (mixture, "scale_out", 1 / every),
                (self.mixtures[reader], "scale_in", scale[channels]),
            ]
            with _Changed(inverse):
                if not self._unchanged():
                    continue
            return self._pair_fold(source, reader, rows, channels)
        return None

    def _pair_fold(self, source: str, reader: str, rows: Tensor, channels: Tensor) -> Fold:
        whole = len(rows) == self.mixtures[source].rows
        identity = torch.equal(channels, torch.arange(len(rows)))
        return Fold(
            kind="values" if self._mixes_tokens(source, reader) else "gated",
            source=source,
            readers=(reader,),
            size=len(rows),
            source_rows=None if whole else rows,
            reader_channels=None if identity else channels,
            permutable=False,
        )

    def _mixes_tokens(self, source: str, reader: str) -> bool:
        """Whether the reader's input at the last token depends on the source at earlier tokens."""
        x = self.mixtures[source].seen
        self._run()
        before = self.mixtures[reader].seen
        assert x is not None and before is not None
        factor = torch.ones(x.shape[-2], 1)
        factor[0] = 2.0
        with _Changed([(self.mixtures[source], "scale_out", factor)]):
            self._run()
            after = self.mixtures[reader].seen
        assert after is not None
        return not torch.allclose(before[..., -1, :], after[..., -1, :], rtol=1e-4)

    # Experts

    def _in_experts(self) -> Iterator[Fold]:
        """The folds of experts that compute down(act(gate(x)) * up(x)), see `blocks.experts`."""
        for name, module in self.modules.items():
            if isinstance(module, Expert) and module.is_product:
                up, down = f"{name}.{module.names.up}", f"{name}.{module.names.down}"
                size = getattr(module, module.names.up).out_features
                yield Fold(kind="gated", source=up, readers=(down,), size=size)


class _Changed:
    """Context manager that sets attributes, and restores them at the end."""

    def __init__(self, changes: list[tuple[Any, str, Any]]) -> None:
        self.changes = changes

    def __enter__(self) -> None:
        self.before = [(thing, name, getattr(thing, name)) for thing, name, _ in self.changes]
        for thing, name, value in self.changes:
            setattr(thing, name, value)

    def __exit__(self, *error: object) -> None:
        for thing, name, value in self.before:
            setattr(thing, name, value)


def _noting(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            inputs[name] = args[0]

    return note


def _noting_output(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor):
            outputs[name] = out

    return note


def _channels(before: Tensor, after: Tensor, scale: Tensor) -> Tensor | None:
    """Returns the index of the scale by which each column was multiplied.

    None if some column was not multiplied by one of them, or some scale multiplies no column.
    """
    if before.shape != after.shape or before.shape[-1] < len(scale):
        return None
    old, new = before.flatten(0, -2), after.flatten(0, -2)
    ratio = (old * new).sum(0) / old.square().sum(0)
    ordered, order = scale.sort()
    place = torch.searchsorted(ordered, ratio.contiguous()).clamp(max=len(scale) - 1)
    lower = (place - 1).clamp(min=0)
    closer = (ratio - ordered[lower]).abs() < (ratio - ordered[place]).abs()
    found = order[torch.where(closer, lower, place)]
    error = (new - old * scale[found]).norm(dim=0)
    if not bool((error <= 1e-4 * new.norm(dim=0)).all()) or not ratio.isfinite().all():
        return None
    return found if len(found.unique()) == len(scale) else None


def search_folds(
    block: nn.Module, call: Batch, routers: Iterable[str], heads: Heads | None
) -> tuple[Fold, ...]:
    """Returns the folds of a block; () if it cannot run on random inputs.

    The arguments are those of `FoldSearch`.
    """
    with suppress(*ERRORS):
        return FoldSearch(block, call, routers, heads).folds()
    return ()
