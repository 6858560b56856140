"""Split the fused experts of a layer into one nn.Linear per matrix, named as in the checkpoint.

transformers 5 keeps the experts of a layer in two 3-D parameters, gate_up_proj (experts, 2 * inner,
hidden) and down_proj (experts, hidden, inner). `ExpertLayout` describes the variants: without a
gate, transposed, with biases, with gate and up projection interleaved row by row. DBRX keeps three
2-D parameters (`RowsLayout`), JetMoE one 3-D parameter for each of two products (`ProductLayout`).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
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
    height: in a 2-D stack, the rows of one expert; None: the first dimension counts the experts.
    """

    stack: str
    rows: slice
    transposed: bool
    height: int | None = None

    def of(self, stack: Any, expert: int) -> Tensor:
        """Returns the tensor of one expert. stack: the parameter, or what can be sliced like it"""
        if self.height is None:
            one: Tensor = stack[expert]
        else:
            one = stack[expert * self.height : (expert + 1) * self.height]
        if one.dim() == 1 or not self.transposed:
            return one[self.rows]
        return one[:, self.rows].T


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


@dataclass(frozen=True)
class RowsLayout(ExpertLayout):
    """The matrices of all experts one below the other, (inner, hidden) each; down is transposed."""

    def pieces(self, names: ExpertNames) -> dict[str, Piece]:
        every, gate = slice(None), names.gate
        return {
            f"{gate}.weight": Piece("mlp.w1", every, False, self.inner),
            f"{names.up}.weight": Piece("mlp.v1", every, False, self.inner),
            f"{names.down}.weight": Piece("mlp.w2", every, True, self.inner),
        }


@dataclass(frozen=True)
class ProductLayout(ExpertLayout):
    """One stack (experts, out, in) of linears, each for a part of the input."""

    def pieces(self, names: ExpertNames) -> dict[str, Piece]:
        return {"linear.weight": Piece("weight", slice(None), False)}


class Expert(nn.Module):
    """One expert: down(activation(gate(x), up(x))), or down(activation(up(x))) without a gate.

    tokens: (tokens,) int64, which tokens of the batch the last call had.
    """

    tokens: Tensor | None = None

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
            setattr(self, name, _linear(layout.hidden, layout.inner))
        setattr(self, names.down, _linear(layout.inner, layout.hidden))

    def forward(self, x: Tensor) -> Tensor:
        read = [getattr(self, name)(x) for name in self.names.readers]
        out: Tensor = getattr(self, self.names.down)(self.activation(*read))
        return out

    @property
    def is_product(self) -> bool:
        """Whether the input of `down` is act(gate(x)) * up(x)."""
        return isinstance(self.activation, _Gate)

    def groups(self) -> list[tuple[str, ...]]:
        """Returns the names of linears that read the same input."""
        return [self.names.readers, (self.names.down,)]


class ExpertLinear(nn.Module):
    """One linear of a `ProductLayout`."""

    def __init__(self, layout: ExpertLayout) -> None:
        super().__init__()
        self.linear = _linear(layout.hidden, layout.inner)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out

    def groups(self) -> list[tuple[str, ...]]:
        return [("linear",)]


