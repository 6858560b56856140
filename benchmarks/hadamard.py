"""How much slower is the Hadamard transform than a copy of the same data?

    python benchmarks/hadamard.py [--megabytes N] [--repeats N]

The bound is x.clone(), which reads and writes the same bytes and allocates the output. For powers
of two the transform is also compared with butterflies: a product for radix 16, then additions and
subtractions level by level, in pieces of the same size. Times are processor time of one thread,
since others may use the machine. Each is the best of the repeats, in which functions take turns.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from results import append
from torch import Tensor

from lowbit.kernels.hadamard import orthogonal

WIDTHS = (4096, 11008, 14336, 18944, 13696, 4544, 5120, 768, 704, 344, 172)
PIECE = 1 << 17  # as in lowbit.kernels.hadamard.fast
FIRST = 16
SHORT = 2e-3  # seconds; faster functions are timed in a loop that takes about this long


def butterflies(first: Tensor, x: Tensor) -> Tensor:
    """Transforms rows with butterflies.

    first: (FIRST, FIRST), the scaled matrix of the first levels.
    x: (rows, n) float32, n = 2**k > FIRST  ->  (rows, n)
    """
    n = x.shape[-1]
    source, out = x.view(-1), torch.empty_like(x).view(-1)
    spare = torch.empty(2, min(len(source), PIECE // n * n))
    for start in range(0, len(source), spare.shape[1]):
        piece, target = (t[start : start + spare.shape[1]] for t in (source, out))
        here, there = spare[:, : len(piece)]
        torch.mm(piece.view(-1, FIRST), first, out=here.view(-1, FIRST))
        level = FIRST
        while level < n:
            a, b = here.view(-1, 2, level).unbind(1)
            written = target if 2 * level == n else there
            sums, differences = written.view(-1, 2, level).unbind(1)
            torch.add(a, b, out=sums)
            torch.sub(a, b, out=differences)
            here, there, level = written, here, 2 * level
    return out.view(x.shape)


def best(functions: list[Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> list[float]:
    """Returns the seconds of one call of each function."""
    counts = []
    for function in functions:
        function(x)
        start = time.process_time()
        function(x)
        counts.append(max(1, int(SHORT / (time.process_time() - start))))
    found = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.process_time()
            for _ in range(counts[i]):
                function(x)
            found[i] = min(found[i], (time.process_time() - start) / counts[i])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in WIDTHS:
        transform = orthogonal(n)
        for count in (options.megabytes * 2**20 // (4 * n), 1):
            x = torch.randn(count, n, generator=generator)
            ready = torch.empty_like(x)
            functions = [torch.clone, transform, ready.copy_]
            if n & (n - 1) == 0:
                first = orthogonal(FIRST).dense() * (FIRST / n) ** 0.5
                functions.append(partial(butterflies, first))
                torch.testing.assert_close(functions[-1](x), transform(x), rtol=1e-4, atol=1e-5)
            copy, ours, written, *other = best(functions, x, options.repeats)
            each = [f"{seconds / x.numel() * 1e9:.2f}" for seconds in (ours, copy, written)]
            notes = (
                f"{transform.describe()}; ns a value: transform {each[0]}, copy {each[1]} "
                f"(into a ready buffer {each[2]}); {ours * 1e6:.0f} us in all"
            )
            if other:
                notes += f"; butterflies {other[0] / copy:.1f} copies"
            case = f"{count} x {n} float32"
            row = {"case": case, "metric": "time", "value": f"{ours / copy:.2f}", "unit": "copies"}
            rows.append(row | {"notes": notes})
            print(f"{case:>24}  {ours / copy:6.2f} copies  {notes}", flush=True)
    append("hadamard", rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
