"""Turn a float block into its quantized version, in place."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blocks.attention import round_attention


def replace_module(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the submodule `name` of `parent`; `name` may have dots."""
    path, _, attribute = name.rpartition(".")
    setattr(parent.get_submodule(path), attribute, module)


def install(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    attention: Mapping[str, dict[str, Any]],
) -> None:
    """Replaces linears and parameters of a block, in place.

    linears: the new modules, by the name of the linear that each replaces. They are moved to the
        device of that linear, and told its dtype.
    tensors: new values of other parameters, by name.
    attention: how attention modules round their queries, keys and values, by the module's name; see
        `round_attention`.
    """
    for name, linear in linears.items():
        old = block.get_submodule(name)
        weight: Any = old.weight
        replace_module(block, name, linear.to(weight.device, weight.dtype))
    with torch.no_grad():
        for name, tensor in tensors.items():
            block.get_parameter(name).copy_(tensor)
    for name, rounding in attention.items():
        round_attention(block.get_submodule(name), rounding)
