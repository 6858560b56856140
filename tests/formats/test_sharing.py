import gc
import pickle
import threading
import weakref
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lowbit.formats import link
from lowbit.formats.backend import Backend
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.dense import DenseLinear
from lowbit.formats.entry import LayerEntry

IN = 6


class Product(Backend["Scaled"]):
    name = "reference"

    def multiply(self, layer: "Scaled", packed: dict[str, Tensor], prepared: Tensor) -> Tensor:
        return prepared * layer.number


class Scaled(QuantizedLinear):
    """Multiplies its input by the owner's `first`, then by its own number; notes its inputs."""

    format = "scaled"
    backends = (Product(),)
    first: Tensor | None

    def __init__(self, number: int = 1, shares: str | None = None, width: int = IN) -> None:
        super().__init__(LayerEntry(format="scaled", shape=[width, width], bias=None))
        self.number = number
        self.name = shares
        self.work: list[tuple[int, ...]] = []
        if shares is None:
            self.add_frozen("first", (width,), "float32")
            self.first.copy_(torch.arange(1.0, width + 1))  # type: ignore[union-attr]

    @property
    def shares(self) -> str | None:
        return self.name

    def dequantize(self) -> Tensor:
        return self.number * self.owner.first.diag()  # type: ignore[operator, union-attr]

    def prepare(self, x: Tensor) -> Tensor:
        self.work.append(x.shape)
        return x * self.first  # type: ignore[operator]


def group() -> tuple[Scaled, Scaled, Scaled]:
    layers = {"q": Scaled(1), "k": Scaled(2, "q"), "v": Scaled(3, "q")}
    link(layers)
    return layers["q"], layers["k"], layers["v"]


def check(layer: Scaled, x: Tensor) -> None:
    assert torch.equal(layer(x), x * torch.arange(1.0, IN + 1) * layer.number)


def test_the_work_is_done_once_for_each_input() -> None:
    q, k, v = group()
    for round_number in range(1, 4):
        x = torch.randn(2, IN)
        for layer in (k, q, v, k):
            check(layer, x)
        assert len(q.work) == round_number and not k.work and not v.work
    check(q, x.clone())
    assert len(q.work) == 4


def test_the_owner_is_no_part_of_a_member() -> None:
    q, k, _ = group()
    assert k.owner is q and q.owner is q
    assert list(k.modules()) == [k] and not list(k.parameters()) and not k.state_dict()
    assert torch.equal(k.dequantize(), 2 * q.dequantize())


def test_an_input_that_was_written_to_is_new() -> None:
    q, k, _ = group()
    x = torch.randn(2, IN)
    check(q, x)
    x.add_(1)
    check(k, x)
    x[0] = 7
    check(k, x)
    with torch.inference_mode():
        inside = torch.randn(2, IN)  # has no version: never taken for unchanged
        check(q, inside)
        inside.add_(1)
        check(k, inside)


def test_an_owner_that_was_written_to_works_again() -> None:
    q, k, _ = group()
    x = torch.ones(1, IN)
    check(q, x)
    q.first.mul_(2)  # type: ignore[union-attr]
    assert torch.equal(k(x), 4 * torch.arange(1.0, IN + 1)[None])
    q.load_state_dict({"first": torch.zeros(IN)}, assign=True)
    assert not k(x).any()


def test_gradients_reach_every_member() -> None:
    q, k, v = group()
    x = torch.randn(2, IN, requires_grad=True)
    with torch.no_grad():
        check(q, x)  # this result has no gradient and must not be the others'
    for layer in (k, v, k):
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)  # each frees its own graph
        assert torch.equal(gradient, layer.number * torch.arange(1.0, IN + 1).expand(2, -1))
    plain = torch.randn(2, IN)
    with torch.no_grad():
        check(q, plain)
    q.first.requires_grad_()  # type: ignore[union-attr]
    k(plain).sum().backward()
    assert torch.allclose(q.first.grad, 2 * plain.sum(0))  # type: ignore[union-attr, arg-type]
    with torch.no_grad():  # while it is trained, no step may be missed
        before = k(plain)
        q.first.data = q.first.data * 2  # type: ignore[union-attr]
        assert torch.equal(k(plain), 2 * before)


def test_modes_do_not_mix() -> None:
    q, k, _ = group()
    x = torch.randn(2, IN)
    with torch.inference_mode():
        check(q, x)
    with torch.no_grad():
        assert not k.prepared(x).is_inference()
    weight = torch.randn(2, IN, requires_grad=True)
    (k(x) * weight).sum().backward()  # an inference tensor could not be saved for this
    assert torch.equal(weight.grad, k(x))  # type: ignore[arg-type]


def test_nothing_outlives_the_input() -> None:
    q, k, _ = group()
    x = torch.randn(2, IN)
    held = weakref.ref(q.prepared(x))
    assert k.prepared(x) is held()
    gc.disable()
    try:
        del x
        assert held() is None
    finally:
        gc.enable()
    check(k, torch.randn(2, IN))


def test_copies_and_pickles_have_their_own_owner() -> None:
    block = nn.ModuleList(group())
    x = torch.randn(2, IN)
    for layer in block:
        check(layer, x)
    for copied in (deepcopy(block), pickle.loads(pickle.dumps(block))):
        q, k, v = copied
        assert k.owner is q and v.owner is q and q is not block[0]
        count = len(q.work)
        check(k, x)
        assert len(q.work) == count + 1


def test_threads_do_not_get_each_others() -> None:
    layers = group()
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(100):
                x = torch.randn(2, IN, generator=generator)
                for layer in layers:
                    check(layer, x)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_linking_again_replaces() -> None:
    q, k, _ = group()
    other = Scaled(1)
    link({"q": other, "k": k})
    assert k.owner is other and k.owner is not q


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"k": Scaled(1, "q")}, "layer k: it shares with 'q', which does not exist"),
        ({"k": Scaled(1, "k")}, "layer k: it shares with k, which itself shares with k"),
        (
            {"a": Scaled(), "b": Scaled(1, "a"), "c": Scaled(1, "b")},
            "layer c: it shares with b, which itself shares with a",
        ),
        (
            {"q": Scaled(width=5), "k": Scaled(1, "q")},
            "6 inputs, but it shares with q, a scaled layer of 5 inputs",
        ),
        (
            {"q": DenseLinear.from_weight(torch.eye(IN), None), "k": Scaled(1, "q")},
            "layer k: it is a scaled layer of 6 inputs",
        ),
    ],
    ids=["absent", "itself", "chain", "width", "format"],
)
def test_links_that_cannot_be(layers: dict[str, QuantizedLinear], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        link(layers)


def test_a_member_that_was_not_linked_says_so() -> None:
    with pytest.raises(ValueError, match="uses tensors of q but was not linked to it"):
        Scaled(1, "q")(torch.ones(1, IN))
