"""Quantizes a model to 4, 2 and 1.5 bits, and shows what that costs and what it gives.

    python examples/demo.py [--model DIR] [--text FILE] [--calibration FILE] [--out demo-out]

A table has the float model and three recipes side by side: bits, size, perplexity, speed and the
seconds that quantizing took. A story from each model follows, and a GGUF file of the 4-bit model.
Without arguments it takes a small trained Llama that the repository carries.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Idle threads sleep instead of spin, which on a busy machine makes this ten times faster. OpenMP
# reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.console import Console
from rich.table import Table

import lowbit
from lowbit.bench.measure import token_seconds
from lowbit.kernels.native import why_not
from lowbit.methods import METHODS, Method
from lowbit.models import family_name
from lowbit.models.locate import locate
from lowbit.models.quiet import quiet
from lowbit.recipes import load_recipe

HERE = Path(__file__).parent
ENGINES = HERE.parent / ".venv-engines" / "bin" / "python"  # of make test-engines
RECIPES = ("fast-4bit", "best-2bit", "best-1.5bit")
PROMPT = "Once upon a time there was a little fox who"
SEQLEN = 256
LONG = 48  # tokens of a story
# Without compiled kernels, trellis codes of this model take half an hour.
WITHOUT_KERNELS = {"best-2bit": "quip-e8p-2bit", "best-1.5bit": "ptq161-fast"}
ROUNDS, TOKENS = 4, 24  # in which speed is measured, and tokens of a round
# llama.cpp, which runs apart because it writes a log; prints how it goes on as JSON.
LLAMA_CPP = """
import json, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = sys.argv[1], 256, 1
parameters.warmup = False
asked = {"prompt": sys.argv[2], "n_predict": int(sys.argv[3]), "temperature": 0.0}
print(json.dumps(xllamacpp.Server(parameters).handle_completions(asked)["choices"][0]["text"]))
"""


@dataclass
class Row:
    """What is shown of one model.

    linears, model: real bits per weight of the quantized linears, and of the whole model.
    bytes: size of the weight files.
    speed: tokens a second of generation, on the CPU.
    ratio: speed in relation to that of the float model, measured in turns.
    seconds: how long quantizing took; None for the float model.
    """

    name: str
    linears: float
    model: float
    bytes: int
    perplexity: float
    speed: float
    ratio: float
    seconds: float | None
    story: str


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, text = parser.add_argument, HERE / "text"
    add("--model", default=str(HERE / "models" / "llama-mini"), help="folder or hub id of a model")
    add("--text", default=str(text / "held_back_stories.txt"), help="text for perplexity")
    add("--calibration", default=str(text / "calibration_stories.txt"), help="text to calibrate on")
    add("--recipes", nargs="+", default=list(RECIPES), help="names of recipes")
    add("--samples", type=int, default=16, help="windows of calibration text")
    add("--windows", type=int, default=64, help="windows of text for perplexity")
    add("--prompt", default=PROMPT, help="beginning of the stories")
    add("--out", type=Path, default=Path("demo-out"), help="folder to write, emptied first")
    return parser.parse_args()


def method_of(recipe: str, model: Path) -> Method:
    loaded = load_recipe(recipe)
    return METHODS[loaded.method](**loaded.settings(family_name(model)))


def quantized(recipe: str, model: Path, args: argparse.Namespace) -> tuple[Path, float]:
    """Quantizes a model; returns the folder and the seconds that it took."""
    text = lowbit.Calibration(sources=(args.calibration,), samples=args.samples, seqlen=SEQLEN)
    started = time.perf_counter()
    folder = lowbit.quantize(
        model, args.out / recipe, method_of(recipe, model), text, recipe=recipe, device="cpu"
    )
    return folder, time.perf_counter() - started


def measured(
    name: str, folder: Path, base: Path, seconds: float | None, args: argparse.Namespace
) -> Row:
    """Returns the row of a model. base: the folder of the float model"""
    [found] = lowbit.evaluate(
        folder, texts=[args.text], seqlen=SEQLEN, limit=args.windows, device_map="cpu"
    )
    model, tokenizer = lowbit.load(folder)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=LONG, do_sample=False)
    reference, _ = (model, None) if folder == base else lowbit.load(base)
    ids, ours, theirs = inputs["input_ids"][0].tolist(), list[float](), list[float]()
    for _ in range(ROUNDS):  # in turns, so that both meet the same load; the best pass counts
        ours += token_seconds(model, TOKENS, ids)
        theirs += token_seconds(reference, TOKENS, ids)
    return Row(
        name=name,
        linears=found.bits_per_weight["linears"],
        model=found.bits_per_weight["model"],
        bytes=found.size_bytes,
        perplexity=next(iter(found.perplexity.values())),
        speed=1 / min(ours),
        ratio=1.0 if folder == base else min(theirs) / min(ours),
        seconds=seconds,
        story=tokenizer.decode(out[0], skip_special_tokens=True),
    )


def table(rows: list[Row]) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("model")
    for heading in ("bits", "whole", "MB", "perplexity", "", "tok/s", "× float", "seconds"):
        shown.add_column(heading, justify="right", no_wrap=True)
    base = rows[0].perplexity
    for row in rows:
        shown.add_row(
            row.name,
            f"{row.linears:.2f}",
            f"{row.model:.2f}",
            f"{row.bytes / 1e6:.2f}",
            f"{row.perplexity:.2f}",
            "" if row is rows[0] else f"{100 * (row.perplexity / base - 1):+.1f} %",
            f"{row.speed:.0f}",
            f"{row.ratio:.2f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
    return shown


@contextmanager
def step(console: Console, text: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    started = time.perf_counter()
    console.print(f"{text} ...", end="", highlight=False)
    yield
    console.print(f" {time.perf_counter() - started:.0f} s", highlight=False)


def export(console: Console, folder: Path, args: argparse.Namespace) -> None:
    """Exports a folder for llama.cpp, and lets llama.cpp go on with the prompt if it is there."""
    if find_spec("gguf") is None:
        console.print("no GGUF file: it needs the package gguf (pip install 'lowbit[gguf]')")
        return
    dest = args.out / f"{folder.name}-gguf"
    try:
        lowbit.export(folder, dest, "gguf", allow_lossy=True)
    except ValueError as error:  # an architecture that llama.cpp does not know, for example
        console.print(f"no GGUF file: {error}", highlight=False, soft_wrap=True)
        return
    [file] = dest.glob("*.gguf")
    size = file.stat().st_size / 1e6
    console.print(f"\n[bold]{file}[/bold], {size:.2f} MB: {folder.name} for llama.cpp")
    python = sys.executable if find_spec("xllamacpp") else str(ENGINES)
    if not Path(python).exists():
        console.print("llama.cpp is not installed here (pip install xllamacpp), so nobody read it")
        return
    command = [python, "-c", LLAMA_CPP, str(file), args.prompt, str(LONG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        console.print(f"llama.cpp cannot read it: {reason}", highlight=False)
        return
    console.print(f"llama.cpp reads it, and writes:\n{args.prompt}{json.loads(done.stdout)}")


def main() -> None:
    args = parse()
    quiet()
    console = Console(soft_wrap=True, emoji=False)
    started, model = time.perf_counter(), locate(args.model)
    reason = why_not()
    if reason is not None:
        args.recipes = [WITHOUT_KERNELS.get(recipe, recipe) for recipe in args.recipes]
        console.print(
            f"{reason}. Without compiled kernels all of this is slower, and trellis codes much "
            "slower: quip-e8p-2bit stands for best-2bit here, and ptq161-fast for best-1.5bit.",
            highlight=False,
        )
    shutil.rmtree(args.out, ignore_errors=True)
    with step(console, "float: measuring"):
        rows = [measured("float", model, model, None, args)]
    folders = []
    for recipe in args.recipes:
        with step(console, f"{recipe}: quantizing, measuring"):
            folder, seconds = quantized(recipe, model, args)
            folders.append(folder)
            rows.append(measured(recipe, folder, model, seconds, args))
    for row in rows:
        console.print(f"\n[bold]{row.name}[/bold]\n{row.story}", highlight=False)
    console.print()
    console.print(table(rows))
    console.print(
        "\nbits: per weight of the quantized linears, scales included. whole: per parameter of the "
        "whole model. MB: of all weights on disk, from which both are counted. perplexity: of "
        f"{args.windows} windows of {SEQLEN} tokens of {Path(args.text).name}. tok/s: tokens a "
        f"second on the CPU, the best of {ROUNDS * TOKENS}; × float: in relation to the float "
        "model, in turns with it. The small model fits a processor's cache, so that fewer bits "
        "gain it less than a large one. seconds: of quantizing.",
        highlight=False,
    )
    export(console, folders[0], args)
    took = time.perf_counter() - started
    console.print(
        f"\nAll of it took {took:.0f} s. The same for a model of yours, with a text of yours:\n"
        "  python examples/demo.py --model MODEL --text FILE --calibration FILE\n"
        "or one recipe, and then a chat:\n"
        "  lowbit quantize MODEL out --recipe best-2bit && lowbit chat out",
        highlight=False,
    )


if __name__ == "__main__":
    main()
