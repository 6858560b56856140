"""What does `lowbit plan` say of models from 1B to 671B, from their config.json alone?

    python benchmarks/plans.py [--only TEXT] [--shape NAME ...] [--samples N] [--seqlen N]

Each shape is planned with each recipe, without weights and for a GPU whose memory is no limit, with
hidden states on disk and without the self-check. Bytes are computed: of the folder, of the process,
on the GPU, and on disk beside the result. Seconds are processor time of this CPU with one thread,
computed from the speeds that each plan measures; no GPU was at hand. The rows are those of the page
"Memory and time" of the documentation.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import append

import lowbit
from lowbit.methods import METHODS
from lowbit.models.quiet import quiet
from lowbit.recipes import load_recipe

RECIPES = (
    *("rtn-w4a16-g128", "gptq-w4a16-g128", "omniquant-w4a16-g128", "quip-e8p-2bit"),
    *("trellis-2bit", "ptq161"),
)
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
QWEN: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}


def sizes(hidden: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": LLAMA
    | sizes(2048, 8192, 16, 32)
    | {"head_dim": 64, "tie_word_embeddings": True},
    "Llama 3.2 3B": LLAMA | sizes(3072, 8192, 28, 24) | {"tie_word_embeddings": True},
    "Llama 3.1 8B": LLAMA | sizes(4096, 14336, 32, 32),
    "Qwen2.5 14B": QWEN | sizes(5120, 13824, 48, 40),
    "Qwen2.5 32B": QWEN | sizes(5120, 27648, 64, 40),
    "Llama 3.1 70B": LLAMA | sizes(8192, 28672, 80, 64),
    "Mixtral 8x7B": LLAMA
    | sizes(4096, 14336, 32, 32)
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Llama 3.1 405B": LLAMA | sizes(16384, 53248, 126, 128),
    "DeepSeek-V3 671B": {
        **sizes(7168, 18432, 61, 128),
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}


def planned(folder: Path, recipe: str, windows: tuple[int, int]) -> tuple[Any, float]:
    """Returns the estimate of a recipe, and the seconds that it took."""
    loaded = load_recipe(recipe)
    method = METHODS[loaded.method](**loaded.settings("llama"))
    samples, seqlen = windows
    text = lowbit.Calibration(samples=samples, seqlen=seqlen)
    started = time.perf_counter()
    found = lowbit.plan(
        folder,
        method,
        text,
        device="cpu",
        streams="disk",
        self_check=False,
        device_memory="1000TB",
    )
    return found, time.perf_counter() - started


def rows_of(shape: str, recipe: str, found: Any, seconds: float) -> list[dict[str, str]]:
    case = f"{shape} | {recipe}"
    notes = f"computed, {found.linears:.2f} bits linears, {found.model:.2f} bits model"
    amounts = {
        "size": found.bytes,
        "memory": found.memory,
        "GPU memory": found.device_memory,
        "disk": found.disk,
    }
    rows = [
        {"metric": metric, "value": f"{amount / 1e9:.2f}", "unit": "GB"}
        for metric, amount in amounts.items()
    ]
    rows.append({"metric": "time", "value": f"{found.seconds / 3600:.2f}", "unit": "h"})
    rows.append({"metric": "plan", "value": f"{seconds:.1f}", "unit": "s"})
    return [{"case": case, "notes": notes, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="text in the names of recipes")
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), help="names of shapes")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a window")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # others may use the machine
    for shape in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
            for recipe in RECIPES:
                if args.only in recipe:
                    found, seconds = planned(Path(folder), recipe, (args.samples, args.seqlen))
                    rows = rows_of(shape, recipe, found, seconds)
                    append("plans", rows)
                    for row in rows:
                        print(row["case"], row["metric"], row["value"], row["unit"], flush=True)


if __name__ == "__main__":
    main()
