"""How near do trellis codes come to the weights, and how long does encoding take?

    python benchmarks/trellis.py gaussian [--tiles N]
    python benchmarks/trellis.py search [--seconds N]

`gaussian` encodes tiles of a unit Gaussian at every rate, with the compiled encoder: squared error
per weight, relative to the energy of the draw, and milliseconds for each tile. The least that any
code can reach is 4**-rate. `search` finds multipliers of the codebook: it tries odd numbers at 2
bits and 12 bits of state, and shows the best ones at all rates.
"""

import argparse
import random
import time

import torch
from results import append
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowbit.formats.trellis import codebook
from lowbit.formats.trellis.codebook import POSITIONS, RATES, UNIT, TrellisCode
from lowbit.solvers.viterbi import encode

FINALISTS = 30


def gaussian(tiles: int) -> Tensor:
    return torch.randn(tiles, POSITIONS, generator=torch.Generator().manual_seed(1))


def error(code: TrellisCode, x: Tensor) -> float:
    found = code.decode(encode(x * code.scale / UNIT, code.table(), code.shift)).flatten(1)
    found = found * UNIT / code.scale
    return float((found - x).square().mean() / x.square().mean())


def measure(tiles: int) -> None:
    rows, table = [], Table("rate", "state bits", "error", "least", "ms per tile")
    for state_bits, count in ((12, tiles), (16, tiles // 4)):
        for rate in RATES:
            code, x = TrellisCode(rate, state_bits), gaussian(count)
            error(code, x[:1])
            started = time.process_time()
            found = error(code, x)
            each = 1e3 * (time.process_time() - started) / count
            case = f"gaussian, {rate:g} bits, {state_bits} bits of state"
            note = f"{count} tiles"
            rows.append(
                {
                    "case": case,
                    "metric": "error",
                    "value": f"{found:.5f}",
                    "unit": "",
                    "notes": note,
                }
            )
            rows.append(
                {"case": case, "metric": "encoding", "value": f"{each:.2f}", "unit": "ms/tile"}
            )
            least = f"{4.0**-rate:.4f}"
            table.add_row(f"{rate:g}", str(state_bits), f"{found:.5f}", least, f"{each:.2f}")
    Console().print(table)
    append("trellis", rows)


def search(seconds: float) -> None:
    """Shows the errors of the best first multipliers, and of the best second ones beside ours."""
    draw, x = random.Random(1), gaussian(40)
    ours = codebook.MULTIPLIERS
    for which, rates in ((0, (2.0, 1.0, 3.0, 4.0)), (1, (1.5, 2.5))):
        found = list[tuple[float, tuple[int, int]]]()
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            odd = draw.randrange(1, 2**32, 2)
            tried = (odd, ours[1]) if which == 0 else (ours[0], odd)
            found.append((_error_with(tried, rates[0], x[:6]), tried))
        for _, tried in sorted(found)[:FINALISTS]:
            print(tried[which], *(f"{_error_with(tried, rate, x):.5f}" for rate in rates))


def _error_with(multipliers: tuple[int, int], rate: float, x: Tensor) -> float:
    codebook.MULTIPLIERS = multipliers
    codebook._table.cache_clear()
    return error(TrellisCode(rate, 12), x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("gaussian", "search"))
    parser.add_argument("--tiles", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    if arguments.what == "gaussian":
        measure(arguments.tiles)
    else:
        search(arguments.seconds)


if __name__ == "__main__":
    main()
