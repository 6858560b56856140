"""What does it gain to tune the vectors of a quantized model, and how many bits do signs take?

    python benchmarks/tune.py [--models DIR ...] [--limit N] [--only NAME]

Each model is quantized at 2 and 3 bits as shipped, and tuned on stories of the same file. Both are
measured on held-back stories: perplexity, KL divergence from the float model, real bits.
"""

import re
import tempfile
import time
from pathlib import Path

from runs import CALIBRATION, SEQLEN, Rows, arguments, calibration, models_of

import lowbit
from lowbit.methods import GPTQ, PTQ161, MatQuant, Method, QuIP
from lowbit.tuning import Tuned

WINDOWS = 96  # of SEQLEN tokens, of which an eighth is held out
STEPS = 60
WIDTHS = (3, 2)  # of the slices of a MatQuant folder
METHODS: dict[str, Method] = {
    "gptq W2": GPTQ(bits=2),
    "gptq W3": GPTQ(bits=3),
    "quip E8P12": QuIP(),
    "quip E8P12RVQ3B": QuIP(codebook="E8P12RVQ3B"),
    "ptq161, no training": PTQ161(epochs=0),
    "matquant": MatQuant(epochs=0),
}


def tuned(folder: Path, model: Path, out: Path) -> Tuned:
    """Tunes a folder on the stories that its calibration windows are drawn from."""
    text = lowbit.Calibration(sources=(str(CALIBRATION),), samples=WINDOWS, seqlen=SEQLEN)
    return lowbit.tune(folder, out, model, text, steps=STEPS)


def main() -> None:
    args = arguments(__doc__).parse_args()
    rows = Rows("tune", args)
    for label, model in models_of(args).items():
        for name, method in METHODS.items():
            if not re.search(args.only, name):
                continue
            options = {"bits": WIDTHS} if isinstance(method, MatQuant) else {}
            with tempfile.TemporaryDirectory() as place:
                before, after = Path(place) / "before", Path(place) / "after"
                started = time.perf_counter()
                lowbit.quantize(model, before, method, calibration())
                seconds = time.perf_counter() - started
                rows.record(label, name, before, seconds, reference=model, **options)
                started = time.perf_counter()
                done = tuned(before, model, after)
                seconds = time.perf_counter() - started
                suffix = "tuned" if done.better else "tuned (no gain on held-out windows: a copy)"
                rows.record(label, f"{name}, {suffix}", after, seconds, reference=model, **options)


if __name__ == "__main__":
    main()
