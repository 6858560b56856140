"""The readers of the documentation compute what `dequantize` computes, from bytes alone."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save

from lowbit.formats.base import QuantizedLinear
from lowbit.kernels.hadamard import orthogonal

DOCS = Path(__file__).parents[2] / "docs"
LINES = 20  # of the function `weight`, without its signature, docstring and empty lines


@pytest.fixture(autouse=True)
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(DOCS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "readers"]:
        del sys.modules[name]


def examples() -> dict[str, Callable[[], QuantizedLinear]]:
    """EXAMPLES of the tests of formats, which any new format joins."""
    path = Path(__file__).parents[1] / "formats" / "test_formats.py"
    spec = importlib.util.spec_from_file_location("examples_of_formats", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXAMPLES


EXAMPLES = examples()


@pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES)
def test_a_reader_of_few_lines_agrees_with_dequantize(make: Callable[[], QuantizedLinear]) -> None:
    layer = make()
    files: Any = importlib.import_module("readers.files")
    reader: Any = importlib.import_module(f"readers.{layer.format}")
    tensors = files.tensors(save(layer.state_dict()))
    found, wanted = reader.weight(layer.entry(), tensors), layer.dequantize().numpy()
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("width", [1, 64, 12, 56, 104, 92, 172, 100, 37, 74])
def test_transforms_without_torch(width: int) -> None:
    rotation: Any = importlib.import_module("readers.rotation")
    ours = orthogonal(width)
    found = rotation.transform(width, ours.kind)
    assert np.abs(found - ours.dense().numpy()).max() < 1e-6


@pytest.mark.parametrize("name", sorted({make().format for make in EXAMPLES.values()}))
def test_a_reader_is_short(name: str) -> None:
    body = (DOCS / "readers" / f"{name}.py").read_text().split("def weight")[1].split('"""')[2]
    assert 0 < len([line for line in body.splitlines() if line.strip()]) <= LINES
