"""Which causal language models of transformers does lowbit quantize?

    python benchmarks/families.py [MODEL_TYPE ...] [--markdown FILE]

For each architecture in transformers' mapping it builds a small random model and does what
tests/families.py describes: streamed logits equal whole ones, round to nearest at 8 and 4 bits,
load, equal logits with plain from_pretrained, and generation of eight tokens. It prints for each
whether it works, is refused (with the reason), or fails in another way, and then the three counts.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from rich.console import Console

from lowbit.models.quiet import quiet

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import families  # noqa: E402 (from the folder of tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; none: all causal language models")
    parser.add_argument("--markdown", type=Path, help="a file to write the table to")
    given = parser.parse_args()
    quiet()
    console = Console(soft_wrap=True, highlight=False)
    counts: Counter[str] = Counter()
    rows = []
    for name in given.types or families.causal_types():
        with TemporaryDirectory() as folder:
            outcome = families.outcome(name, Path(folder))
        result = "works" if outcome.works else "refused" if outcome.refused else "unknown"
        counts[result] += 1
        reason = " ".join(outcome.reason.split()).replace(folder, "MODEL")
        said = f"{outcome.step}: {reason}" if outcome.step else ""
        console.print(f"{name:24} {result:8} {said}", markup=False)
        rows.append(f"| {name} | {result} | {said.replace('|', '/')} |")
    total = ", ".join(f"{counts[result]} {result}" for result in ("works", "refused", "unknown"))
    console.print(f"{total} (transformers {transformers.__version__})")
    if given.markdown is not None:
        head = [f"{total}, with transformers {transformers.__version__}.", ""]
        table = ["| model type | result | reason |", "| --- | --- | --- |", *rows]
        given.markdown.write_text("\n".join([*head, *table, ""]))


if __name__ == "__main__":
    main()
