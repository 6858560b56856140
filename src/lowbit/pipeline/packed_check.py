"""Runs the first packed block of each kind once, before the blocks after it are quantized.

Code of a model that looks into its linears may fail or compute something else once they are packed.
The packed block is compared with the same block whose linears multiply by dequantized weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbit.blocks.capture import call_block
from lowbit.blocks.install import replace_module
from lowbit.formats.base import QuantizedLinear
from lowbit.methods.result import BlockResult
from lowbit.models.source import SourceModel

TOKENS = 8
TOLERANCE = 1e-3  # relative; the order of float32 additions gives about 1e-6


class Dequantized(nn.Module):
    """A linear that multiplies by the dequantized weight of a quantized layer.

    rounds: attribute, whether the layer rounds its input, as this linear does too.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple, so that it is not a submodule
        self.rounds = False

    @property
    def weight(self) -> Tensor:
        return self.layer[0].dequantize()

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        rounded = layer.quantized_input(x)
        self.rounds |= rounded is not x
        return nn.functional.linear(rounded, self.weight, bias)


@torch.no_grad()
def check_packed(
    source: SourceModel, block: nn.Module, name: str, result: BlockResult
) -> float | None:
    """Compares a packed block with its dequantized weights; returns the relative error.

    None: the layers round their inputs, so that an error of 1e-6 may become one of a whole step.

    Raises ValueError if the packed block fails or differs.
    """
    device = next(block.parameters()).device
    tokens = torch.arange(TOKENS)[None] % source.vocabulary
    first = source.first_stream([tokens], device)
    stream = source.moved(first, source.block_names.index(name), device, block)
    try:
        with swapped(block, result.linears, result.tensors):
            found = call_block(block, stream[0])
    except Exception as error:  # of the model's own code, which looks into packed layers
        raise ValueError(
            f"{name} cannot run with packed linears ({type(error).__name__}: {error}): leave the "
            "linears that its code looks into in float with --skip, and report this architecture"
        ) from error
    dequantized = {path: Dequantized(layer) for path, layer in result.linears.items()}
    with swapped(block, dequantized, result.tensors):
        wanted = call_block(block, stream[0])
    if any(linear.rounds for linear in dequantized.values()):
        return None
    difference = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{name} computes other values with packed linears than with the same weights "
            f"dequantized (relative error {difference:.1e}, allowed is {TOLERANCE:.0e}): please "
            "report this architecture"
        )
    return difference


@contextmanager
def swapped(
    block: nn.Module, linears: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """Context manager that puts modules and parameters into a block, without a copy of it."""
    old = {path: block.get_submodule(path) for path in linears}
    parameters = {path: block.get_parameter(path) for path in tensors}
    data = {path: parameter.data for path, parameter in parameters.items()}
    try:
        for path, module in linears.items():
            replace_module(block, path, module.to(next(old[path].parameters()).device))
        for path, parameter in parameters.items():
            parameter.data = tensors[path].to(parameter.device, parameter.dtype)
        yield
    finally:
        for path, module in old.items():
            replace_module(block, path, module)
        for path, parameter in parameters.items():
            parameter.data = data[path]
