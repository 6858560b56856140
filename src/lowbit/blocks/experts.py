"""Split the fused experts of a layer into one nn.Linear per matrix, named as in the checkpoint.

transformers 5 keeps the experts of a layer in two 3-D parameters, gate_up_proj (experts, 2 * inner,
hidden) and down_proj (experts, hidden, inner). A checkpoint has one tensor per expert and matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertNames:
    """The names of an expert's matrices in the checkpoint; Mixtral: w1, w3 and w2."""

    gate: str
    up: str
    down: str


class Expert(nn.Module):
    """One expert, a gated feed-forward network: down(act(gate(x)) * up(x))."""

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
    """Replaces a fused experts module; takes the same arguments and returns the same result."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum of each token's experts: (tokens, hidden).

        hidden: (tokens, hidden).
        top_k_index: (tokens, k) int64, the experts of each token.
        top_k_weights: (tokens, k), the weights of their outputs.
        """
        total = torch.zeros_like(hidden)
        for number in top_k_index.unique().tolist():
            if number >= len(self):  # transformers uses such an index for unrouted tokens
                continue
            token, choice = torch.where(top_k_index == number)
            out = self[number](hidden[token]) * top_k_weights[token, choice, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total


def is_fused(module: nn.Module) -> bool:
    """Whether a module has transformers' standard layout of fused experts, which we can split."""
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
    """Returns the experts one by one. Parameters are copied; those on meta stay there."""
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
