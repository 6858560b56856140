"""What backends derive from a layer's tensors: kept while these stay the same, and no longer."""

import gc
import pickle
import weakref
from copy import copy, deepcopy

import pytest
import torch
from torch import Tensor, nn

from lowbit.formats import repack
from lowbit.formats.backend import Backend
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.entry import LayerEntry

IN = 4


class Doubling(Backend["Doubled"]):
    """Multiplies by `twice`, which it derives from the layer's tensor."""

    name = "reference"

    def repack(self, layer: "Doubled") -> dict[str, Tensor]:
        layer.work.append(1)
        return {"twice": 2 * layer.first}

    def multiply(self, layer: "Doubled", packed: dict[str, Tensor], prepared: Tensor) -> Tensor:
        return prepared * packed["twice"]


class Doubled(QuantizedLinear):
    format = "doubled"
    backends = (Doubling(),)
    first: Tensor

    def __init__(self) -> None:
        super().__init__(LayerEntry(format="doubled", shape=[IN, IN], bias=None))
        self.work: list[int] = []
        self.add_frozen("first", (IN,), "float32")
        self.first.fill_(3)

    def dequantize(self) -> Tensor:
        return 2 * self.first.diag()


def value(layer: Doubled) -> float:
    """What its weight is by a forward."""
    (found,) = layer(torch.ones(1, IN)).detach().unique()
    return float(found)


def test_the_work_is_done_once_and_not_saved() -> None:
    layer = Doubled()
    for _ in range(3):
        assert value(layer) == 6
    assert len(layer.work) == 1 and list(layer.state_dict()) == ["first"]


def test_ahead_of_time() -> None:
    layer = Doubled()
    with torch.device("meta"):
        away = Doubled()
    repack(nn.ModuleList([layer, nn.Linear(1, 1), away]))
    assert len(layer.work) == 1 and not away.work
    assert value(layer) == 6 and len(layer.work) == 1


def test_tensors_that_change_are_used_at_once() -> None:
    layer = Doubled()
    assert value(layer) == 6
    layer.first.mul_(2)
    assert value(layer) == 12
    layer.first = nn.Parameter(torch.full((IN,), 5.0), requires_grad=False)
    assert value(layer) == 10
    layer.load_state_dict({"first": torch.full((IN,), 7.0)})
    assert value(layer) == 14
    layer.load_state_dict({"first": torch.full((IN,), 8.0)}, assign=True)
    assert value(layer) == 16
    layer.first.data = torch.full((IN,), 9.0)
    assert value(layer) == 18
    assert value(layer) == 18 and len(layer.work) == 6


def test_an_entry_that_changes_is_seen() -> None:
    layer = Doubled()
    value(layer)
    layer.spec = layer.spec.model_copy()
    value(layer)
    assert len(layer.work) == 2


def test_a_move_makes_it_anew() -> None:
    layer = Doubled()
    value(layer)
    layer.to("meta")
    assert layer(torch.ones(1, IN, device="meta")).is_meta and len(layer.work) == 2


def test_copies_begin_without_it() -> None:
    layer = Doubled()
    value(layer)
    for other in (copy(layer), deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        before = len(other.work)
        assert value(other) == 6 and len(other.work) == before + 1
    before = len(layer.work)
    assert value(layer) == 6 and len(layer.work) == before


def test_it_goes_with_the_tensor_it_was_made_of() -> None:
    layer = Doubled()
    made = layer._repacked.of(layer, layer.backends[0])["twice"]
    held = weakref.ref(made)
    del made
    assert held() is not None
    gc.disable()
    try:
        layer.first = None  # type: ignore[assignment]
        assert held() is None
    finally:
        gc.enable()


def test_trained_tensors_are_never_stale() -> None:
    layer = Doubled()
    layer.first.requires_grad_()
    layer(torch.ones(1, IN)).sum().backward()
    layer.first.data.mul_(2)  # changes no version
    assert value(layer) == 12


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad], ids=lambda m: m.__name__)
def test_modes_do_not_mix(first: type) -> None:
    layer = Doubled()
    with first():
        layer(torch.ones(1, IN))
    x = torch.ones(1, IN, requires_grad=True)
    layer(x).sum().backward()  # an inference tensor could not be saved for this
    assert x.grad is not None and float(x.grad[0, 0]) == 6 and len(layer.work) == 1


def test_tensors_without_a_version_are_not_trusted() -> None:
    with torch.inference_mode():
        layer = Doubled()
        assert value(layer) == 6
        layer.first.mul_(2)
        assert value(layer) == 12


def test_a_compiled_layer_uses_what_was_made_before() -> None:
    torch._dynamo.reset()
    layer = Doubled()
    repack(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(1, IN)), torch.full((1, IN), 6.0))
    assert len(layer.work) == 1
