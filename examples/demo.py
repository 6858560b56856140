"""Quantizes an example model, evaluates the result, and continues a story with it.

    python examples/demo.py [--model DIR] [--bits 4 3 2] [--out demo-out]

A small trained Llama is quantized with round-to-nearest and with OmniQuant at several widths. The
script prints the stories and a table of sizes and perplexities.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import lowbit
from lowbit.eval import Evaluation, evaluate
from lowbit.methods import RTN, Method, OmniQuant
from lowbit.models.quiet import quiet

HERE = Path(__file__).parent
STORIES = HERE / "text" / "held_back_stories.txt"
CALIBRATION = HERE / "text" / "calibration_stories.txt"
PROMPT = "Once upon a time there was a little fox who"
GROUP_SIZE = 64
SEQLEN = 256


def methods_for(bits: int, epochs: int) -> dict[str, Method]:
    """Returns two methods at one width; OmniQuant starts from searched clips: few epochs do."""
    grid = {"bits": bits, "group_size": GROUP_SIZE}
    learned = OmniQuant(**grid, init="awq", epochs=epochs)
    return {f"rtn W{bits} g{GROUP_SIZE}": RTN(**grid), f"omniquant W{bits} g{GROUP_SIZE}": learned}


def continue_story(folder: Path, prompt: str, tokens: int = 48) -> str:
    """Returns a prompt with its continuation; it is greedy, so that models can be compared."""
    model, tokenizer = lowbit.load(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def row(name: str, found: Evaluation, float_perplexity: float, seconds: float | None) -> list[str]:
    value = next(iter(found.perplexity.values()))
    return [
        name,
        f"{found.bits_per_weight['linears']:.2f}",
        f"{found.bits_per_weight['model']:.2f}",
        f"{found.size_bytes / 1e6:.2f} MB",
        f"{value:.2f}",
        f"{100 * (value / float_perplexity - 1):+.1f} %",
        "" if seconds is None else f"{seconds:.1f}",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, default=HERE / "models" / "llama-mini", help="folder of a model"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="bits of weights")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of OmniQuant")
    parser.add_argument("--windows", type=int, default=96, help="windows of text to evaluate on")
    return parser.parse_args()


def main() -> None:
    args = parse()
    quiet()
    console = Console()
    calibration = lowbit.Calibration(
        sources=(str(CALIBRATION),), samples=args.samples, seqlen=SEQLEN
    )
    shutil.rmtree(args.out, ignore_errors=True)
    table = Table("method", "bits", "model", "on disk", "perplexity", "", "seconds")
    stories: dict[str, str] = {}

    def report(name: str, folder: Path, seconds: float | None, base: float | None) -> float:
        [found] = evaluate([folder], texts=[STORIES], seqlen=SEQLEN, limit=args.windows)
        value = next(iter(found.perplexity.values()))
        table.add_row(*row(name, found, base or value, seconds))
        stories[name] = continue_story(folder, PROMPT)
        console.print(f"{name}: perplexity {value:.2f}")
        return value

    base = report("float16", args.model, None, None)
    for bits in args.bits:
        for name, method in methods_for(bits, args.epochs).items():
            started = time.perf_counter()
            folder = args.out / name.replace(" ", "-")
            lowbit.quantize(args.model, folder, method, calibration)
            report(name, folder, time.perf_counter() - started, base)
    show(console, table, stories, args)


def show(console: Console, table: Table, stories: dict[str, Any], args: argparse.Namespace) -> None:
    for name, story in stories.items():
        console.print(f"\n[bold]{name}[/bold]\n{story}", highlight=False)
    console.print()
    console.print(table)
    console.print(
        "bits: bits per weight of the quantized linears; model: bits per parameter of the whole "
        f"model; both from the bytes on disk. Perplexity is measured on {args.windows} windows of "
        f"{SEQLEN} tokens of {STORIES.name}. The models are in {args.out}/.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
