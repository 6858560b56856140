"""Round to nearest (RTN): the grid of every group spans its whole range; no calibration."""

from typing import ClassVar

from pydantic import Field
from torch import nn

from lowbit.blocks import BlockTask
from lowbit.methods.activations import ActivationMethod
from lowbit.methods.grid import FINE_ZEROS, FineZeros
from lowbit.methods.packing import pack
from lowbit.methods.result import BlockResult, signal_to_noise
from lowbit.run_report import BlockReport, LinearReport
from lowbit.solvers.rounding import minmax_grid


class RTN(ActivationMethod):
    """Rounds every weight to the nearest code; reads no calibration text.

    The baseline of all other methods: each group's grid covers its whole range.
    """

    name: ClassVar[str] = "rtn"

    # As the baseline is known, and as every engine can run it.
    fine_zeros: FineZeros = Field(False, description=FINE_ZEROS)

    def quantize(self, task: BlockTask) -> BlockResult:
        result, reports = BlockResult(), dict[str, LinearReport]()
        readings = self.readings(task)
        for name, reading in readings.linears.items():
            linear = readings.task.block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            here = self.at(f"{task.name}.{name}")
            weight = reading.rotate_weight(linear.weight.detach())
            grid = minmax_grid(weight, *here.grid_shape)
            packed = readings.read_by(name, pack(weight, linear.bias, grid))
            result.linears[name] = packed
            error = signal_to_noise(linear.weight, packed)
            reports[name] = LinearReport(signal_to_noise_db=error)
        result.report = BlockReport(linears=reports, fallback=readings.fallback)
        return readings.complete(result)
