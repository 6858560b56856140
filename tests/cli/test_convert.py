"""lowbit convert."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from zoo import MODELS

from lowbit.convert import READERS

pytestmark = pytest.mark.slow

MODEL = MODELS / "llama-mini"


@pytest.fixture
def pickled(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "examples").mkdir()
    for name in ("modeling_x.py", "parts/vocab.json", "parts/code.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("options", [["--from-bin"], ["--from", "bin"]])
def test_from_bin(options, lowbit, pickled, tmp_path):
    out = tmp_path / "out"
    lines = lowbit("convert", pickled, out, *options).stdout.splitlines()
    assert lines[0].startswith(f"{pickled}: 9.9") and lines[0].endswith("in pytorch_model.bin")
    assert lines[1] == f"{out}: 9.91 MB of weights in model-00001-of-00001.safetensors"
    dropped = "README.md, examples, modeling_x.py, parts/code.py"
    assert lines[2] == f"not copied: {dropped}"
    trusted = lowbit("convert", pickled, f"{out}-2", *options, "--trust-remote-code").stdout
    assert trusted.splitlines()[2] == "not copied: README.md, examples"
    assert "is a float model: 16.00 bits" in lowbit("inspect", out).stdout


def test_every_reader_is_named(lowbit):
    text = " ".join(lowbit("convert", "--help").stdout.split())
    assert READERS and all(name in text for name in READERS)


MISTAKES = {
    "/pickled has: --from bin or --from quip": [],
    "did you mean 'bin'": ["--from", "bim"],
    "--from and --from-bin both name the layout: give one": ["--from", "bin", "--from-bin"],
}


@pytest.mark.parametrize(("message", "options"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(message, options, lowbit, pickled, tmp_path):
    assert message in lowbit("convert", pickled, tmp_path / "out", *options, code=1).stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_or_holds_no_pickle(lowbit, tmp_path):
    output = lowbit("convert", "owner/name", tmp_path / "out", "--from-bin", code=1).stderr
    assert "owner/name: there is no such folder" in output and "hf download NAME" in output
    assert "has neither" in lowbit("convert", MODEL, tmp_path / "out", "--from-bin", code=1).stderr
