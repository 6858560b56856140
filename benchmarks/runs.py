"""What the scripts share: which models, which text, and one row for every folder measured."""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from results import append

import lowbit
from lowbit.eval import evaluate
from lowbit.methods import Method
from lowbit.models.quiet import quiet

EXAMPLES = Path(__file__).parents[1] / "examples"
STORIES = EXAMPLES / "text" / "held_back_stories.txt"
CALIBRATION = EXAMPLES / "text" / "calibration_stories.txt"
WIKITEXT = Path("text") / "wikitext2-raw" / "wiki.test.raw"
SEQLEN = 256
SAMPLES = 16
EPOCHS = 5


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders of models")
    parser.add_argument("--data", type=Path, help="a folder with WikiText-2: measured on it too")
    parser.add_argument("--limit", type=int, help="windows per text; the whole text without it")
    parser.add_argument("--only", default="", help="methods whose name matches this")
    parser.add_argument("--model", default="", help="models whose name matches this")
    return parser


def models_of(args: argparse.Namespace) -> dict[str, Path]:
    """The carried models and those below --models, by name; of equal names, by depth too."""
    quiet()
    folders = [EXAMPLES / "models", *args.models]
    found: dict[str, Path] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*/config.json"))):
        name, config = path.parent.name, path.read_bytes()
        if name in found and config != (found[name] / path.name).read_bytes():
            name = f"{name}-{json.loads(config)['num_hidden_layers']}-layers"
        found.setdefault(name, path.parent)
    return {name: model for name, model in found.items() if re.search(args.model, name)}


def calibration(samples: int = SAMPLES, seed: int = 0) -> lowbit.Calibration:
    """Stories that are in no evaluation text."""
    return lowbit.Calibration(
        sources=(str(CALIBRATION),), samples=samples, seqlen=SEQLEN, seed=seed
    )


class Rows:
    """Measures folders; each row is put into results.csv as soon as it is known."""

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        self.benchmark = benchmark
        self.args = args
        self.texts = [STORIES] + ([args.data / WIKITEXT] if args.data else [])
        self.found: list[dict[str, str]] = []

    def record(
        self, model: str, name: str, folder: Path, seconds: float = 0.0, **options: Any
    ) -> None:
        """One row per text. options: further keywords of `evaluate`."""
        [row] = evaluate(
            [folder],
            texts=self.texts,
            seqlen=SEQLEN,
            limit=self.args.limit,
            **options,
        )
        bits = row.bits_per_weight
        limit = self.args.limit
        windows = f"{max(row.windows.values())} windows" if limit else "whole text"
        notes = (
            f"{bits['linears']:.3f} bits linears, {bits['model']:.3f} bits model, "
            f"{row.size_bytes} bytes, context {row.seqlen}, {windows}, {seconds:.1f} s"
        )
        for text, value in row.perplexity.items():
            case = f"{model} | {name} | {Path(text).stem}"
            made = {"case": case, "metric": "perplexity", "value": f"{value:.4f}", "unit": ""}
            self.found.append(made | {"notes": notes})
            append(self.benchmark, self.found[-1:])
            print(f"{case}  {value:.3f}  {notes}", flush=True)

    def quantize(
        self,
        label: str,
        model: Path,
        name: str,
        method: Method,
    ) -> None:
        """Quantizes into a temporary folder and records it; not where --only leaves it out."""
        if not re.search(self.args.only, name):
            return
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            lowbit.quantize(model, folder, method, calibration())
            self.record(label, name, Path(folder), time.perf_counter() - started)
