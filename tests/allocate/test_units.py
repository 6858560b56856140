"""The layers that share a width, in several families, and their bytes at each width."""

from pathlib import Path

import pytest
import quantized
from quantized import source

from lowbit.allocate.units import layout_of
from lowbit.checkpoint import QuantizedFolder
from lowbit.convert import slice_folder
from lowbit.formats import build
from lowbit.methods import MatQuant

pytestmark = pytest.mark.slow

WIDTHS = (8, 4, 2)


def master(name: str, out: Path, **options: object) -> QuantizedFolder:
    method = MatQuant(group_size=16, lwc=False, epochs=0, rounding="nearest", **options)
    return QuantizedFolder(quantized.quantize(source(name), out, method))


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("llama", ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")),
        ("opt", ("q_proj k_proj v_proj", "out_proj", "fc1", "fc2")),
        ("mixtral", ("q_proj k_proj v_proj", "o_proj", "w1 w2 w3")),
        ("qwen2_moe", None),
    ],
)
def test_every_layer_is_in_one_unit(
    name: str, units: tuple[str, ...] | None, tmp_path: Path
) -> None:
    folder = master(name, tmp_path / "out")
    layout = layout_of(folder, WIDTHS)
    assert sorted(n for unit in layout.units for n in unit.layers) == sorted(folder.entries)
    assert layout.blocks == 2 and {unit.block for unit in layout.units} == {0, 1}
    if units is not None:
        first = [unit for unit in layout.units if unit.block == 0]
        found = [{n.rpartition(".")[2] for n in unit.layers} for unit in first]
        assert sorted(map(sorted, found)) == sorted(sorted(unit.split()) for unit in units)
    experts = [unit for unit in layout.units if unit.patterns != unit.layers]
    assert bool(experts) == ("moe" in name or name == "mixtral")
    for unit in experts:
        (pattern,) = unit.patterns
        assert pattern.endswith(".experts.*") and len(unit.layers) == 4 * 3
        assert all(n.startswith(pattern.removesuffix("*")) for n in unit.layers)


@pytest.mark.parametrize("extra_precision", [False, True])
def test_bytes_are_those_of_the_slices(extra_precision: bool, tmp_path: Path) -> None:
    folder = master("llama", tmp_path / "out", extra_precision=extra_precision)
    layout = layout_of(folder, WIDTHS)
    for width in WIDTHS:
        out = slice_folder(folder.folder, tmp_path / str(width), width, nested=extra_precision)
        entries = QuantizedFolder(out).entries
        for unit in layout.units:
            taken = sum(build(entries[name]).weight_bytes() for name in unit.layers)
            assert unit.bytes[width] == taken


def test_what_has_no_masters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no layers with several widths: name a folder"):
        layout_of(QuantizedFolder(quantized.folder()), WIDTHS)
    folder = master("llama", tmp_path / "out").folder
    nested = slice_folder(folder, tmp_path / "slice", 4, nested=True)
    with pytest.raises(ValueError, match=r"slice: layer model\..* can only be cut from the master"):
        layout_of(QuantizedFolder(nested), WIDTHS)
