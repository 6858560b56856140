"""How much memory does a loaded model take, compared with its folder?

    python benchmarks/load_memory.py [--layers 22] [--folder DIR] [--bits 4] [--head 8]

A random Llama in TinyLlama's shape (1.1 billion parameters) is quantized with rtn in groups of 128.
Then `lowbit.load` and one forward pass run in a process of their own, with `kernels="keep"` and
with `kernels="replace"`. What this process holds at most is watched from outside. What it held
before it called `load` is subtracted: the interpreter, torch, transformers and lowbit.

Embeddings and a float output layer, stored in float16, are float32 on a CPU.

anonymous memory  what only the process holds; the system cannot take it back
resident memory   with the pages of files that the process has read, which the system can drop
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import EVERY, make_model
from results import append

import lowbit

CHILD = """
import sys, torch, lowbit
print(flush=True)
sys.stdin.readline()
model, _ = lowbit.load(sys.argv[1], kernels=sys.argv[2])
with torch.no_grad():
    model(input_ids=torch.tensor([[1]]))
print(flush=True)
sys.stdin.readline()
"""
FIELDS = {"anonymous": "RssAnon", "resident": "VmRSS"}


def held(pid: int) -> dict[str, int]:
    """Returns the bytes that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: re.search(rf"^{key}:\s+(\d+) kB$", status, re.M) for name, key in FIELDS.items()}
    return {name: 1024 * int(match[1]) for name, match in found.items() if match}


def loaded(folder: Path, kernels: str) -> dict[str, float]:
    """Returns, in bytes above what was held before, the peaks and what is held at the end."""
    command = [sys.executable, "-c", CHILD, str(folder), kernels]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdout.readline()
        before = held(child.pid)
        peak = dict(before)
        child.stdin.write("\n")
        child.stdin.flush()
        done = subprocess.Popen(["head", "-n", "1"], stdin=child.stdout, stdout=subprocess.DEVNULL)
        while done.poll() is None:
            peak = {name: max(peak[name], size) for name, size in held(child.pid).items()}
            time.sleep(EVERY)
        after = held(child.pid)
    finally:
        child.kill()
        child.wait()
    found = {f"{name} memory, peak": peak[name] - before[name] for name in FIELDS}
    return found | {f"{name} memory": after[name] - before[name] for name in FIELDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder to keep the models in; default: none")
    parser.add_argument("--layers", type=int, default=22, help="layers of the model")
    parser.add_argument("--bits", type=int, default=4, help="bits of the codes")
    parser.add_argument("--head", type=int, help="bits of the output layer; default: float")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = args.folder or Path(temporary)
        source, out = place / "float", place / f"rtn-{args.bits}-head-{args.head}"
        if not source.exists():
            make_model(source, args.layers)
        if not out.exists():
            method = lowbit.methods.RTN(bits=args.bits, group_size=128)
            lowbit.quantize(source, out, method, device="cpu", lm_head_bits=args.head)
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        case = f"TinyLlama's shape, {args.layers} layers, rtn {args.bits} bits"
        case += f", head of {args.head} bits" if args.head else ", float head"
        for kernels in ("keep", "replace"):
            rows = [
                {"case": f"{case} | {kernels}", "metric": name, "value": f"{found / 1e6:.0f}"}
                | {"unit": "MB", "notes": f"{found / size:.2f} of the files' {size / 1e6:.0f} MB"}
                for name, found in loaded(out, kernels).items()
            ]
            append("load_memory", rows)
            for row in rows:
                print(row["case"], row["metric"], row["value"], row["unit"], row["notes"])


if __name__ == "__main__":
    main()
