"""Which tokens of a batch an expert gets.

`Expert` notes it. Other experts are in an `nn.ModuleList`, in models with code of their own, and
are observed: the input of an expert consists of rows of what a module around the list gets. These
rows are looked up, bit by bit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blocks.experts import Expert

Tokens = Callable[[str], Tensor | None]


@contextmanager
def routed(block: nn.Module, linears: Iterable[str]) -> Iterator[Tokens]:
    """Observes one call of a block; yields a function that tells which tokens a linear has got.

    Given a linear's name, while that linear or a later module runs, the function returns their
    numbers in the batch, (tokens,) int64, or None if they are not known.
    """
    routing = _Routing(block, linears)
    try:
        yield routing.tokens
    finally:
        routing.close()


class _Routing:
    """Hooks on the experts of a block that are in an `nn.ModuleList`, and on what is around them.

    An expert is a number in the lists of one module: JetMoE's expert 3 is number 3 both in
    input_linear and in output_linear, and gets the same tokens in both.
    """

    def __init__(self, block: nn.Module, linears: Iterable[str]) -> None:
        self.block = block
        self.around: dict[str, Tensor] = {}  # what modules around lists got, by path
        self.found: dict[tuple[str, str], Tensor] = {}
        self.expert_of = {name: _expert(block, name) for name in linears}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        experts = sorted({expert for expert in self.expert_of.values() if expert is not None})
        paths = {path for holder, _ in experts for path in _with_parents(holder)}
        for path in sorted(paths):
            self._hook(path, partial(self._note, path))
        for expert in experts:
            for path in _modules_of(block, *expert):
                self._hook(path, partial(self._look_up, expert))

    def _note(self, path: str, rows: Tensor) -> None:
        self.around[path] = rows

    def _hook(self, path: str, on_input: Callable[[Tensor], None]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            first = next((t for t in tensors if t.is_floating_point() and t.dim() > 1), None)
            if first is not None:
                on_input(_rows(first))

        module = self.block.get_submodule(path)
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _look_up(self, expert: tuple[str, str], rows: Tensor) -> None:
        before = self.found.pop(expert, None)
        for path in reversed(list(_with_parents(expert[0]))):
            tokens = positions(rows, self.around[path]) if path in self.around else None
            if tokens is not None:
                self.found[expert] = tokens
                return
        if before is not None and len(before) == len(rows):  # a later layer of the same expert
            self.found[expert] = before

    def tokens(self, linear: str) -> Tensor | None:
        above = self.block.get_submodule(linear.rpartition(".")[0])
        if isinstance(above, Expert):
            return above.tokens
        expert = self.expert_of[linear]
        return None if expert is None else self.found.get(expert)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def positions(rows: Tensor, among: Tensor) -> Tensor | None:
    """Returns where each row is found, (rows,) int64; None if one is not found.

    Equal rows, such as the embeddings of a word, are found one after another in their order. The
    bits of a row are compared by a hash first.

    rows: (rows, n) float32.
    among: (others, m) float32.
    """
    if rows.shape[1] != among.shape[1] or not len(among):
        return None
    draw = torch.Generator().manual_seed(rows.shape[1])
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=draw).to(rows.device)
    wanted, known = ((t.view(torch.int32).long() * factors).sum(1) for t in (rows, among))
    known, order = known.sort(stable=True)
    first = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    at = (first + _repetition(wanted)).clamp(max=len(known) - 1)
    at = at.where(known[at] == wanted, first)
    found = order[at]
    return found if torch.equal(among[found], rows) else None


def _repetition(values: Tensor) -> Tensor:
    """Returns how often each value occurs before it. values: (n,) -> (n,) int64"""
    ordered, order = values.sort(stable=True)
    every = torch.arange(len(values), device=values.device)
    return torch.empty_like(order).index_copy_(
        0, order, every - torch.searchsorted(ordered, ordered)
    )


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float().contiguous()


def _expert(block: nn.Module, linear: str) -> tuple[str, str] | None:
    """Returns the module that holds the list of a linear's expert, and the number of the expert.

    None if the linear is in no list, or in an `Expert`.
    """
    parts = linear.split(".")
    if isinstance(block.get_submodule(".".join(parts[:-1])), Expert):
        return None
    for end in range(len(parts) - 1, 0, -1):
        inside = parts[end].isdigit()
        if inside and isinstance(block.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end - 1]), parts[end]
    return None


def _modules_of(block: nn.Module, holder: str, number: str) -> Iterator[str]:
    """Yields the paths of the modules of that number in the lists that a module holds."""
    for name, module in block.get_submodule(holder).named_children():
        if isinstance(module, nn.ModuleList) and int(number) < len(module):
            yield f"{holder}.{name}.{number}".lstrip(".")


def _with_parents(path: str) -> Iterator[str]:
    """Yields the path of the block, "", and every path down to this one."""
    parts = path.split(".") if path else []
    yield from (".".join(parts[:end]) for end in range(len(parts) + 1))
