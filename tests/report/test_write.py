"""Writing the page to a file."""

from pathlib import Path

import pytest
import quantized

from lowbit.report import write_report


def test_where_the_page_is_written(tmp_path: Path) -> None:
    folder = quantized.quantize(quantized.source(), tmp_path / "out")
    assert write_report(str(folder)) == folder / "report.html"
    other = write_report(folder, tmp_path / "page.html")
    assert other.read_text() == (folder / "report.html").read_text()
    assert other.read_text().startswith("<!doctype html>")
    for path in (tmp_path, tmp_path / "nowhere" / "page.html"):
        with pytest.raises(ValueError, match="it is a folder, or is in a folder that does"):
            write_report(folder, path)
