"""Prints the table of README from results.csv.

    python benchmarks/table.py [--text held_back_stories] [--models llama-mini opt-mini]

It takes the newest row of each case of the benchmark "perplexity", and a row from a tree with
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
    parser.add_argument("--models", nargs="+", default=["llama-mini", "opt-mini"])
    args = parser.parse_args()
    found = {tuple(case.split(" | ")): row for case, row in newest("perplexity").items()}
    print("| grid | bits/weight | whole model |", " | ".join(METHODS), "|")
    print("| --- " * (3 + len(METHODS)) + "|")
    for model in args.models:
        whole = found[(model, "float", args.text)]
        print(f"| **{model}**, float16 | 16 | 16 | {float(whole['value']):.2f} |" + " |" * 3)
        for grid in GRIDS:
            names = [f"{method} {grid}" for method in METHODS]
            names[METHODS.index("quip")] = f"quip {CODEBOOKS.get(grid)}"
            cells = [found.get((model, name, args.text)) for name in names]
            assert cells[0] is not None, f"{model} {grid} was not measured"
            values = [_value(cell) if cell else "" for cell in cells]
            best = min(filter(None, values), key=lambda value: float(value.rstrip("+")))
            shown = [f"**{value}**" if value == best else value for value in values]
            if grid.startswith("W2"):  # fine zeros take bits that rtn does not have
                shown[1:3] = [
                    _with_bits(*each) for each in zip(shown[1:3], cells[1:3], strict=True)
                ]
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
