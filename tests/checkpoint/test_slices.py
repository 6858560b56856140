"""What slices would take, and which widths a folder has."""

from pathlib import Path

import pytest
import quantized

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.checkpoint.slices import has_masters, is_trained, size_of_slice, widths_of


def folder() -> QuantizedFolder:
    return QuantizedFolder(quantized.folder(method="matquant"))


@pytest.mark.parametrize(
    ("bits", "trained"),
    [(8, True), (4, True), (3, False), ({"mlp.*": 2}, True), ({"mlp.*": 6}, False)],
)
def test_widths(bits: int | dict[str, int], trained: bool) -> None:
    widths = widths_of(folder(), bits)
    assert set(widths) == set(folder().entries)
    assert widths["model.layers.1.mlp.up_proj"] == (bits if type(bits) is int else bits["mlp.*"])
    assert is_trained(folder(), widths) == trained


def test_sizes_fall_by_the_codes_alone() -> None:
    whole = size_of(folder().folder)
    assert size_of_slice(folder().folder, 8) == whole
    for bits in (6, 4, 2):
        found = size_of_slice(folder().folder, bits)
        assert found.linears == pytest.approx(whole.linears - (8 - bits))
        assert whole.bytes * found.model / whole.model == pytest.approx(found.bytes, rel=0.1)


def test_which_folders_have_masters(tmp_path: Path) -> None:
    assert has_masters(folder().folder)
    assert not has_masters(quantized.folder()) and not has_masters(quantized.source())
    with pytest.raises(ValueError, match="only what matquant has quantized has widths"):
        widths_of(QuantizedFolder(quantized.folder()), 4)
