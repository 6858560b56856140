"""Round to nearest: the whole range of every group, no calibration. The baseline of everything."""

from typing import ClassVar

from pydantic import Field
from torch import nn

from lowbit.blocks import BlockResult, BlockTask
from lowbit.methods.method import Method, signal_to_noise
from lowbit.methods.packing import pack
from lowbit.solvers.rounding import minmax_grid


class RTN(Method):
    """bits: 2 to 8. group_size: input channels per scale, None for one per output row.

    symmetric: no zero points.
    """

    name: ClassVar[str] = "rtn"
    per_linear: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric")

    bits: int = Field(4, ge=2, le=8)
    group_size: int | None = Field(None, ge=1)
    symmetric: bool = False

    def quantize(self, task: BlockTask) -> BlockResult:
        result = BlockResult({}, report={"linears": {}})
        for group in task.groups:
            for name in group.linears:
                linear = task.block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                here = self.at(f"{task.name}.{name}")
                grid = minmax_grid(linear.weight, here.bits, here.group_size, here.symmetric)
                packed = pack(linear.weight, linear.bias, grid)
                result.linears[name] = packed
                error = signal_to_noise(linear.weight, packed)
                result.report["linears"][name] = {"signal_to_noise_db": round(error, 2)}
        return result
