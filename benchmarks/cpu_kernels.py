"""How long do all linears of one token take in compiled kernels, and in llama.cpp?

    python benchmarks/cpu_kernels.py [--llama DIR] [--threads 1 2] [--only NAME] [--rounds 4]

Layers of random weights in TinyLlama's shape (22 blocks, hidden size 2048, feed-forward 5632) and a
head of 8 bits run one after the other, each through its own forward, as a model calls them. Their
time is compared with llama.cpp's for a whole token of the same shape with the type nearest in size
and a head of Q8_0; that time has attention and norms too (a few percent). Both run in turn, some
tokens each; the best token of all rounds counts. --llama is the folder of llama.cpp's libraries
(see llama_cpp.py); without it, only lowbit runs. torch's float32 and bfloat16 linears are measured
in the same way.

The share is that of the read bandwidth, measured in the same run over as many bytes. Where the
weights fit in the processor's last cache, both numbers are those of the cache.
"""

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import append
from torch import nn

from lowbit.formats import build, repack, set_input_bits
from lowbit.kernels.native import chosen
from lowbit.kernels.native.bandwidth import read_bandwidth

LAYERS, VOCABULARY, HIDDEN, WIDE, KV = 22, 32000, 2048, 5632, 256
LINEARS = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (KV, HIDDEN), "attn_v": (KV, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN),
    "ffn_down": (HIDDEN, WIDE),
}  # fmt: skip
TOKENS = 8  # of a turn
HEAD = {"format": "uniform", "bits": 8, "group_size": None, "symmetric": False}
UNIFORM = {"format": "uniform", "group_size": 128, "symmetric": False}
LATTICE = {
    "format": "lattice", "residual_scale": None, "scale": "tensor", "scale_dtype": "float32",
    "seed_in": 1, "seed_out": 2, "transform_in": "hadamard", "transform_out": "hadamard",
    "signs": "seed", "shares": None,
}  # fmt: skip
BINARY = {
    "format": "binary", "row_mean": True, "column_scale": True, "scale_dtype": "float16",
    "shares": None,
}  # fmt: skip
# Entry of the linears, and llama.cpp's type.
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "8 bits, per row": (HEAD, "Q8_0"),
    "4 bits, g128": (UNIFORM | {"bits": 4}, "Q4_0"),
    "3 bits, g128": (UNIFORM | {"bits": 3}, "Q3_K"),
    "2 bits, g128": (UNIFORM | {"bits": 2}, "Q2_K"),
    "lattice E8P12": (LATTICE | {"codebook": "E8P12"}, "IQ2_XXS"),
    "binary, a fifth salient": (BINARY, "IQ1_S"),
}


def random_layer(entry: dict[str, Any], shape: tuple[int, int]) -> nn.Module:
    """Returns a layer of random codes."""
    salient = {"salient": shape[1] // 40 * 8} if entry["format"] == "binary" else {}
    zeros = {"zero_shift": 0, "scale_dtype": "float16"} if entry["format"] == "uniform" else {}
    layer = build({**zeros, **entry, **salient, "shape": list(shape), "bias": None})
    for name, tensor in layer.named_parameters():
        if name == "mask":
            tensor.data[: salient["salient"] // 8] = 255
        elif tensor.is_floating_point():
            tensor.data.uniform_(0.001, 0.002)
        else:
            tensor.data.random_(0, 256)
    return layer


def random_layers(entry: dict[str, Any]) -> nn.ModuleList:
    """Returns the linears of all blocks, and the head."""
    shapes = [shape for _ in range(LAYERS) for shape in LINEARS.values()]
    made = [random_layer(entry, shape) for shape in shapes]
    return nn.ModuleList([*made, random_layer(HEAD, (VOCABULARY, HIDDEN))])


def float_layers(dtype: torch.dtype) -> nn.ModuleList:
    shapes = [shape for _ in range(LAYERS) for shape in LINEARS.values()]
    made = [nn.Linear(k, n, bias=False, dtype=dtype) for n, k in [*shapes, (VOCABULARY, HIDDEN)]]
    return nn.ModuleList(made)


def seconds(layers: nn.ModuleList, threads: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Returns the seconds of each of some tokens."""
    torch.set_num_threads(threads)
    inputs = {k: torch.randn(1, k).to(dtype) for k in (HIDDEN, WIDE)}
    chain = [(layer, inputs[layer.in_features]) for layer in layers]
    times = []
    with torch.no_grad():
        for _ in range(TOKENS):
            started = time.perf_counter()
            for layer, x in chain:
                layer(x)
            times.append(time.perf_counter() - started)
    return times


def packed_bytes(layers: nn.ModuleList) -> int:
    return sum(
        tensor.nbytes
        for layer in layers
        for kept in layer._repacked._kept.values()
        for made in kept.made
        for tensor in made.values()
    )


def measure(name: str, args: argparse.Namespace, peer: Any) -> list[dict[str, Any]]:
    """Measures a format with both kinds of inputs; returns rows of results.csv."""
    entry, kind = FORMATS[name]
    layers, rows = random_layers(entry), []
    for bits in (16, 8):
        set_input_bits(layers, bits)
        repack(layers)
        size = packed_bytes(layers)
        for threads in args.threads:
            ours, theirs = [], []
            for _ in range(args.rounds):
                ours += seconds(layers, threads)
                theirs += peer.seconds(TOKENS, threads) if peer else []
            best = min(ours)
            share = size / best / read_bandwidth(size, threads)
            case = f"{name} | {bits}-bit inputs | {threads} threads"
            found = {"time": (1000 * best, "ms"), "read": (size / best / 1e9, "GB/s"),
                     "share of read bandwidth": (share, "")}  # fmt: skip
            if theirs:
                found["peer"] = (1000 * min(theirs), "ms")
                found["peer / lowbit"] = (min(theirs) / best, "")
            print(case, {key: round(value, 2) for key, (value, _) in found.items()}, flush=True)
            rows += [
                {"case": case, "metric": key, "value": f"{value:.2f}", "unit": unit}
                for key, (value, unit) in found.items()
            ]
    return rows


def measure_float(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        layers = float_layers(dtype)
        for threads in args.threads:
            best = min(min(seconds(layers, threads, dtype)) for _ in range(2))
            case = f"{str(dtype).removeprefix('torch.')}, torch | {threads} threads"
            print(case, f"{1000 * best:.1f} ms", flush=True)
            rows.append({"case": case, "metric": "time", "value": f"{1000 * best:.2f}"})
    return [{**row, "unit": "ms"} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's libraries")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", default="", help="regular expression for the names of formats")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    args = parser.parse_args()
    library = None
    if args.llama:
        from llama_cpp import LlamaCpp, write_random

        library = LlamaCpp(args.llama)
    load = f"load {os.getloadavg()[0]:.1f} before"
    notes = f"{chosen()}, {load}, linears and an 8-bit head"
    if library:
        notes += f"; peer: llama.cpp, {library.backend}, a whole token"
    for name, (_, kind) in FORMATS.items():
        if not re.search(args.only, name):
            continue
        with tempfile.TemporaryDirectory() as place:
            peer, path = None, Path(place) / "peer.gguf"
            if library:
                write_random(path, kind, LAYERS, LINEARS, VOCABULARY)
                peer = library.load(path)
            rows = measure(name, args, peer)
            if peer:
                peer.free()
        versus = f" ({kind})" if library else ""
        append("kernels", [{**row, "notes": notes + versus} for row in rows])
    if re.search(args.only, "float"):
        append("kernels", [{**row, "notes": load} for row in measure_float(args)])


if __name__ == "__main__":
    main()