class UnfusedExperts(nn.ModuleList):
    """Replaces a fused experts module; takes the same arguments and returns the same result.

    identity: whether an index beyond the last expert stands for the identity; False: for nothing,
        since transformers uses such an index for unrouted tokens.
    """

    identity = False
    layout: ExpertLayout
    names: ExpertNames

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum of each token's experts, in the shape of `hidden`.

        hidden: (..., hidden), of as many tokens as the others.
        top_k_index: (tokens, k) int64, the experts of each token.
        top_k_weights: (tokens, k), the weights of their outputs.
        """
        shape, hidden = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
        chosen, choices = top_k_index.reshape(-1), top_k_index.shape[-1]
        pairs = chosen.argsort(stable=True)  # of a token and a choice, by expert and then by token
        tokens, weights = pairs // choices, top_k_weights.reshape(-1)[pairs]
        found = torch.stack(chosen[pairs].unique_consecutive(return_counts=True))
        numbers, counts = found.tolist()  # on a GPU, the only wait for a value
        outs = [hidden[:0]]
        for number, token, weight in zip(
            numbers, tokens.split(counts), weights.split(counts), strict=True
        ):
            if number >= len(self) and not self.identity:
                outs.append(hidden.new_zeros(len(token), hidden.shape[-1]))
                continue
            if number >= len(self):
                out = hidden[token]
            else:
                self[number].tokens = token
                out = self[number](hidden[token])
            outs.append((out * weight[:, None]).to(hidden.dtype))
        return self._sum(torch.cat(outs), pairs, top_k_index).view(shape)

    @staticmethod
    def _sum(rows: Tensor, pairs: Tensor, top_k_index: Tensor) -> Tensor:
        """Returns the sum of each token's rows, added in order of its experts: (tokens, hidden).

        index_add_ would give the same bytes on the CPU, but CUDA adds its rows in any order.

        rows: (tokens * k, hidden), for each of `pairs`.
        pairs: (tokens * k,) int64, which pair of a token and one of its choices a row belongs to.
        """
        row_of = pairs.argsort().view(top_k_index.shape)
        in_order = row_of.gather(1, top_k_index.argsort(dim=1, stable=True))
        total = rows.new_zeros(len(top_k_index), rows.shape[-1])
        for row in rows[in_order.T.reshape(-1)].split(max(1, len(top_k_index))):
            total = total + row
        return total

    def zeros(self, hidden: Tensor, *routing: Any) -> Tensor:
        """Returns zeros in the shape of the result of `forward`, without any weights."""
        return torch.zeros_like(hidden)


class SortedExperts(UnfusedExperts):
    """Experts that each get an equal part of the input (Llama 4)."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """Returns (experts * tokens, hidden). hidden: (experts * tokens, hidden)"""
        parts = hidden.view(len(self), -1, hidden.shape[-1])
        for expert in self:
            expert.tokens = torch.arange(parts.shape[1], device=hidden.device)
        return torch.cat([expert(part) for expert, part in zip(self, parts, strict=True)])


class SplitExperts(UnfusedExperts):
    """Linears that each get a part of the rows of the input (JetMoE)."""

    def forward(self, inputs: Tensor, sizes: Any) -> Tensor:  # type: ignore[override]
        """Returns (rows, out). inputs: (rows, in); sizes: the number of rows of each linear"""
        parts = inputs.split(sizes, dim=0)
        return torch.cat([expert(part) for expert, part in zip(self, parts, strict=True)])

    def zeros(self, hidden: Tensor, *routing: Any) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.layout.inner)


def layout_of(module: nn.Module) -> ExpertLayout | None:
    """Returns how a module keeps its experts; None if it holds none, or in a way not known here."""
    return _stacks_layout(module) or _rows_layout(module) or _product_layout(module)


def _rows_layout(module: nn.Module) -> ExpertLayout | None:
    mlp = getattr(module, "mlp", None)
    stacks = [getattr(mlp, name, None) for name in ("w1", "v1", "w2")]
    count = getattr(module, "num_experts", None)
    if count is None or not all(isinstance(stack, nn.Parameter) for stack in stacks):
        return None
    shapes = {tuple(stack.shape) for stack in stacks if stack is not None}
    rows, hidden = shapes.pop()
    if shapes or rows % count:
        return None
    return RowsLayout("mlp.w1", count, hidden, rows // count, True, False, False, False)


def _product_layout(module: nn.Module) -> ExpertLayout | None:
    sizes = [getattr(module, n, None) for n in ("num_experts", "output_size", "input_size")]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or list(weight.shape) != sizes:
        return None
    count, out, columns = weight.shape
    return ProductLayout("weight", count, columns, out, False, False, False, False)


def _stacks_layout(module: nn.Module) -> ExpertLayout | None:
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
        # Without a gate the shapes of both orders agree, and all such classes store (out, in).
        transposed = gated and down.shape[1] * 2 == reader.shape[2]
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
    product = isinstance(layout, ProductLayout)
    experts = SplitExperts() if product else _kind(fused)()
    experts.identity = hasattr(fused, "identity_expert")
    experts.layout, experts.names = layout, names
    pieces = layout.pieces(names)
    one = (
        partial(ExpertLinear, layout)
        if product
        else partial(Expert, layout, names, _activation(fused, layout))
    )
    for number in range(layout.count):
        expert = one()
        for name, piece in pieces.items():
            tensor = piece.of(attrgetter(piece.stack)(fused), number).detach()
            linear, _, attribute = name.partition(".")
            parameter = nn.Parameter(tensor.clone(), requires_grad=False)
            setattr(getattr(expert, linear), attribute, parameter)
        experts.append(expert)
    return experts


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Returns an nn.Linear whose parameters are set later.

    Making them took a quarter of the time of a plan with 45,000 linears of experts.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = inputs, outputs
    for name in ("weight", "bias"):
        linear.register_parameter(name, None)
    return linear


def _kind(fused: nn.Module) -> type[UnfusedExperts]:
    return (
        SortedExperts if len(inspect.signature(fused.forward).parameters) == 1 else UnfusedExperts
    )


def _activation(fused: nn.Module, layout: ExpertLayout) -> Callable[..., Tensor]:
    """Returns the function between the matrices that read the input and the down projection."""
    own = getattr(type(fused), "_apply_gate", None)
    if layout.gated and own is not None and own.__name__ == "_apply_gate":
        return _OwnGate(fused, layout.interleaved)
    path = "mlp.activation_fn" if isinstance(layout, RowsLayout) else "act_fn"
    act: Callable[[Tensor], Tensor] = attrgetter(path)(fused)
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
