"""Round to nearest (RTN): the grid of every group spans its whole range; no calibration."""

from typing import ClassVar

from pydantic import Field
from torch import nn

from lowbit.blocks import BlockTask
from lowbit.methods.grid import FINE_ZEROS, FineZeros, GridMethod
from lowbit.methods.packing import pack
from lowbit.methods.result import BlockResult, signal_to_noise
from lowbit.run_report import BlockReport, LinearReport
from lowbit.solvers.rounding import minmax_grid


class RTN(GridMethod):
    """Rounds every weight to the nearest code; reads no calibration text.

    The baseline of all other methods: each group's grid covers its whole range.
    """

    name: ClassVar[str] = "rtn"

    # As the baseline is known, and as every engine can run it.
    fine_zeros: FineZeros = Field(False, description=FINE_ZEROS)

    def quantize(self, task: BlockTask) -> BlockResult:
        result, reports = BlockResult(), dict[str, LinearReport]()
        for group in task.groups:
            for name in group.linears:
                linear = task.block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                here = self.at(f"{task.name}.{name}")
                grid = minmax_grid(linear.weight, *here.grid_shape)
                packed = pack(linear.weight, linear.bias, grid)
                result.linears[name] = packed
                error = signal_to_noise(linear.weight, packed)
                reports[name] = LinearReport(signal_to_noise_db=error)
        result.report = BlockReport(linears=reports)
        return result
