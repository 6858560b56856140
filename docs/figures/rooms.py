"""Figure of the packages of lowbit and their imports, read from the sources."""

import ast
from pathlib import Path

from figures.drawing import BLUE, GRAY, INK, Sheet

PACKAGE = Path(__file__).parents[2] / "src" / "lowbit"
SMALL = {
    "version",
    "waiting",
    "quantities",
    "patterns",
    "events",
    "run_report",
    "fields",
    "parsing",
}
LEFT_OUT = SMALL | {"config", "__init__", "__main__"}
WIDTH, ROW, BOX = 1000, 92, (108, 34)


def imports() -> dict[str, set[str]]:
    """Returns the packages that each package imports, without the small modules that all use."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = node.module == "lowbit"
                names = [f"lowbit.{a.name}" for a in node.names] if whole else [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for each in names:
                parts = each.split(".")
                if parts[0] == "lowbit" and len(parts) > 1 and parts[1] != name:
                    found.setdefault(name, set()).add(parts[1])
    kept = {name: {n for n in found.get(name, ()) if n not in LEFT_OUT} for name in found}
    kept = {name: targets for name, targets in kept.items() if name not in LEFT_OUT}
    for targets in list(kept.values()):
        for name in targets:
            kept.setdefault(name, set())
    return kept


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Returns the floor of each package: one above the highest that it imports."""
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((floor(other) for other in graph[name]), default=-1)
        return found[name]

    for name in graph:
        floor(name)
    return found


def direct(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Returns the imports that do not follow from others: A to C is left out beside A to B to C."""

    def below(name: str) -> set[str]:
        return set(graph[name]).union(*(below(other) for other in graph[name]))

    return {
        (name, target)
        for name, targets in graph.items()
        for target in targets
        if not any(target in below(other) for other in targets - {target})
    }


def rooms() -> str:
    """Draws the packages on their floors, and arrows to what they import."""
    graph = imports()
    by_floor: dict[int, list[str]] = {}
    for name, floor in sorted(floors(graph).items()):
        by_floor.setdefault(floor, []).append(name)
    top = max(by_floor)
    sheet = Sheet(WIDTH, ROW * (top + 1) + 60, "Packages of lowbit, and which imports which")
    places = {
        name: (WIDTH * (i + 0.5) / len(names), 40 + ROW * (top - floor))
        for floor, names in by_floor.items()
        for i, name in enumerate(names)
    }
    for name, target in sorted(direct(graph)):
        (a, b), (c, d) = places[name], places[target]
        sheet.arrow((a, b + BOX[1] / 2), (c, d - BOX[1] / 2), GRAY, 1)
    for name, (x, y) in places.items():
        sheet.box((x - BOX[0] / 2, y - BOX[1] / 2), BOX, "#e8f0f9", BLUE)
        sheet.text(x, y + 5, name, INK, 14, "middle")
    small = ", ".join(sorted(SMALL | {"config"}))
    sheet.text(20, ROW * (top + 1) + 46, f"All may use: {small}.", GRAY, 13)
    return sheet.svg()
