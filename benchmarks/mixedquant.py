"""How do salient channels, group size and sorting change perplexity and size at W4A4?

    python benchmarks/mixedquant.py [--all] [--model DIR] [--limit N] [--plots DIR]

Three measurements are made of a model, and of the same model with outlier channels (outliers.py):

table    bits, MiB and perplexity for each share of salient channels and each group size. The table
         has the real size, and the size by the original code's formula. That formula counts all
         parameters as quantized, even the embedding; it counts scales for salient ones too, and it
         does not count permutations.
curves   perplexity over group size for each way to sort, drawn as SVG; also for the original code's
         order, which is computed anew for each call and cannot be deployed.
repairs  what each technique achieves against outliers, starting with W4A4 and one scale per row.

Without --all, there are fewer group sizes, ratios and ways to sort.
"""

import argparse
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from outliers import add_outliers
from reference_dynamic import reference_dynamic
from results import append
from rich.console import Console
from rich.table import Table

import lowbit
from lowbit.blocks import BlockTask
from lowbit.blocks.install import replace_module
from lowbit.blocks.walk import Step
from lowbit.calibration import evaluation_text
from lowbit.checkpoint.output import size_of
from lowbit.eval import perplexity
from lowbit.events import BlockLog
from lowbit.methods import MixedQuant
from lowbit.models.quiet import quiet
from lowbit.models.source import SourceModel

EXAMPLES = Path(__file__).parents[1] / "examples"
CALIBRATION = EXAMPLES / "text" / "calibration_stories.txt"
STORIES = EXAMPLES / "text" / "held_back_stories.txt"
SEQLEN = 256
SAMPLES = 8
MIB = 2**20
# The default alignment of 32 would be an eighth of 256 inputs.
COMMON: dict[str, Any] = {"alignment": 4}
PLAIN = {"group_size": None, "sort": "none", "salient_ratio": 0.0, "clip": False}


@dataclass(frozen=True)
class Grid:
    """The ratios of salient channels, group sizes and ways to sort that are measured."""

    ratios: tuple[float, ...]
    sizes: tuple[int, ...]
    sorts: tuple[str, ...]


REDUCED = Grid((0.0, 0.05), (32, 128, 512), ("none", "mean3std"))
ALL = Grid(
    (0.0, 0.01, 0.05, 0.1),
    (16, 32, 64, 128, 256, 1024),
    ("none", "max", "mean3std", "argmax", "weight_max"),
)


@dataclass(frozen=True)
class Found:
    """A measurement. bits: real bits per weight of the linears. bytes: size of all shards."""

    perplexity: float
    bits: float
    bytes: int


@dataclass
class Bench:
    """One model and its measurements, by the method's JSON."""

    folder: Path
    limit: int
    found: dict[str, Found] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, tokenizer = lowbit.load(self.folder)
        self.tokens = evaluation_text(str(STORIES), tokenizer, SEQLEN)
        calibration = evaluation_text(str(CALIBRATION), tokenizer, SEQLEN)
        self.batches = calibration[: SAMPLES * SEQLEN].view(SAMPLES, 1, SEQLEN).unbind()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.float = self._perplexity(model)

    def _perplexity(self, model: torch.nn.Module) -> float:
        return perplexity(model, self.tokens, SEQLEN, self.limit).value

    def measure(self, **fields: Any) -> Found:
        """Quantizes, saves and loads the model, and measures it."""
        method = MixedQuant(**COMMON, **fields)
        key = method.model_dump_json()
        if key not in self.found:
            with tempfile.TemporaryDirectory() as folder:
                sources = (str(CALIBRATION),)
                windows = lowbit.Calibration(sources=sources, samples=SAMPLES, seqlen=SEQLEN)
                out = lowbit.quantize(self.folder, Path(folder) / "out", method, windows)
                size = size_of(out)
                value = self._perplexity(lowbit.load(out)[0])
                self.found[key] = Found(value, size.linears, size.bytes)
        return self.found[key]

    def dynamic(self, **fields: Any) -> float:
        """Returns the perplexity as the original code runs it: alignment 1, no search for clips."""
        method = MixedQuant(**COMMON, clip=False, **fields)
        model, _ = lowbit.load(self.folder)
        source = SourceModel(self.folder)

        def visit(step: Step) -> None:
            task = BlockTask(
                name=step.name,
                block=step.block,
                groups=source.groups(step.name),
                folds=source.folds(step.name),
                streams=step.streams,
                seed=0,
                log=BlockLog(
                    emit=lambda event: None,
                    block=step.name,
                    index=step.index,
                    of=len(source.block_names),
                ),
            )
            replace_module(model, step.name, reference_dynamic(method, task))
            step.advance()

        source.walk({"float": source.first_stream(self.batches)}, visit)
        return self._perplexity(model)


def original_bits(ratio: float, group_size: int) -> float:
    """Returns the bits per parameter by get_model_size of the original code."""
    overhead = 20 / group_size  # a scale of 16 bits and a zero point of 4, which it does not use
    return (1 - ratio) * (4 + overhead) + ratio * (16 + overhead)


