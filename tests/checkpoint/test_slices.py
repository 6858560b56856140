"""The size of slices on disk, and the widths that a folder has."""

import math
from pathlib import Path

import pytest
import quantized

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.checkpoint.slices import has_masters, size_of_slice, trained_share, widths_of


def folder() -> QuantizedFolder:
    # Joint rounding optimizes all widths; training may leave a block as it was.
    return QuantizedFolder(quantized.master(rounding="joint"))


@pytest.mark.parametrize(
    ("bits", "trained"),
    [(8, 1), (4, 1), (3, 0), ({"mlp.*": 2}, 1), ({"mlp.*": 6}, "attention"), ({"*": 6}, 0)],
)
def test_widths(bits: int | dict[str, int], trained: float | str) -> None:
    widths = widths_of(folder(), bits)
    assert set(widths) == set(folder().entries)
    wanted = bits if type(bits) is int else next(iter(bits.values()))
    assert widths["model.layers.1.mlp.up_proj"] == wanted
    if trained == "attention":
        sizes = {name: math.prod(entry["shape"]) for name, entry in folder().entries.items()}
        inside = sum(size for name, size in sizes.items() if "self_attn" in name)
        trained = inside / sum(sizes.values())
    assert trained_share(folder(), widths) == trained


def test_sizes_fall_by_the_codes_alone() -> None:
    whole = size_of_slice(folder().folder, 8)
    # The folder has four grids for each layer, a slice has one.
    assert size_of(folder().folder).linears == pytest.approx(8 + 4 * (whole.linears - 8))
    for bits in (6, 4, 2):
        found = size_of_slice(folder().folder, bits)
        assert found.linears == pytest.approx(whole.linears - (8 - bits))
        assert whole.bytes * found.model / whole.model == pytest.approx(found.bytes, rel=0.1)


def test_which_folders_have_masters(tmp_path: Path) -> None:
    assert has_masters(folder().folder)
    assert not has_masters(quantized.folder()) and not has_masters(quantized.source())
    with pytest.raises(ValueError, match="only layers made by matquant have several widths"):
        widths_of(QuantizedFolder(quantized.folder()), 4)
