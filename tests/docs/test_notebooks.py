"""The notebooks run on small models, and the outputs that they carry are those of such a run.

Cells with the tag `skip-execution` need an engine or a large model; their first line says what.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SKIPPED = "skip-execution"
MOST = 60_000  # bytes of a notebook with its outputs
NAMED = re.compile(r'^MODEL = "(\w+-mini)"  # "([\w.-]+/[\w.-]+)"$', re.MULTILINE)


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def is_skipped(cell: dict[str, Any]) -> bool:
    return SKIPPED in cell["metadata"].get("tags", ())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_and_names_its_models_once(path: Path) -> None:
    assert path.stat().st_size < MOST
    cells = code_cells(path)
    for cell in cells:
        source = "".join(cell["source"])
        assert not is_skipped(cell) or source.startswith("# needs "), source
        assert is_skipped(cell) == (cell["execution_count"] is None), source
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert len(NAMED.findall(code)) == 1 and "-mini" not in NAMED.sub("", code)
    assert str(ROOT) not in path.read_text() and "/tmp/" not in path.read_text()


def test_the_page_links_all_of_them() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\(notebooks/(\w+)\.ipynb\)", page))
    assert linked == {path.stem for path in NOTEBOOKS} and len(NOTEBOOKS) == 7


@pytest.mark.docs
@pytest.mark.kernels
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", source)
    monkeypatch.delenv("LOWBIT_KERNELS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    printed = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert any(out.get("name") == "stdout" for out in printed)
