"""Prints the table of README from results.csv.

    python benchmarks/table.py [--text held_back_stories] [--models llama-mini opt-mini]
        [--columns rtn "gptq shipped" "omniquant shipped" quip]

It takes the newest row of each case of the benchmark "frontier", and a row from a tree with
uncommitted changes only where there is no other: that value is marked with a "+".
"""

import argparse
import re

from results import UNCOMMITTED, newest

METHODS = ("rtn", "gptq shipped", "omniquant shipped", "quip")
GRIDS = ("W4 g128", "W4", "W3 g128", "W3", "W2 g64", "W2")
# Codebooks with about as many bits as the grids with one scale per row.
CODEBOOKS = {"W4": "E8P12RVQ4B", "W3": "E8P12RVQ3B", "W2": "E8P12"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", default="held_back_stories")
    parser.add_argument("--columns", nargs="+", default=METHODS, help="names of methods")
    parser.add_argument("--models", nargs="+", default=["llama-mini", "opt-mini"])
    args = parser.parse_args()
    found = {tuple(case.split(" | ")): row for case, row in newest("frontier").items()}
    columns = list(args.columns)
    print("| grid | bits/weight | whole model |", " | ".join(columns), "|")
    print("| --- " * (3 + len(columns)) + "|")
    for model in args.models:
        whole = found[(model, "float", args.text)]
        print(
            f"| **{model}**, float16 | 16 | 16 | {float(whole['value']):.2f} |"
            + " |" * (len(columns) - 1)
        )
        for grid in GRIDS:
            names = [f"{method} {grid}" for method in columns]
            if "quip" in columns:
                names[columns.index("quip")] = f"quip {CODEBOOKS.get(grid)}"
            cells = [found.get((model, name, args.text)) for name in names]
            assert cells[0] is not None, f"{model} {grid} was not measured"
            values = [_value(cell) if cell else "" for cell in cells]
            best = min(filter(None, values), key=lambda value: float(value.rstrip("+")))
            shown = [f"**{value}**" if value == best else value for value in values]
            for i, name in enumerate(names):  # fine zeros take bits that rtn does not have
                if name.startswith("gptq fine") or "shipped W2" in name:
                    shown[i] = _with_bits(shown[i], cells[i])
            print(f"| {grid} | {' | '.join([*_bits(cells[0]), *shown])} |")


def _value(row: dict[str, str]) -> str:
    return f"{float(row['value']):.2f}" + "+" * row["commit"].endswith(UNCOMMITTED)


def _with_bits(shown: str, row: dict[str, str] | None) -> str:
    return f"{shown} ({_bits(row)[0]})" if row else shown


def _bits(row: dict[str, str]) -> list[str]:
    """Returns the bits of the linears and of the whole model."""
    found = re.match(r"([\d.]+) bits linears, ([\d.]+) bits model", row["notes"])
    assert found is not None
    return [f"{float(bits):.2f}" for bits in found.groups()]


if __name__ == "__main__":
    main()
