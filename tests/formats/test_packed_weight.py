"""Code of a model that looks at the weight of a packed linear gets an answer."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lowbit.formats.dense import DenseLinear
from lowbit.formats.packed_weight import PackedWeight

OUT, IN = 6, 8
WEIGHT = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
X = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def layer() -> DenseLinear:
    return DenseLinear.from_weight(WEIGHT, None)


READS: dict[str, Callable[[PackedWeight], Tensor]] = {
    "linear": lambda w: nn.functional.linear(X, w),
    "product": lambda w: X @ w.T,
    "product from the left": lambda w: torch.matmul(w, X.T),
    "row": lambda w: w[2],
    "list": lambda w: torch.cat([w, w]),
    "method": lambda w: w.float().sum(0),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_torch_computes_with_it(read: Callable, layer: DenseLinear) -> None:
    assert torch.equal(read(layer.weight), read(WEIGHT))


def test_shape_device_and_dtype_cost_nothing(
    layer: DenseLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(DenseLinear, "dequantize")
    weight = layer.weight
    assert (weight.shape, weight.device) == ((OUT, IN), torch.device("cpu"))
    assert weight.dtype is torch.float32
    assert not hasattr(weight, "SCB") and not weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_that_of_a_float_linear_in_its_place(
    dtype: torch.dtype, layer: DenseLinear
) -> None:
    model = nn.Sequential(layer, nn.Linear(OUT, OUT))
    for other in (model.to(dtype), deepcopy(model), nn.Sequential(model)):
        packed = next(m for m in other.modules() if isinstance(m, DenseLinear))
        assert packed.weight.dtype is dtype
    assert layer.values.dtype is torch.float32  # what is stored keeps its dtype
    assert model.float()[0].weight.dtype is torch.float32


CHANGES: dict[str, Callable[[PackedWeight], object]] = {
    "method": lambda w: w.div_(2),
    "initialiser": lambda w: torch.nn.init.zeros_(w),
    "function": lambda w: torch.relu_(w),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_cannot_be_changed(change: Callable, layer: DenseLinear) -> None:
    with pytest.raises(TypeError, match="packed and cannot be changed: leave this linear in float"):
        change(layer.weight)
    assert torch.equal(layer.dequantize(), WEIGHT)
