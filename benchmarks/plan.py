"""How accurate is `lowbit plan`, compared with the run itself?

    python benchmarks/plan.py [--models DIR ...] [--layers N] [--only NAMES]
                              [--samples N] [--seqlen N]

Each model (default: those in examples/models) is planned and quantized with each method, both in
their own process. With --layers it is a random Llama with blocks as wide as those of TinyLlama (1.1
billion parameters with 22 layers), of which so many are quantized. A value is the planned number
divided by the measured one: bytes on disk, peak of the process's anonymous memory (measured from
outside), and seconds of the call. Seconds are processor time of one thread in both cases, since
others may use the machine.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import MEGABYTE, make_model, watched
from results import append

import lowbit
from lowbit.checkpoint.output import size_of
from lowbit.methods import METHODS
from lowbit.models.quiet import quiet
from lowbit.pipeline.plan import plan

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = EXAMPLES / "text" / "calibration_stories.txt"
SETTINGS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 4, "group_size": 128},
    "gptq": {"bits": 3, "group_size": 128},
    "omniquant": {"bits": 3, "group_size": 128, "epochs": 1},
    "matquant": {"epochs": 1},
    "ptq161": {"epochs": 1},
    "mixedquant": {},
    "quip": {},
    "trellis": {},
}


def child(what: str, name: str, model: Path, folder: Path, sizes: tuple[int, int]) -> None:
    """Plans or quantizes in this process, and writes the numbers to FOLDER/WHAT.json."""
    quiet()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # the clock of the dry run
    method = METHODS[name](**SETTINGS[name])
    text = lowbit.Calibration(sources=(str(TEXT),), samples=sizes[0], seqlen=sizes[1])
    started = time.perf_counter()
    if what == "plan":
        found = plan(model, method, text).to_json()
    else:
        lowbit.quantize(model, folder / "out", method, text, dry_run_block=False)
        seconds = time.perf_counter() - started
        found = {"seconds": seconds, "bytes": size_of(folder / "out").bytes}
    (folder / f"{what}.json").write_text(json.dumps(found))


def measure(name: str, model: Path, sizes: tuple[int, int]) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        where = [name, str(model), str(folder), *map(str, sizes)]
        peaks = {}
        for what in ("plan", "run"):
            peaks[what], _ = watched([__file__, "--child", what, *where])
        planned, taken = (
            json.loads((folder / f"{what}.json").read_text()) for what in ("plan", "run")
        )
    taken["memory"] = peaks["run"]
    rows = []
    for metric, unit, scale in (
        ("bytes", "kB", 1e3),
        ("memory", "MB", MEGABYTE),
        ("seconds", "s", 1),
    ):
        notes = f"planned {planned[metric] / scale:.1f} {unit}, was {taken[metric] / scale:.1f}"
        if metric == "seconds":
            how = "computed" if "divisor" in planned["basis"] else "of a whole block"
            notes += f"; {planned['basis']['seconds']:.1f} s of dry run, {how}"
        case = f"{model.name} | {name} | {sizes[0]} x {sizes[1]}"
        value = f"{planned[metric] / taken[metric]:.3f}"
        rows.append(
            {"case": case, "metric": metric, "value": value, "unit": "ratio", "notes": notes}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="model folders")
    parser.add_argument("--layers", type=int, help="layers of a random model of TinyLlama's width")
    parser.add_argument("--folder", type=Path, help="folder to keep that model in; default: none")
    parser.add_argument("--only", default="", help="names of methods, separated by commas")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a window")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, name, model, folder, *sizes = args.child
        child(what, name, Path(model), Path(folder), (int(sizes[0]), int(sizes[1])))
        return
    only = args.only.split(",") if args.only else list(SETTINGS)
    models = args.models or [path.parent for path in sorted(EXAMPLES.glob("models/*/config.json"))]
    with tempfile.TemporaryDirectory() as temporary:
        if args.layers:
            place = args.folder or Path(temporary)
            models = [place / f"random-llama-{args.layers}-layers"]
            if not models[0].exists():
                make_model(models[0], args.layers)
        for model in models:
            for name in only:
                rows = measure(name, model, (args.samples, args.seqlen))
                append("plan", rows)
                for row in rows:
                    print(row["case"], row["metric"], row["value"], row["notes"], flush=True)


if __name__ == "__main__":
    main()
