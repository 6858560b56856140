"""A model whose tokenizer is missing or damaged is refused before anything is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
import zoo
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app
from lowbit.methods import GPTQ, RTN, Method

pytestmark = pytest.mark.slow

FILES = ("tokenizer.json", "tokenizer_config.json")


def remove(model: Path) -> None:
    for name in FILES:
        (model / name).unlink()


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (remove, "has no tokenizer"),
    "cut short": (
        lambda m: (m / FILES[0]).write_bytes((m / FILES[0]).read_bytes()[:50]),
        "has a tokenizer that cannot be loaded",
    ),
    "no JSON": (lambda m: (m / FILES[0]).write_text("x"), "has a tokenizer that cannot be loaded"),
    "empty": (lambda m: (m / FILES[0]).write_text(""), "has a tokenizer that cannot be loaded"),
}
METHODS: dict[str, Method] = {"rtn": RTN(), "gptq": GPTQ()}


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    model = shutil.copytree(quantized.source(), tmp_path / "model")
    change, says = BAD[request.param]
    change(model)
    return model, says


@pytest.mark.parametrize("method", METHODS)
def test_refused_for_every_method(method: str, bad: tuple[Path, str], tmp_path: Path) -> None:
    model, says = bad
    text = quantized.calibration()
    for run in (
        lambda: lowbit.quantize(model, tmp_path / "out", METHODS[method], text, device="cpu"),
        lambda: lowbit.plan(model, METHODS[method], text, device="cpu"),
    ):
        with pytest.raises(ValueError, match=f"{says}.*--without-tokenizer"):
            run()
    assert not (tmp_path / "out").exists()


def test_without_tokenizer(bad: tuple[Path, str], tmp_path: Path) -> None:
    model, _ = bad
    arguments = ["quantize", model, tmp_path / "out", "--method", "rtn", "--without-tokenizer"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert not any((tmp_path / "out" / name).exists() for name in FILES)
    loaded, tokenizer = lowbit.load(tmp_path / "out")
    assert tokenizer is None


def test_text_needs_a_tokenizer_and_token_ids_do_not(tmp_path: Path) -> None:
    options = {"without_tokenizer": True, "device": "cpu"}
    with pytest.raises(ValueError, match="gptq reads calibration text, for which the model needs"):
        lowbit.quantize(quantized.source(), tmp_path, GPTQ(), quantized.calibration(), **options)
    ids, method = zoo.tokens(), quantized.METHODS["gptq"]
    out = lowbit.quantize(quantized.source(), tmp_path / "out", method, ids, **options)
    assert lowbit.load(out)[1] is None
