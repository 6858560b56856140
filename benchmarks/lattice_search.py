"""How fast is the search for the nearest codebook word, and when is rotating tokens faster?

    python benchmarks/lattice_search.py [--vectors N] [--repeats N] [--skip-forward]

Search: microseconds for a Gaussian vector at the codebook's scale (8 weights; D4 has 4, HI has 1).
The bound is x.clone(). The definition is reference.nearest, which tries all 65536 words of E8P12.
Forward: time of a layer, which rotates the tokens, divided by the time with the restored weight.
The numbers of tokens are multiples of the harmonic mean of (in, out). All times are processor time
of one thread, the best of the repeats.
"""

import argparse
import time
from collections.abc import Callable

import torch
from results import append
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from lowbit.formats.incoherence import rotation
from lowbit.formats.lattice import LatticeLayout, LatticeLinear, reference, search
from lowbit.formats.lattice.codebooks import CODEBOOKS
from lowbit.formats.lattice.tables import table

TRIED = 4096  # vectors for the definition, which takes hundreds of times longer
SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (5504, 2048), (2048, 5504), (4096, 4096))
MULTIPLES = (0.0, 0.5, 1.0, 2.0, 4.0)  # 0: one token


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Returns the shortest time of one call."""
    function()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


def searches(x: Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """Returns the functions to time, and the number of vectors that each of them searches."""
    e8p = x * CODEBOOKS["E8P12"].scale
    words = table("E8P12", x.device)
    timed: dict[str, tuple[Callable[[], object], int]] = {
        "copy (the bound)": (e8p.clone, len(x)),
        "E8P12, trying all (the definition)": (
            lambda: reference.nearest(e8p[:TRIED], words),
            TRIED,
        ),
        "E8P12, search": (lambda: search.nearest(e8p), len(x)),
        "E8P12, search of each shift": (lambda: search.nearest_of_each_shift(e8p), len(x)),
    }
    for name, book in CODEBOOKS.items():
        scaled = (x * book.scale).view(-1, book.dim)
        timed[f"{name}, code and values"] = (
            lambda book=book, scaled=scaled: book.nearest(scaled),
            len(scaled),
        )
    return timed


def measure_search(vectors: int, repeats: int, console: Console) -> list[dict[str, object]]:
    x = torch.randn(vectors, 8, generator=torch.Generator().manual_seed(0))
    shown = Table("search", "µs a vector")
    rows: list[dict[str, object]] = []
    for name, (function, count) in searches(x).items():
        spent = seconds(function, repeats) / count * 1e6
        shown.add_row(name, f"{spent:.3f}")
        rows.append({"case": name, "metric": "time", "value": round(spent, 4), "unit": "us/vector"})
    console.print(shown)
    return rows


def ratio(layer: LatticeLinear, tokens: int, repeats: int) -> float:
    """Returns the time of a forward, which rotates the tokens, over that of the restored weight."""
    x = torch.randn(tokens, layer.in_features, generator=torch.Generator().manual_seed(0))
    rotated = seconds(lambda: layer(x), repeats)
    return rotated / seconds(lambda: functional.linear(x, layer.dequantize()), repeats)


def measure_forward(repeats: int, console: Console) -> list[dict[str, object]]:
    book = CODEBOOKS["E8P12"]
    shown = Table("out x in", *(f"{m:g} x mean" if m else "1 token" for m in MULTIPLES))
    rows: list[dict[str, object]] = []
    for out, columns in SHAPES:
        codes = torch.randint(0, 2**16, (out, book.blocks(columns)), dtype=torch.int32)
        layout = LatticeLayout(book, rotation(columns, 1), rotation(out, 2))
        layer = LatticeLinear.from_codes(codes, torch.ones(1), layout)
        mean = 2 / (1 / out + 1 / columns)
        counts = [max(1, round(multiple * mean)) for multiple in MULTIPLES]
        found = [ratio(layer, count, repeats) for count in counts]
        shown.add_row(f"{out} x {columns}", *(f"{value:.2f}" for value in found))
        rows += [
            {
                "case": f"E8P12 {out} x {columns}, {count} tokens",
                "metric": "time with rotated tokens over restored weight",
                "value": round(value, 3),
                "unit": "ratio",
            }
            for count, value in zip(counts, found, strict=True)
        ]
    console.print(shown)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=2**18)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-forward", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    with torch.no_grad():
        rows = measure_search(options.vectors, options.repeats, console)
        if not options.skip_forward:
            rows += measure_forward(options.repeats, console)
    append("lattice_search", rows)


if __name__ == "__main__":
    main()
