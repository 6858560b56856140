"""Split the fused experts of a layer into one nn.Linear per matrix, named as in the checkpoint.

transformers 5 keeps the experts of a layer in two 3-D parameters, gate_up_proj (experts, 2 * inner,
hidden) and down_proj (experts, hidden, inner). `ExpertLayout` describes the variants: without a
gate, transposed, with biases, with gate and up projection interleaved row by row.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertNames:
    """The names of an expert's matrices in the checkpoint; Mixtral: w1, w3 and w2.

    gate: None for experts without a gate, which compute down(act(up(x))).
    """

    gate: str | None
    up: str
    down: str

    @property
    def readers(self) -> tuple[str, ...]:
        """The matrices that read the input of the expert."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class Piece:
    """Where a stack of experts keeps one tensor of an expert.

    stack: the name of the stacked parameter.
    rows: the part of its output channels.
    transposed: whether the stack keeps it as (in, out).
    """

    stack: str
    rows: slice
    transposed: bool

    def of(self, stack: Any, expert: int) -> Tensor:
        """Returns the tensor of one expert. stack: the parameter, or what can be sliced like it"""
        one: Tensor = stack[expert]
        return one[..., self.rows].T if self.transposed or one.dim() == 1 else one[self.rows]


@dataclass(frozen=True)
class ExpertLayout:
    """How a module keeps its experts.

    first: the name of the parameter with the matrices that read the input.
    count, hidden, inner: the number of experts, and the channels of an expert.
    gated: whether `first` holds gate and up projections; False: up projections alone.
    transposed: whether matrices are (in, out).
    interleaved: whether gate and up projection alternate row by row; False: gate comes first.
    biased: whether each stack has a stack of biases NAME_bias.
    """

    first: str
    count: int
    hidden: int
    inner: int
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool

    def pieces(self, names: ExpertNames) -> dict[str, Piece]:
        """Returns where each tensor of an expert is, by its name in `Expert`."""
        rows = {names.up: slice(None)}
        if names.gate is not None:
            gate, up = (
                (slice(0, None, 2), slice(1, None, 2))
                if self.interleaved
                else (slice(0, self.inner), slice(self.inner, None))
            )
            rows = {names.gate: gate, names.up: up}
        pieces: dict[str, Piece] = {}
        for name, part in (rows | {names.down: slice(None)}).items():
            stack = "down_proj" if name == names.down else self.first
            pieces[f"{name}.weight"] = Piece(stack, part, self.transposed)
            if self.biased:
                pieces[f"{name}.bias"] = Piece(f"{stack}_bias", part, False)
        return pieces


