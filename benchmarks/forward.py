"""How long does a forward of a quantized layer take, beside that of a dense one?

    python benchmarks/forward.py [--repeats N] [--only WORD] [--skip-results]

Time of a layer over that of torch's float32 linear of the same shape, one thread of a CPU, as the
median of the repeats. Each repeat measures the layer and the dense one by turns, so that other work
on the machine slows both. The bound is the traffic: at one token a dense layer reads all its
weights, and a packed one would take as much less as it is smaller if unpacking were free; at 128
tokens both are bound by arithmetic, so that the bound is 1.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from results import append
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from lowbit.formats.base import QuantizedLinear
from lowbit.formats.binary import BinaryLinear, Salient
from lowbit.formats.dense import DenseLinear
from lowbit.formats.incoherence import rotation
from lowbit.formats.lattice import LatticeLayout, LatticeLinear
from lowbit.formats.lattice.codebooks import codebook
from lowbit.formats.nested import NestedLayout, NestedLinear
from lowbit.formats.sorted_group import InputOrder, SortedGroupLayout, SortedGroupLinear
from lowbit.formats.uniform import UniformLayout, UniformLinear

SHAPES = ((2048, 2048), (2048, 5632))
TOKENS = (1, 128)
GROUP = 128
DRAW = torch.Generator().manual_seed(0)


def codes_of(rows: int, columns: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=DRAW, dtype=torch.uint8)


def scale_of(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=DRAW) + 0.1


def uniform(rows: int, columns: int, bits: int) -> UniformLinear:
    groups = columns // GROUP
    zero = codes_of(rows, groups, bits)
    codes, scale = codes_of(rows, columns, bits), scale_of(rows, groups)
    return UniformLinear.from_codes(codes, scale, zero, UniformLayout(bits, GROUP))


def nested(rows: int, columns: int) -> NestedLinear:
    groups = columns // GROUP
    zero = codes_of(rows, groups, 8)
    codes, scale = codes_of(rows, columns, 8), scale_of(rows, groups)
    return NestedLinear.from_codes(codes, scale, zero, NestedLayout(GROUP))


def lattice(rows: int, columns: int, name: str) -> LatticeLinear:
    book = codebook(name)
    codes = torch.randint(0, 2**book.code_bits, (rows, book.blocks(columns)), generator=DRAW)
    layout = LatticeLayout(book, rotation(columns, 1), rotation(rows, 2))
    return LatticeLinear.from_codes(codes.to(book.code_dtype), torch.ones(1), layout)


def sorted_group(rows: int, columns: int) -> SortedGroupLinear:
    order = InputOrder(torch.randperm(columns, generator=DRAW), 0, GROUP, 4)
    codes, scale = codes_of(rows, columns, 4), scale_of(rows, columns // GROUP)
    beside = torch.empty(rows, 0)
    return SortedGroupLinear.from_codes(codes, scale, beside, SortedGroupLayout(order, 4))


def binary(rows: int, columns: int) -> BinaryLinear:
    salient = columns // 5
    channels = torch.randperm(columns, generator=DRAW)[:salient].sort().values
    row, zero = scale_of(1, rows)[0], codes_of(1, rows, 4)[0]
    part = Salient(channels, codes_of(rows, salient, 4), row, zero)
    return BinaryLinear.from_parts(
        codes_of(rows, columns - salient, 1).bool(),
        row,
        row_mean=row,
        column_scale=scale_of(1, columns - salient)[0],
        salient=part,
    )


def dense(rows: int, columns: int) -> DenseLinear:
    return DenseLinear.from_weight(torch.randn(rows, columns, generator=DRAW).half(), None)


LAYERS: dict[str, Callable[[int, int], QuantizedLinear]] = {
    "uniform 4 bits g128": lambda rows, columns: uniform(rows, columns, 4),
    "uniform 2 bits g128": lambda rows, columns: uniform(rows, columns, 2),
    "nested at 4 bits, master g128": lambda rows, columns: nested(rows, columns).at(4),
    "nested at 4 bits, slice g128": lambda rows, columns: nested(rows, columns).slice(4),
    "lattice E8P12": lambda rows, columns: lattice(rows, columns, "E8P12"),
    "lattice E8P12RVQ4B": lambda rows, columns: lattice(rows, columns, "E8P12RVQ4B"),
    "sorted_group w4a4 g128": sorted_group,
    "binary, a fifth salient": binary,
    "dense float16": dense,
}


def ratio(layer: QuantizedLinear, tokens: int, repeats: int) -> float:
    """The layer's time over that of a dense linear."""
    weight = torch.randn(layer.out_features, layer.in_features, generator=DRAW)
    x = torch.randn(tokens, layer.in_features, generator=DRAW)
    spent: tuple[list[float], list[float]] = [], []
    for _ in range(repeats + 2):  # two to warm up
        for times, forward in zip(
            spent, (layer, lambda x: functional.linear(x, weight)), strict=True
        ):
            start = time.perf_counter()
            forward(x.clone())  # another input each time: what was prepared is not used again
            times.append(time.perf_counter() - start)
    ours, theirs = (median(times[2:]) for times in spent)
    return ours / theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--only", default="", help="layers whose name has this word")
    parser.add_argument("--skip-results", action="store_true", help="append no rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(shape, tokens) for shape in SHAPES for tokens in TOKENS]
    heads = [f"{rows} x {columns}\n{tokens} tokens" for (rows, columns), tokens in cases]
    shown = Table("time over dense", *heads, "\nbackends")
    found: list[dict[str, object]] = []
    for name, make in LAYERS.items():
        if options.only not in name:
            continue
        layers = {shape: make(*shape) for shape in SHAPES}
        with torch.inference_mode():
            ratios = [ratio(layers[shape], tokens, options.repeats) for shape, tokens in cases]
        backends = dict.fromkeys(layers[SHAPES[0]].backend_for(tokens).name for tokens in TOKENS)
        shown.add_row(name, *(f"{value:.2f}" for value in ratios), ", ".join(backends))
        found += [
            {
                "case": f"{name} | {rows} x {columns}, {tokens} tokens",
                "metric": "time over float32 linear",
                "value": round(value, 2),
                "unit": "ratio",
            }
            for ((rows, columns), tokens), value in zip(cases, ratios, strict=True)
        ]
    Console().print(shown)
    if not options.skip_results:
        append("forward", found)


if __name__ == "__main__":
    main()
