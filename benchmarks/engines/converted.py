"""Lets AutoRound or llm-compressor quantize a small model, and converts what they wrote.

    .venv/bin/python benchmarks/engines/converted.py auto-round
    .venv/bin/python benchmarks/engines/converted.py llm-compressor

The model has random weights. For each folder it prints how far weights are from those of the model,
in steps of the grid: about one where a symmetric grid clips, half a step elsewhere.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

import torch
from run import BUILD, Engine, installed
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.exporters.grid import grid_of

ROOT = Path(__file__).parents[2]
ENGINES = {
    "auto-round": Engine(("torch", "auto-round"), ()),
    "llm-compressor": Engine(("torch", "llmcompressor"), ()),
}
# By program: a name, what the program is asked for, and the layout that lowbit reads.
KINDS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "auto-round": {
        "auto_gptq, 2 bits": (("2", "sym", "32", "auto_gptq"), "gptq"),
        "auto_gptq, 3 bits": (("3", "sym", "32", "auto_gptq"), "gptq"),
        "auto_gptq, 4 bits": (("4", "sym", "32", "auto_gptq"), "gptq"),
        "auto_gptq, 4 bits asymmetric": (("4", "asym", "32", "auto_gptq"), "gptq"),
        "auto_awq, 4 bits asymmetric": (("4", "asym", "32", "auto_awq"), "awq"),
        "auto_round, 4 bits": (("4", "sym", "32", "auto_round"), "gptq"),
        "auto_round, 4 bits asymmetric": (("4", "asym", "32", "auto_round"), "awq"),
        "llm_compressor, 4 bits": (("4", "sym", "32", "llm_compressor"), "ct"),
    },
    "llm-compressor": {name: ((name,), "ct") for name in ("W4A16", "W4A16_ASYM", "W8A16", "W8A8")},
}
AUTO_ROUND = """
import sys
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
source, dest, bits, kind, size, layout = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
tokenizer = AutoTokenizer.from_pretrained(source)
AutoRound(
    model, tokenizer, bits=int(bits), sym=kind == "sym", group_size=int(size), iters=0,
    disable_opt_rtn=True, device_map="cpu",
).quantize_and_save(dest, format=layout)
"""
LLM_COMPRESSOR = """
import sys
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
source, dest, scheme = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
oneshot(model=model, recipe=recipe)
model.save_pretrained(dest, save_compressed=True)
"""
SCRIPTS = {"auto-round": AUTO_ROUND, "llm-compressor": LLM_COMPRESSOR}


def source_model(folder: Path) -> Path:
    """Writes a random Llama with the tokenizer of llama-mini."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "examples" / "models" / "llama-mini").save_pretrained(
        folder
    )
    return folder


def worst(converted: Path, source: Path) -> float:
    """Returns the largest difference of a weight from the source, in steps."""
    folder, model = QuantizedFolder(converted), AutoModelForCausalLM.from_pretrained(source)
    errors = []
    for name in folder.entries:
        grid = grid_of(folder.layer(name))
        assert grid is not None
        errors.append(grid.error(model.get_submodule(name).weight.detach()))
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=ENGINES)
    program = parser.parse_args().program
    python = installed(program, ENGINES[program])
    folder = BUILD / "converted" / program
    shutil.rmtree(folder, ignore_errors=True)
    source = source_model(folder / "source")
    for number, (name, (asked, layout)) in enumerate(KINDS[program].items()):
        made, back = folder / f"made-{number}", folder / f"converted-{number}"
        command = [python, "-c", SCRIPTS[program], source, made, *asked]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {program} failed: {(done.stderr.splitlines() or [''])[-1]}", flush=True)
            continue
        (config,) = made.rglob("config.json")  # AutoRound adds a folder of its own
        try:
            lowbit.convert(config.parent, back, layout)
        except ValueError as error:
            print(f"{name}: refused: {error}", flush=True)
            continue
        print(f"{name}: --from {layout}, off by up to {worst(back, source):.2f} steps", flush=True)


if __name__ == "__main__":
    main()
