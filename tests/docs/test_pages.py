"""The commands and the Python code of every page run, in their order, on the mini models.

Blocks of a page run in one folder, which also holds `examples/` and `zoo/`. `lowbit` commands run
in this process. A block below `<!-- skip: REASON -->` does not run; REASONS lists how reasons
begin. In place of MODEL stands a small random model, and in place of data sets of the hub a text of
it.
"""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import quantized
import typer
import zoo
from commands import call
from typer.testing import CliRunner

from lowbit.cli.auto_quip import auto_quip

KEPT = TemporaryDirectory(prefix="lowbit-docs-", ignore_cleanup_errors=True)
ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))
REASONS = ("needs ", "downloads ", "installs ", "it serves ", "trains for hours")
RUN = ("bash", "python")
BLOCK = re.compile(
    r"^(?:<!-- skip: (?P<reason>.+?) -->\n)?"
    r"```(?P<language>\S*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# In place of MODEL: as wide as a group of 128, which exports need.
WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
# What a command gets that names no text of its own.
TEXT = ["--calibration", quantized.text(), "--samples", "2", "--seqlen", "16"]
WITHOUT_TEXT = {
    "quantize": ("--calibration", TEXT),
    "plan": ("--calibration", TEXT),
    "mix": ("--calibration", TEXT),
    "tune": ("--calibration", [*TEXT, "--steps", "2"]),
    "eval": ("--text", ["--text", quantized.text(), "--seqlen", "16", "--limit", "2"]),
}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    title: str | None
    reason: str | None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(b["language"], b["code"], b["title"], b["reason"]) for b in found]


def test_every_block_says_its_language_and_why_it_does_not_run() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language, f"{page}: a block has no language:\n{block.code}"
            assert block.reason is None or block.reason.startswith(REASONS), f"{page}: {block}"
            assert block.reason is None or block.language in RUN, f"{page}: {block}"


@cache
def model() -> str:
    """The folder of the model in place of MODEL."""
    folder = Path(KEPT.name) / "model"
    return str(quantized.add_tokenizer(zoo.write(zoo.Line("llama", zoo.GQA | WIDE), folder)))


def command(line: str) -> None:
    """Runs one line of a bash block."""
    program, *words = shlex.split(line, comments=True)
    places = {"MODEL": model(), "wikitext2": quantized.text()}
    words = [places.get(word, word) for word in words]
    if program == "auto_quip":
        other = typer.Typer(add_completion=False)
        other.command()(auto_quip)
        result = CliRunner().invoke(other, words)
        assert result.exit_code == 0, result.output
        return
    assert program == "lowbit", f"only commands of lowbit run here: {line}"
    option, more = WITHOUT_TEXT.get(words[0], ("", []))
    if option and option not in words and "mine.yaml" not in words:
        words += more
    call(*words)


@pytest.mark.docs
@pytest.mark.kernels
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(b.language in RUN and not b.reason for b in blocks(page))],
    ids=lambda page: page.relative_to(ROOT / "docs").as_posix(),
)
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("examples", "zoo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.title and block.language not in RUN:
            Path(block.title).write_text(block.code, encoding="utf-8")
        if block.reason or block.language not in RUN:
            continue
        if block.language == "python":
            exec(compile(block.code, str(page), "exec"), names)
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                command(line)
