"""Prints the table of README from results.csv.

    python benchmarks/table.py [--text held_back_stories] [--models llama-mini opt-mini]

It takes the newest row of each case of the benchmark "perplexity".
"""

import argparse
import re

from results import rows_of

METHODS = ("rtn", "gptq", "omniquant", "omniquant+gptq", "quip", "gptq fine")
GRIDS = ("W4 g128", "W4", "W3 g128", "W3", "W2 g64", "W2")
# Codebooks with about as many bits as the grids with one scale per row.
CODEBOOKS = {"W4": "E8P12RVQ4B", "W3": "E8P12RVQ3B", "W2": "E8P12"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", default="held_back_stories")
    parser.add_argument("--models", nargs="+", default=["llama-mini", "opt-mini"])
    args = parser.parse_args()
    # Later rows replace earlier ones.
    found = {tuple(row["case"].split(" | ")): row for row in rows_of("perplexity")}
    print("| grid | bits/weight | whole model |", " | ".join(METHODS), "|")
    print("| --- " * (3 + len(METHODS)) + "|")
    for model in args.models:
        whole = found[(model, "float", args.text)]
        print(f"| **{model}**, float16 | 16 | 16 | {float(whole['value']):.2f} |" + " |" * 5)
        for grid in GRIDS:
            names = [f"{method} {grid}" for method in METHODS]
            names[METHODS.index("quip")] = f"quip {CODEBOOKS.get(grid)}"
            cells = [found.get((model, name, args.text)) for name in names]
            assert cells[0] is not None, f"{model} {grid} was not measured"
            values = [f"{float(cell['value']):.2f}" if cell else "" for cell in cells]
            # Fine zeros take more bits, so they are not compared with the others.
            best = min(filter(None, values[:-1]), key=float)
            shown = [f"**{value}**" if value == best else value for value in values[:-1]]
            fine = f"{values[-1]} ({_bits(cells[-1])[0]})" if cells[-1] else ""
            print(f"| {grid} | {' | '.join([*_bits(cells[0]), *shown, fine])} |")


def _bits(row: dict[str, str]) -> list[str]:
    """Returns the bits of the linears and of the whole model."""
    found = re.match(r"([\d.]+) bits linears, ([\d.]+) bits model", row["notes"])
    assert found is not None
    return [f"{float(bits):.2f}" for bits in found.groups()]


if __name__ == "__main__":
    main()
