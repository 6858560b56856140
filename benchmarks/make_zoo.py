"""Makes the zoo of the repository: what methods learn of the carried models.

    python benchmarks/make_zoo.py [--root DIR] [--only NAME]

Each entry is learned on 16 windows of stories with the published settings (recipes `*-paper`; of
MatQuant's 40 epochs 5), measured on 64 windows of held-back stories, added to DIR/zoo, and replayed
once.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

from runs import EXAMPLES, SEQLEN, STORIES, calibration

import lowbit
from lowbit.cli.options import choose_method
from lowbit.eval import evaluate
from lowbit.models.quiet import quiet
from lowbit.zoo import Measured

RECIPES = {
    "llama-mini-omniquant-w3a16-g128": "omniquant-w3a16-g128-paper",
    "llama-mini-matquant-842": "matquant-842-paper",  # with fewer epochs, see CHANGED
    "llama-mini-ptq161": "ptq161-paper",
    "opt-mini-omniquant-w3a16-g128": "omniquant-w3a16-g128-paper",
}
CHANGED = {"matquant-842-paper": {"epochs": 5}}
WINDOWS = 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=EXAMPLES.parent, help="folder of the zoo")
    parser.add_argument("--only", default="", help="regular expression for names of entries")
    return parser.parse_args()


def perplexity(folder: Path) -> float:
    [found] = evaluate(folder, texts=[STORIES], seqlen=SEQLEN, limit=WINDOWS)
    return next(iter(found.perplexity.values()))


def make(name: str, recipe: str, root: Path, place: Path) -> None:
    """Learns, measures, adds and replays one entry. place: a folder for what is left over."""
    model = EXAMPLES / "models" / "-".join(name.split("-")[:2])
    method, _, label = choose_method(model, recipe, None, CHANGED.get(recipe, {}))
    started = time.perf_counter()
    out = lowbit.quantize(
        model, place / name, method, calibration(), recipe=label, device="cpu", self_check=False
    )
    seconds = time.perf_counter() - started
    measured = Measured(
        text=STORIES.name,
        seqlen=SEQLEN,
        windows=WINDOWS,
        perplexity=round(perplexity(out), 4),
        float_perplexity=round(perplexity(model), 4),
    )
    entry = lowbit.zoo.add(out, model, name, root, measured=[measured])
    again = lowbit.zoo.replay(name, model, place / f"{name}-again", root)
    print(
        f"{name}: {seconds:.0f} s, perplexity {measured.perplexity:.2f}, {entry.bytes():,} bytes, "
        f"{'the same bytes' if again.same_bytes else 'the same integers'} when replayed",
        flush=True,
    )


def main() -> None:
    args = parse()
    quiet()
    with tempfile.TemporaryDirectory() as place:
        for name, recipe in RECIPES.items():
            if re.search(args.only, name):
                make(name, recipe, args.root, Path(place))


if __name__ == "__main__":
    main()
