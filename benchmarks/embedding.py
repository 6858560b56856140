"""What does it cost to quantize the table of embeddings and the output layer too?

    python benchmarks/embedding.py [--models DIR ...] [--limit N] [--only NAME] [--model NAME]

`fast-4bit` quantizes each model with both in float, and with both in 8, 6 and 4 bits. Perplexity
and KL divergence from the float model are measured on held-back stories. The models' tables have a
larger share of the weights than those of large models.
"""

import re
import tempfile
from pathlib import Path

from runs import Rows, arguments, calibration, models_of

import lowbit
from lowbit.methods import METHODS
from lowbit.models.source import SourceModel
from lowbit.recipes import load_recipe

RECIPE = "fast-4bit"
SAMPLES = 64
BITS = (None, 8, 6, 4)


def main() -> None:
    args = arguments(__doc__).parse_args()
    rows = Rows("embedding", args)
    recipe = load_recipe(RECIPE)
    for label, model in models_of(args).items():
        method = METHODS[recipe.method](**recipe.settings(SourceModel(model).family.name))
        for bits in BITS:
            name = f"{RECIPE}, table and output layer in {f'{bits} bits' if bits else 'float'}"
            if re.search(args.only, name):
                with tempfile.TemporaryDirectory() as folder:
                    text = calibration(SAMPLES)
                    both = {"embedding_bits": bits, "lm_head_bits": bits} if bits else {}
                    lowbit.quantize(model, folder, method, text, recipe=RECIPE, **both)
                    rows.record(label, name, Path(folder), reference=model)


if __name__ == "__main__":
    main()
