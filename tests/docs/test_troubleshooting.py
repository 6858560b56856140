"""Every sentence that the page Troubleshooting quotes is one that the sources can write."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^> `(.+)`$", PAGE, re.MULTILINE)
SHORTEST = 12  # characters of a part that is looked for


@cache
def texts() -> str:
    """All texts of the sources; what an f-string inserts is an ellipsis."""
    found = []
    for path in (ROOT / "src" / "lowbit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def test_there_are_many() -> None:
    assert len(QUOTED) > 50 and len(set(QUOTED)) == len(QUOTED)


def test_their_fixed_parts_are_in_the_sources() -> None:
    missing = {}
    for sentence in QUOTED:
        parts = [part.strip() for part in sentence.split("…")]
        parts = [part for part in parts if len(part) >= SHORTEST] or [max(parts, key=len)]
        if absent := [part for part in parts if part not in texts()]:
            missing[sentence] = absent
    assert missing == {}
