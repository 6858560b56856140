"""A folder with a slice computes exactly what the master computes at that width."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.checkpoint.slices import size_of_slice
from lowbit.convert import slice_folder

pytestmark = pytest.mark.slow

PLAN = {"mlp.*": 4, "down_proj": 2, "layers.1.self_attn.q_proj": 3}


@pytest.mark.parametrize(
    ("options", "bits", "nested"),
    [
        ({}, 4, False),
        ({}, 8, False),
        ({}, PLAN, False),
        ({}, 3, True),
        ({"name": "mixtral"}, {"experts.*": 2, "self_attn.*": 6}, False),
        ({"scope": "ffn"}, 2, False),
        ({"extra_precision": True}, 2, True),
        ({"extra_precision": True}, 8, False),
    ],
    ids=str,
)
def test_it_computes_what_the_master_does(
    options: dict[str, Any], bits: Any, nested: bool, tmp_path: Path
) -> None:
    folder = quantized.master(**options)
    out = slice_folder(folder, tmp_path / "slice", bits, nested=nested)
    QuantizedFolder(out).verify()
    found, wanted = lowbit.load(out)[0], lowbit.load(folder, bits=bits)[0]
    assert torch.equal(quantized.logits(found), quantized.logits(wanted))
    formats = {entry["format"] for entry in QuantizedFolder(out).entries.values()}
    uniform = not nested or options.get("scope") == "ffn"
    assert formats == {"uniform"} if uniform else formats == {"nested"}
    size, told = size_of(out), size_of_slice(folder, bits)
    assert (told.linears, told.model) == pytest.approx((size.linears, size.model), abs=1e-9)
    assert told.bytes == pytest.approx(size.bytes, rel=0.03)  # but for the headers


def test_it_says_where_it_comes_from(tmp_path: Path) -> None:
    out = slice_folder(quantized.master(), tmp_path / "slice", PLAN)
    made, origin = (quantized.section(path)["made_by"] for path in (out, quantized.master()))
    sliced = made.pop("sliced")
    assert made == origin
    assert sliced["master"] == quantized.master().name
    assert sliced["digest"] == quantized.section(quantized.master())["digest"]
    assert sliced["bits"]["model.layers.{0-1}.mlp.down_proj"] == 2
    assert sliced["bits"]["model.layers.1.self_attn.q_proj"] == 3
    assert sliced["bits"]["model.layers.0.self_attn.q_proj"] == 8
    assert (out / "tokenizer.json").exists() and not (out / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "bits", "message"),
    [
        ({"extra_precision": True}, 2, r"layer model\.layers\.0\..* code 4 .*\(--nested\)"),
        ({}, {"q_prj": 4}, "'q_prj' matches no nested layer"),
        ({}, 9, "allowed are 2 to 8"),
    ],
    ids=str,
)
def test_what_cannot_be_cut(
    options: dict[str, Any], bits: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        slice_folder(quantized.master(**options), tmp_path / "slice", bits)
    assert not list(tmp_path.iterdir())


def test_a_slice_is_cut_from_the_master_only(tmp_path: Path) -> None:
    nested = slice_folder(quantized.master(), tmp_path / "4", 4, nested=True)
    with pytest.raises(ValueError, match=r"layer .* slice of 4 bits, .* 2 bits cannot be cut"):
        slice_folder(nested, tmp_path / "2", 2)
    same = slice_folder(nested, tmp_path / "uniform", 4)
    assert torch.equal(*(quantized.logits(lowbit.load(path)[0]) for path in (nested, same)))
    with pytest.raises(ValueError, match="exists already"):
        slice_folder(quantized.master(), nested, 4)
    with pytest.raises(ValueError, match="only layers made by matquant"):
        slice_folder(quantized.folder(), tmp_path / "rtn", 4)


def test_a_damaged_master_leaves_nothing(tmp_path: Path) -> None:
    folder = shutil.copytree(quantized.master(), tmp_path / "master")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="is damaged"):
        slice_folder(folder, tmp_path / "slice", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["master"]
