"""How long do all linears of one token take in compiled kernels, and in llama.cpp?

    python benchmarks/cpu_kernels.py [--llama DIR] [--threads 1 2] [--only NAME] [--rounds 4]

A Llama of random weights in TinyLlama's shape (22 blocks, hidden size 2048, feed-forward 5632) with
a head of 8 bits is measured as `lowbit bench` does: all linears of one token, one after the other,
with inputs of 16 and of 8 bits. Their time is compared with llama.cpp's for a whole token of the
same shape with the type nearest in size and a head of Q8_0; that time has attention and norms too
(a few percent). Both run in turn, some tokens each; the best token of all rounds counts. --llama is
the folder of llama.cpp's libraries; without it, only lowbit runs. The linears of torch in float32
and bfloat16 are measured in the same way.

The share is that of the read bandwidth, measured in the same run over as many bytes as the weights
have on disk. Where they fit in the processor's last cache, both numbers are those of the cache.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from results import append

from lowbit.bench.llama_cpp import LlamaCpp, write_random
from lowbit.bench.machine import load
from lowbit.bench.measure import Speed, measure
from lowbit.bench.random_model import random_float
from lowbit.bench.shapes import parse_shape
from lowbit.bench.subject import of_shape
from lowbit.formats import repack, set_input_bits
from lowbit.kernels.native import chosen

# --format of the linears, and llama.cpp's type.
FORMATS = {
    "8 bits, per row": ("uniform:bits=8,group_size=none", "Q8_0"),
    "4 bits, g128": ("uniform:bits=4", "Q4_0"),
    "3 bits, g128": ("uniform:bits=3", "Q3_K"),
    "2 bits, g128": ("uniform:bits=2", "Q2_K"),
    "lattice E8P12": ("lattice:codebook=E8P12", "IQ2_XXS"),
    "trellis, 2 bits": ("trellis:rate=2", "IQ2_XXS"),
    "trellis, 3 bits": ("trellis:rate=3", "IQ3_XXS"),
    "binary, a fifth salient": ("binary", "IQ1_S"),
}


def rows_of(case: str, found: Speed) -> list[dict[str, str]]:
    """Returns the rows of results.csv."""
    values = {"time": (1e3 * found.linears.best, "ms"), "read": (found.read / 1e9, "GB/s")}
    if found.share is not None:
        values["share of read bandwidth"] = (found.share, "")
    if found.peer is not None:
        values["peer"] = (1e3 * found.peer.best, "ms")
        values["peer / lowbit"] = (found.peer.best / found.linears.best, "")
    print(case, {name: round(value, 2) for name, (value, _) in values.items()}, flush=True)
    return [
        {"case": case, "metric": name, "value": f"{value:.2f}", "unit": unit}
        for name, (value, unit) in values.items()
    ]


def measure_format(name: str, args: argparse.Namespace, peer: Any) -> list[dict[str, str]]:
    """Measures a format with both kinds of inputs."""
    subject, rows = of_shape(args.shape, FORMATS[name][0], 16), []
    for bits in (16, 8):
        set_input_bits(subject.model, bits)
        repack(subject.model)
        for threads in args.threads:
            found = measure(
                subject.model, threads=threads, rounds=args.rounds, peer=peer, generate=False
            )
            rows += rows_of(f"{name} | {bits}-bit inputs | {threads} threads", found)
    return rows


def measure_float(args: argparse.Namespace) -> list[dict[str, str]]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_float(parse_shape(args.shape), dtype)
        for threads in args.threads:
            found = measure(model, threads=threads, rounds=2, generate=False)
            name = str(dtype).removeprefix("torch.")
            rows += rows_of(f"{name}, torch | {threads} threads", found)[:1]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's libraries")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", default="", help="regular expression for the names of formats")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--shape", default="tinyllama", help="as for lowbit bench")
    args = parser.parse_args()
    library = LlamaCpp(args.llama) if args.llama else None
    notes = f"{chosen()}, load {load() or 0:.1f} before, linears and an 8-bit head"
    if args.shape != "tinyllama":
        notes += f", {args.shape}"
    if library:
        notes += f"; peer: llama.cpp, {library.backend}, a whole token"
    for name, (_, kind) in FORMATS.items():
        if not re.search(args.only, name):
            continue
        with tempfile.TemporaryDirectory() as place:
            peer, path = None, Path(place) / "peer.gguf"
            if library:
                write_random(path, kind, parse_shape(args.shape))
                peer = library.load(path)
            rows = measure_format(name, args, peer)
            if peer:
                peer.free()
        versus = f" ({kind})" if library else ""
        append("kernels", [{**row, "notes": notes + versus} for row in rows])
    if re.search(args.only, "float"):
        append("kernels", [{**row, "notes": notes} for row in measure_float(args)])


if __name__ == "__main__":
    main()
