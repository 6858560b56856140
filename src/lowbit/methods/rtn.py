"""Round to nearest: the whole range of every group, no calibration. The baseline of everything."""

from typing import ClassVar

from torch import nn

from lowbit.blocks import BlockResult, BlockTask
from lowbit.methods.grid import GridMethod
from lowbit.methods.method import signal_to_noise
from lowbit.methods.packing import pack
from lowbit.solvers.rounding import minmax_grid


class RTN(GridMethod):
    """Rounds every weight to the nearest code; reads no calibration text.

    The baseline of all other methods: each group's grid covers its whole range.
    """

    name: ClassVar[str] = "rtn"

    def quantize(self, task: BlockTask) -> BlockResult:
        result = BlockResult({}, report={"linears": {}})
        for group in task.groups:
            for name in group.linears:
                linear = task.block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                here = self.at(f"{task.name}.{name}")
                grid = minmax_grid(linear.weight, *here.grid_shape)
                packed = pack(linear.weight, linear.bias, grid)
                result.linears[name] = packed
                error = signal_to_noise(linear.weight, packed)
                result.report["linears"][name] = {"signal_to_noise_db": round(error, 2)}
        return result
