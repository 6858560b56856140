"""How much faster is a run in several processes, and what do they exchange?

    python benchmarks/together.py --model DIR [--samples N] [--seqlen N] [--processes 1 2]
    python benchmarks/together.py --exchanged

The first form quantizes a model with torchrun, one thread in each process, and compares the bytes.
The time is that from the first event of the run to its last: without the start of Python, but with
the self-check and the calibration text. The second form measures nothing: it computes from the
shapes of a block what processes receive from each other, as the code of this version does it.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results import append

TEXT = Path(__file__).parents[1] / "examples" / "text" / "calibration_stories.txt"
METHODS = {
    "gptq": ("--method", "gptq"),
    "quip": ("--method", "quip"),
    "omniquant": ("--method", "omniquant", "--set", "epochs=2", "--set", "batch=4"),
    "learned": ("--recipe", "learned-w3a16-g128"),
}
WINDOWS, TOKENS = 128, 2048
GB = 1e9
# Of a block: the width of the hidden states, of the feed-forward part, of keys and values.
SHAPES = {"7B": (4096, 11008, 4096), "70B": (8192, 28672, 1024)}


def seconds_of_a_run(args: argparse.Namespace, method: str, count: int) -> tuple[float, str]:
    """Returns the seconds of a run, and a hash of all shards."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [*launch, "--nproc-per-node", str(count), "-m", "lowbit", "quantize"]
        command += [args.model, str(out), *METHODS[method], "--device", "cpu"]
        command += ["--calibration", str(args.text), "--samples", str(args.samples)]
        command += ["--seqlen", str(args.seqlen)] if args.seqlen else []
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (out / "events.jsonl").open()]
        hashed = hashlib.sha256()
        for shard in sorted(out.glob("*.safetensors")):
            hashed.update(shard.read_bytes())
    return lines[-1]["time"] - lines[0]["time"], hashed.hexdigest()


def measure(args: argparse.Namespace) -> None:
    for method in args.methods:
        times: dict[int, float] = {}
        hashes = set()
        for count in args.processes:
            runs = [seconds_of_a_run(args, method, count) for _ in range(args.repeat)]
            times[count] = min(seconds for seconds, _ in runs)
            hashes |= {found for _, found in runs}
        same = "equal bytes" if len(hashes) == 1 else "OTHER BYTES"
        name = Path(args.model).name
        text = f"{args.samples} windows of {args.seqlen or 'the default'} tokens"
        for count, seconds in times.items():
            gain = times[args.processes[0]] / seconds
            case = f"{name} | {method} | {count} processes"
            notes = f"{text}, 1 thread each, {gain:.2f} times as fast as 1, {same}"
            row = {"case": case, "metric": "time", "value": f"{seconds:.2f}", "unit": "s"}
            append("together", [row | {"notes": notes}])
            print(f"{case}: {seconds:.2f} s, {notes}", flush=True)


def groups_of(shape: tuple[int, int, int]) -> list[tuple[int, list[int]]]:
    """Returns the widths of inputs in a block, and the outputs of each linear that reads one."""
    hidden, inner, keys = shape
    return [
        (hidden, [hidden, keys, keys]),
        (hidden, [hidden]),
        (hidden, [inner, inner]),
        (inner, [hidden]),
    ]


def exchanged(shape: tuple[int, int, int], count: int) -> Iterator[tuple[str, float]]:
    """Yields what all processes together receive for one block, in bytes.

    The rows of a group's inputs go to the process that adds them up, unless it has read them
    itself; sums, statistics and gradients go from one process to all others.
    """
    groups, rows, away = groups_of(shape), 4 * WINDOWS * TOKENS, (count - 1) / count
    inputs = sum(n for n, _ in groups)
    squares = sum(n * n for n, _ in groups)
    weights = sum(n * sum(outputs) for n, outputs in groups)
    # Of each half of the windows: x~ for both sums, and x - x~ for the second. With two processes
    # each half stays where it was read.
    copies = 0 if count == 2 else 2 if count < 4 else 3
    yield "gptq, quip, trellis: rows", copies * rows * inputs * away
    yield "gptq, quip, trellis: sums", 4 * 8 * squares * (count - 1)
    yield "match self: rows", rows * inputs * away
    yield "match self: sums", 8 * squares * (count - 1)
    yield "learning: rows for statistics", rows * inputs * away
    groups_of_128 = 2 * 4 * weights / 128
    yield "omniquant g128: gradients of a step", groups_of_128 * (count - 1)
    yield "learned codes: gradients of a batch", 4 * weights * (count - 1)


def table() -> None:
    print("computed from shapes, not measured; 128 windows of 2,048 tokens, GB for one block")
    print(f"{'':40} {'7B, 2':>8} {'7B, 8':>8} {'70B, 2':>8} {'70B, 8':>8}")
    columns: list[dict[str, Any]] = [
        dict(exchanged(SHAPES[size], count)) for size in SHAPES for count in (2, 8)
    ]
    for name in columns[0]:
        cells = "".join(f" {column[name] / GB:8.2f}" for column in columns)
        print(f"{name:40}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--exchanged", action="store_true", help="print what is exchanged")
    parser.add_argument("--model", help="folder of a float model")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--methods", nargs="+", default=["gptq", "quip"], choices=METHODS)
    parser.add_argument("--repeat", type=int, default=1, help="runs, of which the fastest counts")
    args = parser.parse_args()
    if args.exchanged:
        table()
    if args.model:
        measure(args)


if __name__ == "__main__":
    main()
