"""How long does it take to quantize a model, and how good is the result?

    python benchmarks/quantizing.py [--models DIR ...] [--limit N] [--only NAME] [--repeat N]

Recipes as shipped, and OmniQuant with 20 epochs, quantize each model on 32 windows of 512 tokens.
Seconds are those of processor time (user and system) of the fastest of N runs, without loading
programs; perplexity is that of held-back stories.
"""

import re
import tempfile
import time
from pathlib import Path

from results import append
from runs import CALIBRATION, Rows, arguments, models_of

import lowbit
from lowbit.methods import METHODS, Method
from lowbit.models.source import SourceModel
from lowbit.recipes import load_recipe

SEQLEN = 512
WINDOWS = 32
RECIPES = (
    *("omniquant-w3a16", "omniquant-w4a16", "omniquant-w2a16", "ptq161", "matquant-842"),
    *("quip-e8p-2bit", "quip-d4-2bit", "quip-hi-4bit", "gptq-w4a16", "rtn-w4a16"),
)
LONGER = ("omniquant-w3a16", 20)  # a recipe and a number of epochs


def methods(family: str) -> dict[str, Method]:
    """Returns the methods of the recipes by name."""
    found = {}
    for name in RECIPES:
        recipe = load_recipe(name)
        found[name] = METHODS[recipe.method](**recipe.settings(family))
    name, epochs = LONGER
    found[f"{name}, {epochs} epochs"] = found[name].with_fields({"epochs": epochs})
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeat", type=int, default=1, help="runs of which the fastest counts")
    args = parser.parse_args()
    rows = Rows("quantizing", args)
    text = lowbit.Calibration(sources=(str(CALIBRATION),), samples=WINDOWS, seqlen=SEQLEN)
    for label, model in models_of(args).items():
        for name, method in methods(SourceModel(model).family.name).items():
            if not re.search(args.only, name):
                continue
            seconds = []
            for run in range(args.repeat):
                with tempfile.TemporaryDirectory() as folder:
                    started = time.process_time()
                    lowbit.quantize(model, folder, method, text, recipe=name)
                    seconds.append(time.process_time() - started)
                    if run == args.repeat - 1:
                        rows.record(label, name, Path(folder), min(seconds))
            case = {"case": f"{label} | {name}", "metric": "time", "value": f"{min(seconds):.2f}"}
            notes = f"processor time, {WINDOWS} windows of {SEQLEN}, fastest of {args.repeat}"
            append(rows.benchmark, [{**case, "unit": "s", "notes": notes}])
            print(f"{label} | {name}  {min(seconds):.2f} s", flush=True)


if __name__ == "__main__":
    main()
