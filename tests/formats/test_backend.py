"""Which backend runs: the first that supports the call, or the one that is forced."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import quantized
import torch
from torch import Tensor

import lowbit
from lowbit.eval.divergence import StreamedLogits
from lowbit.formats import base, build, use_backend
from lowbit.formats.backend import Backend, choose, forced
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.entry import LayerEntry
from lowbit.methods import PTQ161

CPU = torch.device("cpu")


class Filling(Backend["Filled"]):
    """Gives its number everywhere."""

    def __init__(self, name: str, number: float, most: int | None = None) -> None:
        self.name = name  # type: ignore[misc]
        self.number, self.most = number, most

    def supports(
        self,
        layer: "Filled",
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        gradients: bool,
    ) -> bool:
        return self.most is None or (
            tokens <= self.most and dtype == torch.float32 and device == CPU and not gradients
        )

    def multiply(self, layer: "Filled", packed: dict[str, Tensor], prepared: Tensor) -> Tensor:
        return prepared.new_full((len(prepared), layer.out_features), self.number)


class Filled(QuantizedLinear):
    format = "filled"
    backends = (Filling("lookup", 1, most=4), Filling("reference", 2))

    def __init__(self) -> None:
        super().__init__(LayerEntry(format="filled", shape=[3, 2], bias="float32"))

    def dequantize(self) -> Tensor:
        return torch.zeros(3, 2)


def run(tokens: int, dtype: torch.dtype = torch.float32) -> int:
    y = Filled()(torch.ones(tokens, 2, dtype=dtype))
    assert y.dtype == dtype
    return int(y[0, 0])


def test_the_first_that_supports_the_call() -> None:
    assert (run(1), run(4), run(5)) == (1, 1, 2)
    assert run(1, torch.float16) == 2
    layer = Filled()
    recorded = layer(torch.ones(1, 2, requires_grad=True))
    assert int(recorded[0, 0]) == 2
    with torch.no_grad():
        assert int(layer(torch.ones(1, 2, requires_grad=True))[0, 0]) == 1
    layer.bias.requires_grad_()  # type: ignore[union-attr]
    assert int(layer(torch.ones(1, 2))[0, 0]) == 2


def test_which_would_run() -> None:
    layer = Filled()
    assert [layer.backend_for(n).name for n in (1, 5)] == ["lookup", "reference"]
    assert layer.backend_for(1, gradients=True).name == "reference"
    assert layer.backend_for(1, dtype=torch.float16).name == "reference"
    assert layer.backend_for(1, device="cuda").name == "reference"
    assert layer.to("meta").backend_for(1).name == "reference"
    assert layer.backend_for(1, device="cpu").name == "lookup"
    with use_backend("reference"):
        assert layer.backend_for(1, device="cpu").name == "reference"


def test_one_is_forced_until_the_block_is_left() -> None:
    assert lowbit.backend is use_backend
    with use_backend("reference"):
        assert run(1) == 2
        with use_backend("lookup"):
            assert run(1) == 1
        assert run(1) == 2
    assert run(1) == 1 and forced() is None
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert forced() is None


def test_one_is_forced_while_a_function_runs() -> None:
    """Again and again, and inside itself."""

    @use_backend("reference")
    def count(depth: int) -> int:
        return run(1) + (count(depth - 1) if depth else 0)

    assert (count(0), count(2), count(0), run(1)) == (2, 6, 2, 1)


def test_another_thread_is_not_forced() -> None:
    found: list[int] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(run(1)))
        thread.start()
        thread.join()
    assert found == [1]


def test_an_unknown_name_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"'refrence' is not a backend: did you mean 'reference'"),
        use_backend("refrence"),
    ):
        pass
    with pytest.raises(ValueError, match=r"allowed are .*lookup.*reference"), use_backend("cuda"):
        pass


def test_a_forced_backend_that_cannot_run_is_an_error() -> None:
    message = "backend 'lookup' does not run this filled layer for 5 tokens of float32 on cpu"
    with use_backend("lookup"):
        with pytest.raises(ValueError, match=f"{message}: allowed are reference"):
            run(5)
        with pytest.raises(ValueError, match="on cpu with gradients: allowed are reference"):
            Filled()(torch.ones(1, 2, requires_grad=True))
        dense = build({"format": "dense", "shape": [1, 1], "bias": None, "dtype": "float32"})
        with pytest.raises(ValueError, match="this dense layer .*: allowed are reference"):
            dense(torch.ones(1, 1))
        assert Filled()(torch.ones(0, 2)).shape == (0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "lookup"])
def test_a_compiled_layer_keeps_what_was_forced(name: str) -> None:
    torch._dynamo.reset()
    layer = Filled()
    with use_backend(name):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        wanted = layer(torch.ones(1, 2))
        assert torch.equal(compiled(torch.ones(1, 2)), wanted)
    assert torch.equal(compiled(torch.ones(1, 2)), wanted)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The names that were forced when layers were run."""
    names: list[str | None] = []

    def noted(*call: object) -> Backend:
        names.append(forced())
        return choose(*call)  # type: ignore[arg-type]

    monkeypatch.setattr(base, "choose", noted)
    return names


METHOD = PTQ161(epochs=0, alignment=4, min_tokens=1)
TASKS: dict[str, Callable[[Path], object]] = {
    "quantize": lambda out: quantized.quantize(quantized.source("llama"), out, METHOD),
    "plan": lambda out: lowbit.plan(
        quantized.source("llama"), METHOD, quantized.calibration(), device="cpu"
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_what_must_not_depend_on_the_machine_runs_the_reference(
    task: str, tmp_path: Path, used: list[str | None]
) -> None:
    TASKS[task](tmp_path / "out")
    assert used and set(used) == {"reference"}


def test_scores_run_the_reference(tmp_path: Path, used: list[str | None]) -> None:
    folder = quantized.quantize(quantized.source("llama"), tmp_path / "out", METHOD)
    used.clear()
    logits = StreamedLogits(folder, [torch.arange(3, 9)])
    logits(0, slice(0, 5))
    assert used and set(used) == {"reference"}
