"""How much longer does OmniQuant take beside busy processes?

    python benchmarks/busy.py [--neighbours 0 1 4] [--source DIR] [--threads N] [--repeat N]

The command line quantizes examples/models/llama-mini (one epoch, 16 windows of 256 tokens), alone
and beside processes that each keep a core busy. --source measures another version of lowbit:
the `src` folder of a checkout of it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import append

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = EXAMPLES / "text" / "calibration_stories.txt"
OPTIONS = (
    *("--method", "omniquant", "--set", "epochs=1", "--set", "group_size=64", "--device", "cpu"),
    *("--calibration", str(TEXT), "--samples", "16", "--seqlen", "256"),
)
BUSY = "x = 1\nwhile True: x = x * 3 % 1000003"


def seconds_of_a_run(neighbours: int, environment: dict[str, str]) -> float:
    """Returns the seconds of one run, with the start of Python."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(neighbours)]
    try:
        with tempfile.TemporaryDirectory() as out:
            model = str(EXAMPLES / "models" / "llama-mini")
            command = [sys.executable, "-m", "lowbit", "quantize", model, out, *OPTIONS]
            started = time.perf_counter()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - started
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--source", type=Path, help="src folder of another version of lowbit")
    parser.add_argument("--name", default="this version", help="what the rows call the version")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS; default: not set")
    parser.add_argument("--repeat", type=int, default=1, help="runs, of which the fastest counts")
    args = parser.parse_args()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    if args.source:
        environment["PYTHONPATH"] = str(args.source.resolve())
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    for neighbours in args.neighbours:
        runs = [seconds_of_a_run(neighbours, environment) for _ in range(args.repeat)]
        threads = f"{args.threads} threads" if args.threads else "threads not set"
        case = f"{args.name} | {threads} | {neighbours} busy processes"
        notes = f"fastest of {args.repeat}, with the start of Python; llama-mini, one epoch"
        append(
            "busy",
            [
                {"case": case, "metric": "time", "value": f"{min(runs):.1f}", "unit": "s"}
                | {"notes": notes}
            ],
        )
        print(f"{case}: {min(runs):.1f} s", flush=True)


if __name__ == "__main__":
    main()
