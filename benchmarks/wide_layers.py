"""What does error feedback gain and cost on layers that are as wide as those of large models?

    python benchmarks/wide_layers.py [--widths 11008 18944] [--rows 64]

It quantizes a layer with few rows, at widths whose Hadamard matrices come from the constructions of
Williamson and Paley. Weights are Gaussian. The spectrum of the Hessian falls as 1/k, and a few
channels are large. It measures the proxy loss of rounding to nearest, of feedback, and after each
greedy pass, as shares of tr(W H W^T), and the seconds of each step.
"""

import argparse
import time

import torch
from results import append
from torch import Tensor

from lowbit.formats.incoherence import rotate_hessian, rotate_weight, rotation
from lowbit.formats.lattice.codebooks import codebook
from lowbit.methods.rotated.words import Rounder, Words

LARGE_CHANNELS, FACTOR = 4, 30.0
RANK = 512  # of the correlated part of the Hessian
PASSES = 2


def hessian_of(width: int, draw: torch.Generator) -> Tensor:
    """Returns a positive definite Hessian, (width, width) float32, with a few large channels."""
    directions = torch.randn(width, RANK, generator=draw) / torch.arange(1, RANK + 1).sqrt()
    directions[torch.randperm(width, generator=draw)[:LARGE_CHANNELS]] *= FACTOR
    found = directions @ directions.T / RANK
    found.diagonal().add_(0.01 * found.diagonal().mean())
    return found


def measure(width: int, rows: int) -> None:
    """Measures one layer of `rows` outputs and `width` inputs."""
    draw = torch.Generator().manual_seed(0)
    weight, hessian = torch.randn(rows, width, generator=draw), hessian_of(width, draw)
    book = codebook("E8P12")
    sides = rotation(width, 0), rotation(rows, 1)
    seconds: dict[str, float] = {}

    def timed(name: str, started: float) -> None:
        seconds[name] = time.perf_counter() - started

    started = time.perf_counter()
    rotated, turned = rotate_weight(weight, *sides), rotate_hessian(hessian, sides[0])
    timed("rotation", started)
    del hessian
    scale = rotated.square().mean().sqrt().expand(rows) / book.scale
    plain = Rounder(None, width, book.dim, 0.01, torch.device("cpu"))
    started = time.perf_counter()
    rounder = Rounder(turned, width, book.dim, 0.01, torch.device("cpu"))
    timed("factor", started)
    nearest = plain.round(rotated, scale, book.nearest)
    found: dict[str, Words] = {}
    started = time.perf_counter()
    found["feedback"] = words = rounder.round(rotated, scale, book.nearest)
    timed("feedback", started)
    for number in range(1, PASSES + 1):
        started = time.perf_counter()
        words = rounder.improve(rotated, words, book.nearest, 1)
        found[f"pass {number}"] = words
        timed(f"pass {number}", started)
    energy = rounder.energy(rotated)
    error = rotated - scale[:, None] * nearest.values[:, :width]
    losses = {
        "nearest": float(((error @ turned) * error).sum())
        / float(((rotated @ turned) * rotated).sum())
    }
    losses |= {name: float(w.loss.sum()) / energy for name, w in found.items()}
    rows_of: list[dict[str, str]] = []
    for metric, values, unit in (("proxy loss", losses, ""), ("time", seconds, "s")):
        for name, value in values.items():
            case = f"E8P12 {rows} x {width} | {name}"
            rows_of.append({"case": case, "metric": metric, "value": f"{value:.5g}", "unit": unit})
            print(f"{case:<32} {metric:<10} {value:.5g} {unit}", flush=True)
    append("wide layers", rows_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[11008, 18944], help="inputs of the layers"
    )
    parser.add_argument("--rows", type=int, default=64, help="outputs of the layers")
    args = parser.parse_args()
    for width in args.widths:
        measure(width, args.rows)


if __name__ == "__main__":
    main()
