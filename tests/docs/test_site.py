"""The site builds without a warning, and asks no other host for anything when it is opened."""

import os
import re
import subprocess
import sys
from pathlib import Path

import browser
import pytest

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[2]
LOADS = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\ssrc=\"(?P<src>[^\"]+)\""
    r"|<link\b(?=[^>]*rel=\"(?:stylesheet|preload|preconnect|icon|dns-prefetch)\")[^>]*"
    r"\shref=\"(?P<href>[^\"]+)\""
)
CODE = re.compile(r"<code>(.*?)</code>")
SHEET = re.compile(r"url\(\s*[\"']?(?P<url>[^\"')]+)|@import\s+[\"'](?P<sheet>[^\"']+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def outside(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"(?:https?:)?//", address)]


def test_no_page_and_no_sheet_names_a_file_of_another_host(site: Path) -> None:
    pages, sheets = [*site.rglob("*.html")], [*site.rglob("*.css")]
    assert len(pages) > 50 and sheets
    found = {}
    for path in [*pages, *sheets]:
        pattern = LOADS if path.suffix == ".html" else SHEET
        text = path.read_text(encoding="utf-8")
        names = [next(filter(None, each.groups()), "") for each in pattern.finditer(text)]
        found[path.name] = outside(names)
    assert {name: names for name, names in found.items() if names} == {}


def test_every_line_that_asks_for_a_part_was_replaced(site: Path) -> None:
    assert [path for path in site.rglob("*.html") if "<!-- make:" in path.read_text("utf-8")] == []


def test_no_code_shows_a_sign_of_markdown_or_html(site: Path) -> None:
    shown = [c for p in site.rglob("*.html") for c in CODE.findall(p.read_text("utf-8"))]
    assert len(shown) > 1000
    assert [code for code in shown if "&amp;lt;" in code or r"\|" in code] == []


@pytest.mark.skipif(browser.BROWSER is None, reason="needs a browser")
@pytest.mark.parametrize(
    "page", ["index", "choose", "methods/quip", "formats/lattice", "reference/python", "design"]
)
def test_a_browser_asks_nobody(page: str, site: Path) -> None:
    seen = browser.look(site / f"{page}.html", "h1", "nav", width=1200)
    assert seen.found["counts"]["h1"] == 1 and seen.found["counts"]["nav"] > 1
    assert outside(seen.asked) == []


@pytest.mark.skipif(browser.BROWSER is None, reason="needs a browser")
def test_a_page_fits_a_phone(site: Path) -> None:
    seen = browser.look(site / "index.html", "h1")
    assert seen.found["width"] <= browser.PHONE
