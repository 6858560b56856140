"""No file of a folder that a command writes holds a path of the machine on which it was made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from commands import call as lowbit
from quip_layout import rewrite
from safetensors.torch import load_file

from lowbit.methods import METHODS

pytestmark = pytest.mark.slow

LEARNING = ("epochs=1", "min_tokens=8")
SETTINGS: dict[str, tuple[str, ...]] = {
    "rtn": ("group_size=16",),
    "gptq": ("min_tokens=8",),
    "omniquant": LEARNING,
    "matquant": LEARNING,
    "mixedquant": ("min_tokens=8", "alignment=4", "group_size=16"),
    "ptq161": LEARNING,
    "quip": ("codebook=HI", "tune_iters=0", "min_tokens=8"),
    "trellis": ("state_bits=9", "min_tokens=8"),
}
TEXT = ("--samples", 2, "--seqlen", 16)
RECIPE = "description: mine\nmethod: rtn\nfields: {{bits: 3}}\ncalibration: {{sources: [{text}]}}\n"
LORA = "lora: {{rank: 2, seqlen: 16, steps: 2, sources: [{text}]}}\n"


class Home:
    """A home folder with a model, whose configs name where it was trained, and a text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Path(shutil.copytree(quantized.source(), folder / "models" / "mini"))
        for file, key in (
            ("config.json", "_name_or_path"),
            ("tokenizer_config.json", "name_or_path"),
        ):
            change = {key: str(self.model)}
            quantized.edit_json(
                self.model / file, lambda config, change=change: config.update(change)
            )
        self.text = folder / "letters" / "text.txt"
        self.text.parent.mkdir()
        shutil.copy(quantized.text(), self.text)

    def recipe(self, content: str) -> Path:
        path = self.folder / "my.yaml"
        path.write_text(content.format(text=self.text))
        return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("HOME", str(tmp_path))
    return Home(tmp_path)


def found(written: Path, home: Home) -> list[str]:
    """The files that hold the path of the home folder, in which all others lie."""
    files = [written] if written.is_file() else [p for p in written.rglob("*") if p.is_file()]
    assert files
    private = str(home.folder).encode()
    return [path.name for path in files if private in path.read_bytes()]


def method_options(name: str) -> list[Any]:
    return [part for setting in SETTINGS[name] for part in ("--set", setting)]


def quantize(home: Home, name: str) -> Path:
    out = home.folder / "results" / name
    lowbit(
        *("quantize", home.model, out, "--method", name, *method_options(name)),
        *("--calibration", home.text, *TEXT),
    )
    return out


def test_every_method_is_tried() -> None:
    assert SETTINGS.keys() == METHODS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_quantize(name: str, home: Home) -> None:
    out = quantize(home, name)
    for unfinished in (False, True):  # twice more, which adds to events.jsonl
        if unfinished:
            (out / "config.json").unlink()
        quantize(home, name)
    assert found(out, home) == []


def test_what_is_kept_of_a_text(home: Home) -> None:
    made_by = quantized.section(quantize(home, "gptq"))["made_by"]
    (source,) = made_by["calibration"]["sources"]
    assert source["name"] == "text.txt" and source["size"] == home.text.stat().st_size
    assert source["sha256"] == quantized.file_sha256(home.text)


def test_a_recipe_of_ones_own(home: Home) -> None:
    out = home.folder / "out"
    given = ("--recipe", home.recipe(RECIPE), "--set", "bits=4", *TEXT)
    lowbit("quantize", home.model, out, *given)
    assert found(out, home) == []
    assert quantized.section(out)["made_by"]["recipe"] == "my.yaml with bits=4"


def test_the_report(home: Home) -> None:
    out, rows = quantize(home, "rtn"), home.folder / "rows.json"
    lowbit(
        "eval",
        home.model,
        out,
        "--text",
        home.text,
        "--seqlen",
        16,
        "--limit",
        2,
        "--json",
        rows,
    )
    lowbit("report", out, "--results", rows)
    assert (out / "report.html").is_file()
    assert found(out, home) == []


def test_tune(home: Home) -> None:
    folder, out = quantize(home, "rtn"), home.folder / "out"
    text = ("--calibration", home.text, "--samples", 4, "--seqlen", 16, "--steps", 1)
    lowbit("tune", folder, "--reference", home.model, "-o", out, *text)
    assert found(out, home) == []


def test_preprocess(home: Home) -> None:
    out = home.folder / "out"
    recipe = home.recipe(RECIPE + LORA)
    lowbit("preprocess", home.model, out, "--recipe", recipe, *TEXT)
    assert found(out, home) == []
    recorded = json.loads((out / "config.json").read_text())["lowbit_preprocess"]
    (source,) = recorded["lora"]["sources"]
    assert source["name"] == "text.txt" and source["sha256"] == quantized.file_sha256(home.text)


def to_bin(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


LAYOUTS = {"bin": to_bin, "quip": lambda model: rewrite(model, "HI")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert(layout: str, home: Home) -> None:
    out = home.folder / "out"
    LAYOUTS[layout](home.model)
    lowbit("convert", home.model, out, "--from", layout)
    assert found(out, home) == []


def test_slice_mix_and_dequantize(home: Home) -> None:
    master = quantize(home, "matquant")
    plan, cut, dense = (home.folder / name for name in ("plan.yaml", "cut", "dense"))
    lowbit("mix", master, "--budget", "7", "-o", plan, "--calibration", home.text, *TEXT)
    lowbit("slice", master, "--bits", plan, "-o", cut)
    lowbit("dequantize", cut, dense)
    assert [found(written, home) for written in (plan, cut, dense)] == [[], [], []]


def test_a_model_in_memory(home: Home) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(home.model)
    tokenizer = AutoTokenizer.from_pretrained(home.model)
    out = quantized.quantize(model, home.folder / "out", "rtn", tokenizer=tokenizer)
    assert found(out, home) == []
