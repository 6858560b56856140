"""What does each method cost in perplexity, at which real bits?

    python benchmarks/perplexity.py [--models DIR ...] [--data DIR] [--limit N] [--only NAME]

Every model folder below the given directories (and the carried models) is quantized with rtn, GPTQ
and OmniQuant at 4, 3 and 2 bits, per channel and in groups of 128 and 64, and with every codebook
of QuIP# (E8P12 also trained after rounding), and measured on held-back stories and, with --data, on
WikiText-2's test text. OmniQuant has the paper's learning rates and starts from searched scales and
clips (`init: awq`); LET is learned where the original scripts do so (OPT). Calibration is on
stories that are in no evaluation text.
"""

import argparse
import tempfile
import time
from pathlib import Path

from results import append
from rich.console import Console
from rich.table import Table

import lowbit
from lowbit.eval import EvalOptions, evaluate
from lowbit.methods import GPTQ, RTN, Method, OmniQuant, QuIP
from lowbit.models import family_name
from lowbit.models.quiet import quiet

EXAMPLES = Path(__file__).parents[1] / "examples"
STORIES = EXAMPLES / "text" / "held_back_stories.txt"
CALIBRATION = EXAMPLES / "text" / "calibration_stories.txt"
WIKITEXT = Path("text") / "wikitext2-raw" / "wiki.test.raw"
CODEBOOKS = ("E8P12", "D4", "HI", "E8P12RVQ3B", "E8P12RVQ4B")
GRIDS = [(bits, size) for bits in (4, 3, 2) for size in (None, 128, 64)]
SEQLEN = 256
SAMPLES = 16
EPOCHS = 5


def methods_for(bits: int, group_size: int | None, family: str) -> dict[str, Method]:
    grid = {"bits": bits, "group_size": group_size}
    learned = OmniQuant(**grid, let=family == "opt", init="awq", epochs=EPOCHS)
    both = learned.model_copy(update={"rounding": "gptq"})
    methods = {
        "rtn": RTN(**grid),
        "gptq": GPTQ(**grid),
        "omniquant": learned,
        "omniquant+gptq": both,
    }
    name = f"W{bits}" + (f" g{group_size}" if group_size else "")
    return {f"{method} {name}": settings for method, settings in methods.items()}


def all_methods(family: str) -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for bits, group_size in GRIDS:
        methods |= methods_for(bits, group_size, family)
    for codebook in CODEBOOKS:
        methods[f"quip {codebook}"] = QuIP(codebook=codebook)
    methods["quip+tuning E8P12"] = QuIP(finetune_epochs=EPOCHS)
    return methods


def measure(model: Path, texts: list[Path], limit: int | None, only: str) -> list[dict[str, str]]:
    """The rows of one model, each put into results.csv as soon as it is known."""
    options = EvalOptions(texts=tuple(map(str, texts)), seqlen=SEQLEN, limit=limit)
    calibration = lowbit.Calibration(sources=(str(CALIBRATION),), samples=SAMPLES, seqlen=SEQLEN)
    rows: list[dict[str, str]] = []

    def record(name: str, folder: Path, seconds: float) -> None:
        [found] = evaluate([folder], options)
        bits = found.bits_per_weight
        windows = f"{max(found.windows.values())} windows" if limit else "whole text"
        notes = (
            f"{bits['linears']:.3f} bits linears, {bits['model']:.3f} bits model, "
            f"{found.size_bytes} bytes, context {found.seqlen}, {windows}, {seconds:.1f} s"
        )
        for text, value in found.perplexity.items():
            case = f"{model.name} | {name} | {Path(text).stem}"
            row = {"case": case, "metric": "perplexity", "value": f"{value:.4f}", "unit": ""}
            rows.append(row | {"notes": notes})
            append("perplexity", rows[-1:])

    record("float", model, 0.0)
    for name, method in all_methods(family_name(model)).items():
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            lowbit.quantize(model, folder, method, calibration)
            record(name, Path(folder), time.perf_counter() - started)
            print(rows[-1]["case"], rows[-1]["value"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, help="windows per text; the whole text without it")
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--model", default="", help="models whose name contains this")
    args = parser.parse_args()
    quiet()
    folders = [EXAMPLES / "models", *args.models]
    models = [path.parent for folder in folders for path in sorted(folder.glob("*/config.json"))]
    models = list({model.name: model for model in models if args.model in model.name}.values())
    texts = [STORIES] + ([args.data / WIKITEXT] if args.data else [])
    table = Table("case", "perplexity", "notes")
    for model in models:
        rows = measure(model, texts, args.limit, args.only)
        for row in rows:
            table.add_row(row["case"], row["value"], row["notes"])
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
