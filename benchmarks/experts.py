"""How long does `lowbit plan` take on a model of very many experts, and how much memory?

    python benchmarks/experts.py [--experts N ...] [--layers N]

The models have the shape of DeepSeek-V3 with tiny widths: --layers blocks, of which the first is
dense, and N experts in each of the others. Each plan runs in a process of its own, with one thread.
The seconds are those of the call alone. Peak memory is the process's anonymous memory, libraries
included, measured from outside. A case with 4 experts is the base to compare with.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import MEGABYTE, watched
from results import append

import lowbit
from lowbit.methods import METHODS
from lowbit.models.quiet import quiet

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SETTINGS = {
    "rtn": {"bits": 4, "group_size": 16},
    "gptq": {"bits": 4, "group_size": 16},
}
WINDOWS, SEQLEN = 4, 32


def child(method: str, folder: Path) -> None:
    """Plans a run in this process, and writes its seconds to FOLDER/plan.json."""
    quiet()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 100, (WINDOWS, SEQLEN), generator=draw)
    started = time.perf_counter()
    lowbit.plan(
        folder, METHODS[method](**SETTINGS[method]), tokens, without_tokenizer=True, device="cpu"
    )
    (folder / "plan.json").write_text(json.dumps(time.perf_counter() - started))


def measure(experts: int, layers: int, method: str) -> list[dict[str, str]]:
    import families

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        families.make(
            "deepseek_v3",
            num_hidden_layers=layers,
            first_k_dense_replace=1,
            n_routed_experts=experts,
            num_experts_per_tok=min(8, experts // 2),
            moe_intermediate_size=16,
        ).save_pretrained(folder)
        peak, _ = watched([__file__, "--child", method, str(folder)])
        seconds = json.loads((folder / "plan.json").read_text())
    case = f"deepseek_v3, {layers} layers, {experts} experts | {method}"
    notes = f"{WINDOWS} x {SEQLEN} tokens" if method == "gptq" else "no text"
    return [
        {"case": case, "metric": "plan", "value": f"{seconds:.1f}", "unit": "s", "notes": notes},
        {"case": case, "metric": "peak memory", "value": f"{peak / MEGABYTE:.0f}", "unit": "MB"},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, nargs="*", default=[4, 256], help="in each block")
    parser.add_argument("--layers", type=int, default=4, help="number of blocks")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        method, folder = args.child
        child(method, Path(folder))
        return
    for experts in args.experts:
        for method in SETTINGS:
            rows = measure(experts, args.layers, method)
            append("experts", rows)
            for row in rows:
                print(row["case"], row["metric"], row["value"], row["unit"], flush=True)


if __name__ == "__main__":
    main()
