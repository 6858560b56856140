"""What does it gain to weigh the outputs of linears by the gradients of the model's loss?

    python benchmarks/output_feedback.py [--models DIR ...] [--limit N] [--only NAME]

Each method quantizes each model with and without `output_feedback`; everything else is as shipped.
Perplexity and KL divergence from the float model are measured on held-back stories. The seconds are
those of all threads of the run, with one thread those of a core.
"""

import re
import tempfile
import time
from pathlib import Path

from runs import Rows, arguments, calibration, models_of

import lowbit
from lowbit.methods import GPTQ, Method, QuIP, Trellis

SAMPLES = 64  # four times the usual: a Hessian of outputs is as large as one of inputs


def methods(output_feedback: bool) -> dict[str, Method]:
    on = {"output_feedback": output_feedback}
    return {
        "gptq W2 g64": GPTQ(bits=2, group_size=64, **on),
        "gptq W3 g128": GPTQ(bits=3, group_size=128, **on),
        "trellis 2 bits": Trellis(rate=2, **on),
        "quip E8P12": QuIP(**on),
        "trellis 1.5 bits": Trellis(rate=1.5, **on),
        "trellis 3 bits": Trellis(rate=3, **on),
        "trellis 4 bits": Trellis(rate=4, **on),
        "gptq W4 g128": GPTQ(bits=4, group_size=128, **on),
        "trellis 2 bits, own output": Trellis(rate=2, match="self", **on),
    }


def main() -> None:
    args = arguments(__doc__).parse_args()
    rows = Rows("output_feedback", args)
    for label, model in models_of(args).items():
        for name in methods(True):
            if not re.search(args.only, name):
                continue
            for on in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    started = time.process_time()
                    method = methods(on)[name]
                    lowbit.quantize(model, folder, method, calibration(SAMPLES))
                    seconds = time.process_time() - started
                    case = f"{name}{', output feedback' if on else ''}"
                    rows.record(label, case, Path(folder), seconds, reference=model)


if __name__ == "__main__":
    main()
