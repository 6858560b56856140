"""Every command and function refuses the same folders in the same words, and accepts the same."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import odd_folders
import pytest
import quantized
import torch
from odd_folders import ODD, SAME
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.cli import app
from lowbit.convert import convert
from lowbit.load import stream
from lowbit.methods import RTN

pytestmark = pytest.mark.slow

FLOAT_ONLY: dict[str, Callable[[Path, Path], Any]] = {
    "quantize": lambda model, out: lowbit.quantize(model, out, RTN(), device="cpu"),
    "plan": lambda model, out: lowbit.plan(model, RTN(), device="cpu"),
    "reference": lambda model, out: evaluate(quantized.source(), reference=model),
}
ANY: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda model, out: lowbit.load(model),
    "stream": lambda model, out: stream(model),
    "evaluate": lambda model, out: evaluate(model),
    "size": lambda model, out: size_of(model),
}
QUANTIZED_ONLY: dict[str, Callable[[Path, Path], Any]] = {
    "slice": lambda model, out: lowbit.slice(model, out, 4),
    "dequantize": lambda model, out: lowbit.dequantize(model, out),
    "QuantizedFolder": lambda model, out: QuantizedFolder(model),
    "report": lambda model, out: lowbit.report(model, out),
}
CONVERT: dict[str, Callable[[Path, Path], Any]] = {
    "from bin": lambda model, out: convert(model, out, "bin"),
    "from quip": lambda model, out: convert(model, out, "quip"),
}
# What these are for is what others refuse.
CONVERTIBLE = {"pickles": "from bin", "quip": "from quip"}
COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "quantize": lambda model, out: ["quantize", model, out, "--method", "rtn"],
    "plan": lambda model, out: ["plan", model, "--method", "rtn"],
    "eval": lambda model, out: ["eval", model, "--text", quantized.text()],
    "generate": lambda model, out: ["generate", model, "hi"],
    "inspect": lambda model, out: ["inspect", model],
    "inspect --verify": lambda model, out: ["inspect", "--verify", model],
    "report": lambda model, out: ["report", model, "-o", out],
    "slice": lambda model, out: ["slice", model, "--bits", 4, "-o", out],
    "mix": lambda model, out: ["mix", model, "--budget", 3, "-o", out],
    "dequantize": lambda model, out: ["dequantize", model, out],
}
FEW = ("gptq", "fp8", "scale", "gguf", "adapter", "pickles", "pointer", "no index", "unfinished")


def evaluate(model: Path, **options: Any) -> Any:
    texts = (quantized.text(),)
    return lowbit.evaluate([model], texts=texts, seqlen=16, limit=2, **options)


@pytest.mark.parametrize("name", ODD)
def test_refused_everywhere_in_the_same_words(name: str, tmp_path: Path) -> None:
    model, out = odd_folders.make(name, tmp_path), tmp_path / "out"
    said: dict[str, str] = {}
    for path, function in (FLOAT_ONLY | ANY | QUANTIZED_ONLY | CONVERT).items():
        if CONVERTIBLE.get(name) == path or (name, path) == ("no weights", "plan"):
            continue  # shapes are enough to plan
        with pytest.raises(ValueError) as caught:
            function(model, out)
        said[path] = str(caught.value)
        assert not out.exists(), path
    assert len(set(said.values())) == 1, said
    (message,) = set(said.values())
    assert ODD[name].says in message
    assert str(model) in message
    assert "\n" not in message and "Errno" not in message


@pytest.mark.parametrize("name", FEW)
def test_commands_say_it_too(name: str, tmp_path: Path) -> None:
    model, out = odd_folders.make(name, tmp_path), tmp_path / "out"
    said = set()
    for arguments in COMMANDS.values():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments(model, out)])
        assert result.exit_code == 1
        said.add(result.stderr.strip())
    assert len(said) == 1, said
    assert ODD[name].says in said.pop()


@cache
def wanted() -> torch.Tensor:
    return quantized.logits(lowbit.load(quantized.source())[0])


@pytest.mark.parametrize("name", SAME)
def test_accepted_everywhere(name: str, tmp_path: Path) -> None:
    model, out = odd_folders.make_same(name, tmp_path), tmp_path / "out"
    assert torch.equal(quantized.logits(lowbit.load(model)[0]), wanted())
    before = quantized.contents(quantized.folder())
    lowbit.quantize(model, out, quantized.METHODS["rtn"], device="cpu")
    shards = {file: data for file, data in before.items() if file.endswith(".safetensors")}
    after = quantized.contents(out)
    if name != "a mask of integers":
        assert {file: after[file] for file in shards} == shards
    lowbit.plan(model, RTN(group_size=16), device="cpu")
    (row,) = evaluate(model, reference=model)
    assert row.divergence[quantized.text()].kl == 0
    assert stream(model).vocabulary == stream(quantized.source()).vocabulary
    assert "float model" in CliRunner().invoke(app, ["inspect", str(model)]).stdout


def test_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    """safetensors opens no file of such a path, and calls it damaged."""
    name = "m\udcff"  # the byte 0xff
    try:
        float_model = shutil.copytree(quantized.source(), tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    made = shutil.copytree(quantized.folder(), tmp_path / f"q{name}")
    for model, paths in ((float_model, FLOAT_ONLY | ANY), (made, ANY | QUANTIZED_ONLY)):
        for path, function in paths.items():
            with pytest.raises(ValueError, match="the path of the model has the byte 0xff"):
                function(model, tmp_path / "out")
            assert not (tmp_path / "out").exists(), path
    writing: list[Callable[[Path], Any]] = [
        lambda out: lowbit.quantize(quantized.source(), out, RTN(), device="cpu"),
        lambda out: lowbit.dequantize(quantized.folder(), out),
        lambda out: lowbit.slice(quantized.master(), out, 4),
        lambda out: lowbit.export(quantized.folder(), out, "ct"),
    ]
    for write in writing:
        with pytest.raises(ValueError, match="the path of the folder to write has the byte 0xff"):
            write(tmp_path / f"out{name}")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("path", QUANTIZED_ONLY)
def test_a_float_model_where_a_quantized_one_is_needed(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not quantized by lowbit, it is a float model: quant"):
        QUANTIZED_ONLY[path](quantized.source(), tmp_path / "out")


@pytest.mark.parametrize("path", FLOAT_ONLY)
def test_a_quantized_model_where_a_float_one_is_needed(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is already quantized by lowbit: name the float model"):
        FLOAT_ONLY[path](quantized.folder(), tmp_path / "out")


@pytest.mark.parametrize("file", ["/etc/passwd", "../other/model.safetensors", "sub/x.safetensors"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_plain_from_pretrained_looks_at_no_other_folder(
    file: str, all_of_them: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model = shutil.copytree(quantized.folder(), tmp_path / "model")
    shutil.copytree(quantized.folder(), tmp_path / "other")

    def forge(index: dict[str, Any]) -> None:
        names = list(index["weight_map"])
        index["weight_map"].update(dict.fromkeys(names if all_of_them else names[:1], file))

    quantized.edit_json(model / odd_folders.INDEX, forge)
    looked: list[Path] = []
    init = QuantizedFolder.__init__

    def recorded(self: QuantizedFolder, folder: Path) -> None:
        looked.append(Path(folder))
        init(self, folder)

    monkeypatch.setattr(QuantizedFolder, "__init__", recorded)
    with pytest.raises(
        ValueError, match="not a file in this folder|'weight_map' must map|is not a folder"
    ):
        AutoModelForCausalLM.from_pretrained(model)
    assert all(folder.is_relative_to(model) for folder in looked)