def show_table(bench: Bench, grid: Grid, console: Console) -> list[dict[str, Any]]:
    columns = ("salient", "group", "formula bits", "formula MiB", "real bits", "real MiB", "ppl")
    shown = Table(*columns, title=f"{bench.folder.name}, float {bench.float:.3f}")
    rows: list[dict[str, Any]] = []
    for ratio in grid.ratios:
        for size in grid.sizes:
            found = bench.measure(salient_ratio=ratio, group_size=size)
            bits = original_bits(ratio, size)
            mib = [f"{n / MIB:.2f}" for n in (bits / 8 * bench.parameters, found.bytes)]
            cells = (f"{bits:.2f}", mib[0], f"{found.bits:.2f}", mib[1], digits(found.perplexity))
            shown.add_row(f"{ratio:.0%}", str(size), *cells)
            notes = (
                f"{found.bits:.3f} bits linears, {mib[1]} MiB; the original's formula: {bits:.3f} "
                f"bits, {mib[0]} MiB"
            )
            case = f"W4A4 p={ratio:.0%} g={size}"
            rows.append(row(bench, case, found.perplexity, notes))
    console.print(shown)
    return rows


def show_curves(bench: Bench, grid: Grid, console: Console, plots: Path) -> list[dict[str, Any]]:
    """Draws perplexity over group size, without salient channels or clips: only sorting differs."""
    bare = {"salient_ratio": 0.0, "clip": False}
    curves = {
        sort: [bench.measure(sort=sort, group_size=g, **bare).perplexity for g in grid.sizes]
        for sort in grid.sorts
    }
    label = "max, in every call (original)"
    curves[label] = [bench.dynamic(sort="max", group_size=g, salient_ratio=0.0) for g in grid.sizes]
    shown = Table("sort", *map(str, grid.sizes), title=f"{bench.folder.name}, no salient channels")
    rows: list[dict[str, Any]] = []
    for sort, values in curves.items():
        shown.add_row(sort, *map(digits, values))
        for size, value in zip(grid.sizes, values, strict=True):
            rows.append(row(bench, f"W4A4 p=0 g={size} sort {sort}, no clips", value, ""))
    console.print(shown)
    draw(bench, grid.sizes, curves, plots / f"mixedquant-{bench.folder.name}.svg")
    return rows


def draw(bench: Bench, sizes: tuple[int, ...], curves: dict[str, list[float]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'lowbit[bench]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lowbit"  # the same bytes for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for sort, values in curves.items():
        axes.plot(sizes, values, "--" if "original" in sort else "-", marker=".", label=sort)
    axes.axhline(bench.float, color="gray", linewidth=0.8, label="float")
    axes.set(xscale="log", yscale="log", xlabel="group size", ylabel="perplexity")
    axes.set_xticks(sizes, map(str, sizes), minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = (f([bench.float, *sum(curves.values(), [])]) for f in (min, max))
    axes.set_yticks([float(f"{low * (high / low) ** (i / 4):.3g}") for i in range(5)])
    axes.set_title(f"{bench.folder.name}, W4A4, no salient channels", fontsize=10)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


REPAIRS: dict[str, dict[str, Any]] = {
    "plain W4A4, one scale a row": PLAIN,
    "with SmoothQuant": PLAIN | {"smooth": 0.5},
    "groups of 128": PLAIN | {"group_size": 128},
    "groups of 128, sorted": PLAIN | {"group_size": 128, "sort": "mean3std"},
    "groups of 128, SmoothQuant": PLAIN | {"group_size": 128, "smooth": 0.5},
    "groups of 128, 5 % salient": PLAIN | {"group_size": 128, "salient_ratio": 0.05},
    "groups of 128, 5 % salient, sorted, clipped": {"group_size": 128},
    "the same, salient in int8": {"group_size": 128, "salient_bits": 8},
    "the same, SmoothQuant": {"group_size": 128, "smooth": 0.5},
    "the same, GPTQ": {"group_size": 128, "rounding": "gptq"},
}


def show_repairs(benches: list[Bench], console: Console) -> list[dict[str, Any]]:
    shown = Table("W4A4", "bits", *(bench.folder.name for bench in benches), title="repairs")
    shown.add_row("float", "16", *(f"{bench.float:.3f}" for bench in benches))
    rows: list[dict[str, Any]] = []
    for name, fields in REPAIRS.items():
        found = [bench.measure(**fields) for bench in benches]
        shown.add_row(name, f"{found[0].bits:.2f}", *(digits(f.perplexity) for f in found))
        for bench, each in zip(benches, found, strict=True):
            rows.append(
                row(bench, f"W4A4 {name}", each.perplexity, f"{each.bits:.3f} bits linears")
            )
    console.print(shown)
    return rows


def digits(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}"


def row(bench: Bench, case: str, value: float, notes: str) -> dict[str, Any]:
    what = f"{bench.folder.name} | {case} | {STORIES.stem}"
    where = f"context {SEQLEN}, {bench.limit} windows, float {bench.float:.4f}"
    shown = f"{value:.4f}" if math.isfinite(value) else str(value)
    named = {"case": what, "metric": "perplexity", "value": shown, "unit": ""}
    return named | {"notes": "; ".join(filter(None, (notes, where)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="measure the whole grid")
    parser.add_argument("--model", type=Path, default=EXAMPLES / "models" / "llama-mini")
    parser.add_argument("--limit", type=int, default=12, help="windows of evaluation text")
    parser.add_argument("--plots", type=Path, default=Path(__file__).parent / "plots")
    args = parser.parse_args()
    quiet()
    grid, console, started = ALL if args.all else REDUCED, Console(width=110), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outliers = add_outliers(args.model, Path(folder) / f"{args.model.name}-outliers")
        benches = [Bench(args.model, args.limit), Bench(outliers, args.limit)]
        rows = show_table(benches[0], grid, console)
        for bench in benches:
            rows += show_curves(bench, grid, console, args.plots)
        rows += show_repairs(benches, console)
    append("mixedquant", rows)
    console.print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
