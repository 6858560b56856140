"""lowbit slice."""

import pytest

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.cli.screen import size

pytestmark = pytest.mark.slow


def test_a_width_and_a_plan(lowbit, nested, tmp_path):
    (tmp_path / "plan.yaml").write_text('"*": 4\ndown_proj: 2\n')
    for bits, out in (("4", tmp_path / "4"), (tmp_path / "plan.yaml", tmp_path / "mixed")):
        output = lowbit("slice", nested, "--bits", bits, "-o", out).stdout
        QuantizedFolder(out).verify()
        before, after = size_of(nested), size_of(out)
        assert output == (
            f"{out}: {after.linears:.2f} bits per weight in the linears (was "
            f"{before.linears:.2f}), {size(after.bytes)} (was {size(before.bytes)})\n"
        )
    assert size_of(tmp_path / "mixed").linears < size_of(tmp_path / "4").linears
    entries = QuantizedFolder(tmp_path / "mixed").entries.items()
    assert {e["bits"] for n, e in entries if n.endswith("down_proj")} == {2}


def test_nested(lowbit, nested, tmp_path):
    lowbit("slice", nested, "--bits", 3, "-o", tmp_path / "3", "--nested")
    formats = {e["format"] for e in QuantizedFolder(tmp_path / "3").entries.values()}
    assert formats == {"nested"}


def test_mistakes(lowbit, nested, rtn, tmp_path):
    for folder, bits, sentence in (
        (nested, "four", "--bits 'four' is neither a width from 2 to 8 nor a file"),
        (nested, "1", "bits is 1: allowed are 2 to 8"),
        (rtn, "4", "only layers made by matquant have several widths"),
    ):
        result = lowbit("slice", folder, "--bits", bits, "-o", tmp_path / "out", code=1)
        assert sentence in result.stderr and not list(tmp_path.iterdir())
