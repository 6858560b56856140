"""How much memory does a run need, compared with two shards and two blocks in float32?

    python benchmarks/memory.py [--folder DIR] [--only NAME] [--layers N]

A random Llama of 1.1 billion parameters (TinyLlama's shape, float16, shards of at most 500 MB) is
quantized with rtn and with OmniQuant (8 windows of 256 tokens, one epoch, hidden states on disk),
each in its own process, whose anonymous memory is watched from outside. The bound is the memory of
the bare interpreter with lowbit imported, twice the largest shard, and two blocks in float32.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from shutil import copyfile

import torch
from results import append
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = EXAMPLES / "text" / "calibration_stories.txt"
SHARD = 500_000_000  # bytes
EVERY = 0.02  # seconds between two measurements of the process's memory
MEGABYTE = 1e6
BARE = "import lowbit.cli, time; print(flush=True); time.sleep(60)"
GROUPS = ("--set", "group_size=128", "--device", "cpu")
RUNS = {
    "rtn": ("--method", "rtn", *GROUPS),
    "omniquant": (
        *("--method", "omniquant", "--set", "epochs=1", *GROUPS, "--calibration", str(TEXT)),
        *("--samples", "8", "--seqlen", "256", "--streams", "disk"),
    ),
}


def make_model(folder: Path, layers: int) -> None:
    """Writes a random model shard by shard; the whole model is never in memory."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype="float16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for path in (EXAMPLES / "models" / "llama-mini").glob("tokenizer*"):
        copyfile(path, folder / path.name)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if held + 2 * prod(shape) > SHARD:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * prod(shape)
    draw = torch.Generator().manual_seed(0)
    placed = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_tensor(shapes[name], draw) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * sum(map(prod, shapes.values()))}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tensor(shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """Returns a random matrix whose outputs are as large as its inputs, or ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).half()


def anonymous(pid: int) -> int:
    """Returns the bytes of a process's anonymous memory; 0 if it has ended."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def bare_interpreter() -> int:
    """Returns the anonymous memory of Python with lowbit imported, in bytes."""
    child = subprocess.Popen([sys.executable, "-c", BARE], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        return anonymous(child.pid)
    finally:
        child.kill()
        child.wait()


def watched(arguments: list[str]) -> tuple[int, float]:
    """Runs `python ARGUMENTS`; returns its peak anonymous memory in bytes, and its seconds."""
    started, peak = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, *arguments])
    try:
        while child.poll() is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(EVERY)
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return peak, time.perf_counter() - started


def measure(name: str, model: Path, out: Path, bound: int, parts: str) -> list[dict[str, str]]:
    peak, seconds = watched(["-m", "lowbit", "quantize", str(model), str(out), *RUNS[name]])
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    blocks = [event["seconds"] for event in events if event["kind"] == "finished"]
    case = f"{model.name} | {name}"
    share = f"{peak / bound:.2f} of the bound of {bound / MEGABYTE:.0f} MB: {parts}"
    spent = f"{len(blocks)} blocks, {seconds:.0f} s in all"
    return [
        {"case": case, "metric": "peak memory", "value": f"{peak / MEGABYTE:.0f}", "unit": "MB"}
        | {"notes": share},
        {"case": case, "metric": "time", "value": f"{sum(blocks) / len(blocks):.2f}"}
        | {"unit": "s/block", "notes": spent},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder to keep the model in; default: none")
    parser.add_argument("--only", default="", help="text in the names of runs")
    parser.add_argument("--layers", type=int, default=22, help="layers of the model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = (args.folder or Path(temporary)) / f"random-llama-{args.layers}-layers"
        if not model.exists():
            make_model(model, args.layers)
        shard = max(path.stat().st_size for path in model.glob("*.safetensors"))
        config = json.loads((model / "config.json").read_text())
        hidden, inner, keys = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
        keys *= config["num_key_value_heads"]
        block = 4 * hidden * (2 * hidden + 2 * keys + 3 * inner + 2)
        bare = bare_interpreter()
        bound = bare + 2 * shard + 2 * block
        each = [f"{number / MEGABYTE:.0f}" for number in (bare, shard, block)]
        parts = f"interpreter {each[0]} MB, shard {each[1]} MB, block {each[2]} MB"
        for name in RUNS:
            if args.only in name:
                rows = measure(name, model, Path(temporary) / name, bound, parts)
                append("memory", rows)
                for row in rows:
                    print(row["case"], row["metric"], row["value"], row["unit"], row["notes"])


if __name__ == "__main__":
    main()
