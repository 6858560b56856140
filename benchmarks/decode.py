"""How fast does a quantized model run, compared with the float model in plain transformers?

    python benchmarks/decode.py [--layers 4] [--tokens 16] [--only NAME] [--rounds 3]

A random Llama of TinyLlama's shape (hidden size 2048, feed-forward 5632, vocabulary 32,000) with a
few layers is quantized in several ways. It runs in one thread with float32 activations. Two times
are measured, alternating between the float model and the quantized one, and medians are compared:

prompt   one forward pass over 128 tokens
token    one more token with a cache that holds them, greedily, as `lowbit generate` does

Speed does not depend on the values of weights, so nothing is learned and few windows are read.
"""

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import make_model
from results import append
from rich.console import Console
from rich.table import Table

import lowbit
from lowbit.calibration.token_ids import TokenIds
from lowbit.checkpoint.output import size_of
from lowbit.methods import PTQ161, RTN, MatQuant, Method, MixedQuant, QuIP
from lowbit.models.quiet import quiet

PROMPT = 128  # tokens
FLOAT = "float32, transformers"
METHODS: dict[str, Method] = {
    "uniform, 8 bits": RTN(bits=8),
    "uniform, 4 bits, groups of 128": RTN(bits=4, group_size=128),
    "uniform, 3 bits, groups of 128": RTN(bits=3, group_size=128),
    "uniform, 2 bits, groups of 64": RTN(bits=2, group_size=64),
    "nested master at 8 bits": MatQuant(epochs=0, lwc=False, rounding="nearest"),
    "lattice E8P12, 2 bits": QuIP(tune_iters=0, scale=1.0),
    "lattice E8P12RVQ4B, 4 bits": QuIP(codebook="E8P12RVQ4B", tune_iters=0, scale=0.9),
    "binary, a fifth salient": PTQ161(epochs=0),
    "sorted_group, W4A4, groups of 128": MixedQuant(),
}


def seconds_of(model: Any, tokens: int) -> tuple[float, float]:
    """Returns the seconds for the prompt, and for one more token."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=draw)
    with torch.no_grad():
        started = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prompt = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(tokens):
            ids = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=ids, past_key_values=out.past_key_values, logits_to_keep=1)
        return prompt, (time.perf_counter() - started) / tokens


def compare(plain: Any, model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Returns the median times of both models in milliseconds."""
    seconds_of(model, 1)
    times: dict[str, list[float]] = {
        "prompt": [],
        "token": [],
        "float prompt": [],
        "float token": [],
    }
    for _ in range(args.rounds):
        for prefix, runner in (("float ", plain), ("", model)):
            prompt, token = seconds_of(runner, args.tokens)
            times[f"{prefix}prompt"].append(prompt)
            times[f"{prefix}token"].append(token)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def rows_of(name: str, found: dict[str, float], notes: str) -> list[dict[str, Any]]:
    """Returns the rows of results.csv for one method."""
    rows = []
    for what in ("prompt", "token"):
        case, ratio = f"{name} | {what}", found[what] / found[f"float {what}"]
        rows.append({"case": case, "metric": "time", "value": f"{found[what]:.1f}", "unit": "ms"})
        rows.append({"case": case, "metric": "ratio to float32", "value": f"{ratio:.3f}"})
    return [{"unit": "", **row, "notes": notes} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--tokens", type=int, default=16, help="tokens after the prompt")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each time")
    parser.add_argument("--only", default="", help="regular expression for the names of methods")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    table = Table(box=None)
    for column in (
        "",
        "bits (linears)",
        "size MB",
        "token ms",
        "times float",
        "prompt ms",
        "times float",
    ):
        table.add_column(column, justify="left" if not column else "right")
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "float"
        make_model(source, args.layers)
        plain, _ = lowbit.load(source, dtype=torch.float32)
        draw = torch.Generator().manual_seed(0)
        text = TokenIds(torch.randint(0, plain.config.vocab_size, (2, 256), generator=draw))
        for name, method in METHODS.items():
            if not re.search(args.only, name):
                continue
            out = lowbit.quantize(
                source, Path(place) / "out", method, text, restart=True, device="cpu"
            )
            found = compare(plain, lowbit.load(out)[0], args)
            size = size_of(out)
            notes = f"{args.layers} layers, {size.linears:.2f} bits linears, {size.model:.2f} model"
            append("decode", rows_of(name, found, f"{notes}, prompt of {PROMPT} tokens"))
            table.add_row(
                name,
                f"{size.linears:.2f}",
                f"{size.bytes / 1e6:.0f}",
                f"{found['token']:.1f}",
                f"{found['token'] / found['float token']:.2f}",
                f"{found['prompt']:.0f}",
                f"{found['prompt'] / found['float prompt']:.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
