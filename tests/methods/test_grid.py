"""The fields of a uniform grid."""

import pytest
import zoo
from pydantic import ValidationError

from lowbit.methods import GPTQ, RTN, OmniQuant
from lowbit.methods.grid import GridMethod

METHODS = (RTN, GPTQ, OmniQuant)


@pytest.mark.parametrize("method", METHODS)
def test_symmetric_grids_have_no_zeros_to_be_fine(method: type[GridMethod]) -> None:
    with pytest.raises(ValidationError, match="fine_zeros needs .* symmetric groups have none"):
        method(symmetric=True, fine_zeros=True)


@pytest.mark.parametrize("method", METHODS)
def test_zero_points_take_8_bits(method: type[GridMethod]) -> None:
    task = zoo.task("llama")
    overrides = {"down_proj": {"fine_zeros": False}}
    made = method(bits=3, group_size=16, fine_zeros=True, overrides=overrides).quantize(task)
    shifts = {name: layer.spec.zero_shift for name, layer in made.linears.items()}  # type: ignore[union-attr]
    assert shifts.pop("mlp.down_proj") == 0 and set(shifts.values()) == {5}
