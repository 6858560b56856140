"""What does a large model lose, and what have others published for it?

    python benchmarks/large.py MODEL --out DIR [--recipes NAME ...] [--context 4096] [--tune]
        [--device auto] [--text wikitext2] [--limit N]

For whoever has such a model, and a GPU: nothing of it was run by us on models of this size. MODEL
is a folder or a hub id. It is quantized with each recipe, with the recipe's calibration text, and
measured on the test text of WikiText-2; --tune also tunes every result by KL and measures it again.
The folders stay in DIR, so that an interrupted run goes on. The table ends with the numbers that
were published for the model, with the context that they were measured with; numbers of different
contexts cannot be compared.
"""

import argparse
import re
import time
from pathlib import Path

from results import append
from rich.console import Console
from rich.table import Table

import lowbit
from lowbit.eval import Evaluation, evaluate
from lowbit.methods import METHODS
from lowbit.models import family_name
from lowbit.models.locate import locate
from lowbit.recipes import load_recipe

RECIPES = ("trellis-2bit", "trellis-3bit", "trellis-4bit", "trellis-1.5bit", "gptq-w4a16-g128")
# By a pattern of the model's name: context, bits, perplexity on WikiText-2, and whose number it is.
PUBLISHED = {
    r"llama-2-7b": (
        (4096, "16", 5.12, "float"),
        (4096, "4", 5.16, "QTIP with GuidedQuant, not trained"),
        (4096, "4", 5.19, "QuIP#, tuned"),
        (4096, "3", 5.28, "QTIP with GuidedQuant, not trained"),
        (4096, "3", 5.41, "QuIP#, tuned"),
        (4096, "2", 5.84, "AQLM with PV-Tuning"),
        (4096, "2", 5.86, "QTIP, tuned"),
        (4096, "2", 6.11, "QTIP with GuidedQuant, not trained"),
        (4096, "2", 6.82, "QTIP, not trained"),
        (2048, "16", 5.47, "float"),
        (2048, "3, g128", 5.81, "EfficientQAT, trained"),
        (2048, "2, g64", 6.86, "EfficientQAT, trained"),
        (2048, "1.5", 7.08, "NanoQuant"),
        (2048, "1", 8.85, "NanoQuant"),
        (2048, "1.61", 12.70, "PTQ1.61"),
    ),
    r"(meta-)?llama-3-8b": (
        (8192, "16", 5.54, "float"),
        (8192, "4", 5.67, "QTIP, tuned"),
        (8192, "3", 6.01, "QTIP, tuned"),
        (8192, "2", 7.33, "QTIP, tuned"),
    ),
}


class Bench:
    """The model, and the table and rows of what is measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = locate(args.model)
        self.name = Path(args.model).name
        self.table = Table("model", "bits", "whole model", "perplexity", "KL", "minutes")

    def measured(self, name: str, folder: Path, minutes: float) -> None:
        """Measures a folder, and adds a row to the table and to results.csv."""
        reference = None if folder == self.model else self.model
        (found,) = evaluate(
            [folder],
            texts=[self.args.text],
            seqlen=self.args.context,
            limit=self.args.limit,
            reference=reference,
            device_map="auto",
        )
        self._add(name, found, minutes)

    def _add(self, name: str, found: Evaluation, minutes: float) -> None:
        bits = found.bits_per_weight
        (perplexity,) = found.perplexity.values()
        kl = "".join(f"{divergence.kl:.4f}" for divergence in found.divergence.values())
        sizes = (f"{bits['linears']:.3f}", f"{bits['model']:.3f}")
        self.table.add_row(name, *sizes, f"{perplexity:.3f}", kl, f"{minutes:.0f}")
        notes = (
            f"{sizes[0]} bits linears, {sizes[1]} bits model, context {found.seqlen}, "
            f"{max(found.windows.values())} windows, {minutes:.1f} min"
        )
        case = f"{self.name} | {name} | {Path(self.args.text).stem}"
        row = {"case": case, "metric": "perplexity", "value": f"{perplexity:.4f}", "unit": ""}
        append("large", [row | {"notes": notes}])

    def quantize(self, name: str) -> None:
        """Quantizes with a recipe, and tunes the result if --tune is given."""
        recipe, label = load_recipe(name), Path(name).stem
        out = self.args.out / label
        settings = recipe.settings(family_name(self.model))
        given = recipe.calibration.model_dump(exclude_none=True)
        started = time.perf_counter()
        lowbit.quantize(
            self.model,
            out,
            METHODS[recipe.method](**settings),
            lowbit.Calibration(**given),
            device=self.args.device,
            recipe=name,
        )
        self.measured(label, out, (time.perf_counter() - started) / 60)
        if self.args.tune:
            started, tuned = time.perf_counter(), self.args.out / f"{label}-tuned"
            lowbit.tune(out, tuned, self.model, lowbit.Calibration(**given))
            self.measured(f"{label}, tuned", tuned, (time.perf_counter() - started) / 60)

    def show(self) -> None:
        for pattern, rows in PUBLISHED.items():
            if re.search(pattern, self.name, re.IGNORECASE):
                for context, bits, perplexity, whose in rows:
                    what = f"published, context {context}: {whose}"
                    self.table.add_row(what, bits, "", f"{perplexity:.2f}", "", "")
        Console().print(self.table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="where the folders are written")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--context", type=int, default=4096, help="tokens in a window")
    parser.add_argument("--text", default="wikitext2", help="a data set or a text file")
    parser.add_argument("--limit", type=int, help="windows that are measured; default: all")
    parser.add_argument("--device", default="auto", help="where blocks are quantized")
    parser.add_argument("--tune", action="store_true", help="tune every result by KL too")
    bench = Bench(parser.parse_args())
    bench.measured("float", bench.model, 0)
    for name in bench.args.recipes:
        bench.quantize(name)
    bench.show()


if __name__ == "__main__":
    main()