class Expert(nn.Module):
    """One expert: down(activation(gate(x), up(x))), or down(activation(up(x))) without a gate."""

    def __init__(
        self,
        layout: ExpertLayout,
        names: ExpertNames,
        activation: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        self.names = names
        self.activation = activation
        for name in names.readers:
            setattr(self, name, nn.Linear(layout.hidden, layout.inner, bias=layout.biased))
        setattr(self, names.down, nn.Linear(layout.inner, layout.hidden, bias=layout.biased))

    def forward(self, x: Tensor) -> Tensor:
        read = [getattr(self, name)(x) for name in self.names.readers]
        out: Tensor = getattr(self, self.names.down)(self.activation(*read))
        return out


class UnfusedExperts(nn.ModuleList):
    """Replaces a fused experts module; takes the same arguments and returns the same result.

    identity: whether an index beyond the last expert stands for the identity; False: for nothing,
        since transformers uses such an index for unrouted tokens.
    """

    identity = False
    layout: ExpertLayout
    names: ExpertNames

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum of each token's experts: (tokens, hidden).

        hidden: (tokens, hidden).
        top_k_index: (tokens, k) int64, the experts of each token.
        top_k_weights: (tokens, k), the weights of their outputs.
        """
        total = torch.zeros_like(hidden)
        for number in top_k_index.unique().tolist():
            if number >= len(self) and not self.identity:
                continue
            token, choice = torch.where(top_k_index == number)
            out = hidden[token] if number >= len(self) else self[number](hidden[token])
            out = out * top_k_weights[token, choice, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total


class SortedExperts(UnfusedExperts):
    """Experts that each get an equal part of the input (Llama 4)."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """Returns (experts * tokens, hidden). hidden: (experts * tokens, hidden)"""
        parts = hidden.view(len(self), -1, hidden.shape[-1])
        return torch.cat([expert(part) for expert, part in zip(self, parts, strict=True)])


def layout_of(module: nn.Module) -> ExpertLayout | None:
    """Returns how a module keeps its experts; None if it holds none, or in a way not known here."""
    first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    reader, down = getattr(module, first, None), getattr(module, "down_proj", None)
    if not isinstance(reader, nn.Parameter) or not isinstance(down, nn.Parameter):
        return None
    if not reader.dim() == down.dim() == 3:
        return None
    if getattr(module, "has_post_expert_norm", False):
        return None
    gated = first == "gate_up_proj"
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:  # a class that transformers' own interface does not describe
        transposed = down.shape[1] * (1 + gated) == reader.shape[2]
    inner, hidden = down.shape[1:] if transposed else down.shape[:0:-1]
    layout = ExpertLayout(
        first=first,
        count=down.shape[0],
        hidden=hidden,
        inner=inner,
        gated=gated,
        transposed=transposed,
        interleaved=gated and not getattr(module, "is_concatenated", True),
        biased=isinstance(getattr(module, "down_proj_bias", None), nn.Parameter),
    )
    rows = inner * (1 + gated)
    return layout if sorted(reader.shape[1:]) == sorted((rows, hidden)) else None


def unfuse(fused: nn.Module, names: ExpertNames) -> UnfusedExperts:
    """Returns the experts one by one. Parameters are copied; those on meta stay there."""
    layout = layout_of(fused)
    assert layout is not None
    if (names.gate is not None) != layout.gated:
        names = ExpertNames("gate_proj" if layout.gated else None, "up_proj", "down_proj")
    activation = _activation(fused, layout)
    experts = _kind(fused)()
    experts.identity = hasattr(fused, "identity_expert")
    experts.layout, experts.names = layout, names
    pieces = layout.pieces(names)
    for number in range(layout.count):
        with torch.device("meta"):
            expert = Expert(layout, names, activation)
        for name, piece in pieces.items():
            tensor = piece.of(getattr(fused, piece.stack), number).detach()
            linear, _, attribute = name.partition(".")
            parameter = nn.Parameter(tensor.clone(), requires_grad=False)
            setattr(getattr(expert, linear), attribute, parameter)
        experts.append(expert)
    return experts


def _kind(fused: nn.Module) -> type[UnfusedExperts]:
    return (
        SortedExperts if len(inspect.signature(fused.forward).parameters) == 1 else UnfusedExperts
    )


def _activation(fused: nn.Module, layout: ExpertLayout) -> Callable[..., Tensor]:
    """Returns the function between the matrices that read the input and the down projection."""
    own = getattr(type(fused), "_apply_gate", None)
    if layout.gated and own is not None and own.__name__ == "_apply_gate":
        return _OwnGate(fused, layout.interleaved)
    act: Callable[[Tensor], Tensor] = fused.act_fn  # type: ignore[assignment]
    return _Gate(act) if layout.gated else act


class _Gate:
    """act(gate) * up"""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self.act = act

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up


class _OwnGate:
    """The function of gate and up projection that a class of experts defines for itself."""

    def __init__(self, fused: nn.Module, interleaved: bool) -> None:
        self.module = nn.Module.__new__(type(fused))
        self.module.__dict__ = {**vars(fused), "_parameters": {}}  # its settings without weights
        self.interleaved = interleaved

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        rows = (gate, up)
        both = torch.stack(rows, -1).flatten(-2) if self.interleaved else torch.cat(rows, -1)
        out: Tensor = self.module._apply_gate(both)  # type: ignore[operator]
        return out
