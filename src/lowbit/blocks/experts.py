"""Fused expert parameters to one nn.Linear per matrix, named as on disk.

transformers 5 keeps the experts of a layer as two 3-D parameters, gate_up_proj (experts, 2 * inner,
hidden) and down_proj (experts, hidden, inner), but writes one tensor per expert and matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertNames:
    """What the matrices of one expert are called on disk; Mixtral: w1, w3, w2."""

    gate: str
    up: str
    down: str


class Expert(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int, names: ExpertNames, activation: nn.Module) -> None:
        super().__init__()
        self.names = names
        self.activation = activation
        setattr(self, names.gate, nn.Linear(hidden, inner, bias=False))
        setattr(self, names.up, nn.Linear(hidden, inner, bias=False))
        setattr(self, names.down, nn.Linear(inner, hidden, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in vars(self.names).values())
        return down(self.activation(gate(x)) * up(x))


class UnfusedExperts(nn.ModuleList):
    """Takes the place of a fused experts module; same arguments, same result.

    hidden: (tokens, hidden)  top_k_index: (tokens, k) int64  top_k_weights: (tokens, k)
    -> (tokens, hidden)
    """

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for number in top_k_index.unique().tolist():
            if number >= len(self):  # transformers' mark for a token that is not routed
                continue
            token, place = torch.where(top_k_index == number)
            out = self[number](hidden[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total


def is_fused(module: nn.Module) -> bool:
    """Whether this is transformers' standard experts module, whose matrices we can tell apart."""
    fused = all(
        isinstance(parameter := getattr(module, name, None), nn.Parameter) and parameter.dim() == 3
        for name in ("gate_up_proj", "down_proj")
    )
    plain = (
        getattr(module, "is_concatenated", False)
        and getattr(module, "has_gate", False)
        and not getattr(module, "is_transposed", True)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "has_post_expert_norm", False)
    )
    return fused and plain


def unfuse(fused: nn.Module, names: ExpertNames) -> UnfusedExperts:
    """One `Expert` per expert. Parameters of a meta module stay on meta, others are copied."""
    gate_up, down = fused.gate_up_proj, fused.down_proj
    activation = fused.act_fn
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    assert isinstance(activation, nn.Module)
    count, hidden, inner = down.shape
    experts = UnfusedExperts()
    for number in range(count):
        with torch.device("meta"):
            expert = Expert(hidden, inner, names, activation)
        matrices = (gate_up[number, :inner], gate_up[number, inner:], down[number])
        for name, matrix in zip(vars(names).values(), matrices, strict=True):
            weight = nn.Parameter(matrix.detach().clone(), requires_grad=False)
            getattr(expert, name).weight = weight
        experts.append(expert)
    return experts
