"""Prints the newest rows of cpu_kernels.py and decode.py, for one thread, as README has them.

python benchmarks/speed.py [--threads 1]
"""

import argparse
import re

from results import newest

LINEARS, MODELS = "kernels", "decode"


def value(benchmark: str, metric: str, case: str) -> str:
    """Returns a number, or nothing if it was not measured."""
    row = newest(benchmark, metric).get(case)
    return row["value"] if row else ""


def names(benchmark: str, end: str) -> list[str]:
    """Returns the formats that were measured, in the order of their rows."""
    cases = newest(benchmark, "time")
    return [case.partition(" | ")[0] for case in cases if case.endswith(end)]


def peer(benchmark: str, case: str) -> str:
    """Returns llama.cpp's type that a format was compared with."""
    row = newest(benchmark, "peer / lowbit").get(case)
    found = row and re.search(r"llama\.cpp ([A-Z0-9_]+)|\(([A-Z0-9_]+)\)", row["notes"])
    return (found[1] or found[2]) if found else ""


def linears(threads: str) -> None:
    print("| format | llama.cpp's | ms | share of bandwidth | ratio | ms, 8-bit inputs | ratio |")
    print("| --- " * 7 + "|")
    for name in names(LINEARS, f"16-bit inputs | {threads}"):
        case, fast = (f"{name} | {bits}-bit inputs | {threads}" for bits in (16, 8))
        cells = [
            peer(LINEARS, case),
            value(LINEARS, "time", case),
            value(LINEARS, "share of read bandwidth", case),
            value(LINEARS, "peer / lowbit", case),
            value(LINEARS, "time", fast),
            value(LINEARS, "peer / lowbit", fast),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def models(threads: str) -> None:
    sides = ("peer", "float32", "bfloat16")
    print("| format | ms a token | llama.cpp | float32 | bfloat16 | ms a prompt | llama.cpp |")
    print("| --- " * 7 + "|")
    for name in names(MODELS, f"{threads} | token"):
        case, prompt = (f"{name} | {threads} | {what}" for what in ("token", "prompt"))
        cells = [
            value(MODELS, "time", case),
            *(value(MODELS, f"{side} / lowbit", case) for side in sides),
            value(MODELS, "time", prompt),
            value(MODELS, "peer / lowbit", prompt),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    threads = f"{parser.parse_args().threads} threads"
    linears(threads)
    print()
    models(threads)


if __name__ == "__main__":
    main()
