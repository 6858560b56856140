"""Pages of the site that are files elsewhere in the repository."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "measurements.md": "benchmarks/README.md",
    "other-programs.md": "benchmarks/engines/README.md",
    "security.md": "SECURITY.md",
}
ON_THE_SITE = {source: page for page, source in ROOT_PAGES.items()}
ON_THE_SITE |= {"benchmarks": "measurements.md", "benchmarks/engines": "other-programs.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def root_page(page: str) -> str:
    """Returns the Markdown of a page. Links to files that are not on the site become plain text."""
    source = ROOT_PAGES[page]
    folder = (ROOT / source).parent

    def link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found.groups()
        if "://" in target:
            return found[0]
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor or ''})"
        if path in ON_THE_SITE:
            return f"[{text}]({ON_THE_SITE[path]}{anchor or ''})"
        return "" if mark else text

    return LINK.sub(link, (ROOT / source).read_text(encoding="utf-8"))
