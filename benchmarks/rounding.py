"""How good are learned codes on plain grids, beside AutoRound, and how long do they take?

    python benchmarks/rounding.py [--models DIR ...] [--limit N] [--only NAME] [--peer]

GPTQ and learned rounding quantize each model at 2 bits in groups of 64, and at 3 and 4 bits in
groups of 128, with integer zero points. "learned" is what the recipes learned-* do; other rows
start from other codes, or learn for other numbers of epochs. With --peer, AutoRound quantizes too:
200 iterations, asymmetric, on the same windows of calibration text. It is installed into
build/engines, and writes GPTQ's layout, which is converted exactly, so that one program measures
all of them on held-back stories.
Seconds are those of processor time, without loading programs and models.
"""

import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

from engines.run import Engine, installed
from runs import CALIBRATION, Rows, arguments, models_of

import lowbit
from lowbit.calibration import token_windows
from lowbit.methods import GPTQ, Method, OmniQuant
from lowbit.models.tokenizer import load_tokenizer

SEQLEN = 512
WINDOWS = 32
ITERATIONS = 200  # AutoRound's default
GRIDS = {"W2 g64": (2, 64), "W3 g128": (3, 128), "W4 g128": (4, 128)}
PEER = Engine(("torch", "auto-round"), ())
AUTO_ROUND = """
import json, sys, time
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
source, windows, dest, bits, size, iterations = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
rows = torch.tensor(json.load(open(windows)))
texts = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
started = time.process_time()
AutoRound(
    model, tokenizer, bits=int(bits), group_size=int(size), sym=False, iters=int(iterations),
    nsamples=len(rows), seqlen=rows.shape[1], device_map="cpu", amp=False,
    dataset=torch.utils.data.DataLoader(texts, batch_size=1),
).quantize_and_save(dest, format="auto_gptq")
print(json.dumps({"seconds": time.process_time() - started}))
"""


def calibration() -> lowbit.Calibration:
    return lowbit.Calibration(sources=(str(CALIBRATION),), samples=WINDOWS, seqlen=SEQLEN)


def methods(bits: int, group_size: int) -> dict[str, Method]:
    grid = {"bits": bits, "group_size": group_size, "fine_zeros": False}
    learned = OmniQuant(**grid, epochs=0, rounding="learned")
    return {
        "gptq": GPTQ(**grid),
        "learned": learned,
        "learned, from feedback": learned.model_copy(update={"rounding_start": "feedback"}),
        "learned, effort fast": learned.with_effort("fast"),
        "learned, effort best": learned.with_effort("best"),
    }


def measure(rows: Rows, label: str, model: Path, name: str, method: Method) -> None:
    """Quantizes a model with a method of lowbit, and measures it."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        lowbit.quantize(model, folder, method, calibration(), self_check=False)
        seconds = time.process_time() - started
        rows.record(label, name, Path(folder), seconds, reference=model)


def measure_peer(rows: Rows, label: str, model: Path, name: str, grid: tuple[int, int]) -> None:
    """Lets AutoRound quantize a model on the same windows, and measures the result."""
    python = installed("auto-round", PEER)
    with tempfile.TemporaryDirectory() as place:
        windows, dest = Path(place) / "windows.json", Path(place) / "out"
        drawn = token_windows(calibration(), load_tokenizer(model), None)
        windows.write_text(json.dumps(drawn.tokens.tolist()))
        asked = [str(value) for value in (model, windows, dest, *grid, ITERATIONS)]
        command = [str(python), "-c", AUTO_ROUND, *asked]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = json.loads(done.stdout.strip().splitlines()[-1])["seconds"]
        (config,) = dest.rglob("config.json")  # it adds a folder of its own
        made = lowbit.convert(config.parent, Path(place) / "converted", "gptq")
        rows.record(label, name, made, seconds, reference=model)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peer", action="store_true", help="measure AutoRound too")
    args = parser.parse_args()
    rows = Rows("rounding", args)
    for label, model in models_of(args).items():
        for grid_name, grid in GRIDS.items():
            for name, method in methods(*grid).items():
                if re.search(args.only, f"{name} {grid_name}"):
                    measure(rows, label, model, f"{name} {grid_name}", method)
            if args.peer and re.search(args.only, f"auto-round {grid_name}"):
                measure_peer(rows, label, model, f"auto-round {grid_name}", grid)


if __name__ == "__main__":
    main()
