"""Put a result into a block: the next input of a stream must come through it."""

import torch
from torch import nn

from lowbit.blocks import BlockResult
from lowbit.blocks.attention import round_attention


def replace_module(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where parent.NAME was; `name` may have dots."""
    path, _, attribute = name.rpartition(".")
    setattr(parent.get_submodule(path), attribute, module)


def install(block: nn.Module, result: BlockResult) -> None:
    """Replaces the quantized linears, writes everything else that changed and marks attentions."""
    for name, linear in result.linears.items():
        old = block.get_submodule(name)
        replace_module(block, name, linear.to(next(old.parameters()).device))
    with torch.no_grad():
        for name, tensor in result.tensors.items():
            block.get_parameter(name).copy_(tensor)
    for name, rounding in result.attention.items():
        round_attention(block.get_submodule(name), rounding)
