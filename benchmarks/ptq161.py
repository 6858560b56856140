"""What does each part of PTQ1.61 contribute, below two bits?

    python benchmarks/ptq161.py [--models DIR ...] [--limit N] [--only NAME]

It measures signs alone, with the mask of salient channels, and with learned or fitted scales. They
are compared with rtn, OmniQuant and QuIP# at 2 bits, with the same calibration windows. The model
after preprocessing has rows of its own, since that is low-rank training and not calibration.
"""

import re
import tempfile
import time
from pathlib import Path

from runs import CALIBRATION, EPOCHS, SEQLEN, Rows, arguments, calibration, models_of

from lowbit.methods import PTQ161, RTN, Method, OmniQuant, QuIP
from lowbit.models import family_name
from lowbit.preprocess import LoRA, preprocess

STEPS = 100  # with 4 windows each: 102,400 tokens
LEARNED = PTQ161(epochs=EPOCHS, init="als")


def cases(family: str) -> dict[str, Method]:
    """Returns the methods to measure, by name."""
    return {
        "rtn W2 g64": RTN(bits=2, group_size=64),
        "omniquant W2 g64": OmniQuant(
            bits=2,
            group_size=64,
            let=family == "opt",
            epochs=EPOCHS,
            rounding="nearest",
            fine_zeros=False,
        ),
        "quip E8P12": QuIP(),
        "signs": PTQ161(salient_ratio=0, epochs=0, init="reference"),
        "mask": PTQ161(epochs=0, init="reference"),
        "mask + als": PTQ161(epochs=0, init="als"),
        "mask + als + refit": PTQ161(epochs=0, init="als", refit_salient=True),
        "mask + learned": PTQ161(epochs=EPOCHS, init="reference"),
        "mask + als + learned": LEARNED,
        "mask + als + refit + learned": LEARNED.model_copy(update={"refit_salient": True}),
    }


def restored(model: Path, out: Path) -> Path:
    """Preprocesses the model with a first pass of PTQ1.61, and returns `out`."""
    lora = LoRA(
        sources=(str(CALIBRATION),),
        seqlen=SEQLEN,
        steps=STEPS,
        batch=4,
        accumulate=1,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        held_out=2,  # the calibration text has 102,912 tokens in tinystories' vocabulary
    )
    return preprocess(model, out, LEARNED, lora, calibration())


def main() -> None:
    args = arguments(__doc__).parse_args()
    rows = Rows("ptq161", args)
    for label, model in models_of(args).items():
        rows.record(label, "float", model)
        for name, method in cases(family_name(model)).items():
            rows.quantize(label, model, name, method)
        if not re.search(args.only, "after LoRA"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            moved = restored(model, Path(folder) / "moved")
            rows.record(label, "after LoRA: float", moved, time.perf_counter() - started)
            rows.quantize(label, moved, "after LoRA: mask + als + learned", LEARNED)


if __name__ == "__main__":
    main()
