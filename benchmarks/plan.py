"""How accurate is `lowbit plan`, compared with the run itself?

    python benchmarks/plan.py [--models DIR ...] [--only NAME] [--samples N] [--seqlen N]

Each model (default: those in examples/models) is planned and quantized with each method, both in
their own process. A value is the planned number divided by the measured one: bytes on disk, peak of
the process's anonymous memory (measured from outside), and seconds of the call. Seconds are
processor time of one thread in both cases, since others may use the machine.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import MEGABYTE, watched
from results import append
from rich.console import Console
from rich.table import Table

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
    "omniquant": {"bits": 2, "group_size": 64, "epochs": 3},
    "quip": {},
}


def child(what: str, name: str, model: Path, folder: Path, sizes: tuple[int, int]) -> None:
    """Plans or quantizes in this process, and writes the numbers to FOLDER/WHAT.json."""
    quiet()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # the clock of the dry run
    method = METHODS[name](**SETTINGS[name])
    samples, seqlen = sizes
    text = lowbit.Calibration(sources=(str(TEXT),), samples=samples, seqlen=seqlen)
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
            notes += f"; {planned['basis']['seconds']:.1f} s of dry run"
        case = f"{model.name} | {name} | {sizes[0]} x {sizes[1]}"
        value = f"{planned[metric] / taken[metric]:.3f}"
        rows.append(
            {"case": case, "metric": metric, "value": value, "unit": "ratio", "notes": notes}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="model folders")
    parser.add_argument("--only", default="", help="text in the names of methods")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a window")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, name, model, folder, *sizes = args.child
        child(what, name, Path(model), Path(folder), (int(sizes[0]), int(sizes[1])))
        return
    models = args.models or [path.parent for path in sorted(EXAMPLES.glob("models/*/config.json"))]
    table = Table("case", "metric", "planned / was", "notes")
    for model in models:
        for name in SETTINGS:
            if name in METHODS and args.only in name:
                rows = measure(name, model, (args.samples, args.seqlen))
                append("plan", rows)
                for row in rows:
                    print(row["case"], row["metric"], row["value"], row["notes"], flush=True)
                    table.add_row(row["case"], row["metric"], row["value"], row["notes"])
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
