"""How far is the perplexity of a model that runs on compiled kernels from that of the reference?

    python benchmarks/kernel_accuracy.py [--models DIR] [--limit 16] [--only NAME] [--model NAME]

Each of the small models is quantized in every format that has kernels, with settings that need
little time, and runs over held-back stories on the reference backend, on the kernels with inputs of
16 bits, and on the kernels with inputs of 8 bits. Formats that round their inputs themselves run
once on the kernels. The change is that of the perplexity in percent.

An input between two codes of such a format may be rounded to the other one after the smallest
change, and everything after it is then rounded differently. How much that alone changes the
perplexity is measured too: on the reference backend, with embeddings that differ by a millionth.
"""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import append
from runs import SEQLEN, STORIES, arguments, calibration, models_of
from torch import Tensor

import lowbit
from lowbit.calibration.evaluation import evaluation_text
from lowbit.eval.perplexity import perplexity
from lowbit.formats import set_input_bits
from lowbit.kernels.native import chosen
from lowbit.methods import PTQ161, RTN, MatQuant, Method, MixedQuant, OmniQuant, QuIP, Trellis

WINDOWS = 16
NOISE, DRAWS = 1e-6, 6
METHODS: dict[str, Method] = {
    "uniform, 8 bits by rows": RTN(bits=8),
    "uniform, 4 bits, g128": RTN(bits=4, group_size=128),
    "uniform, 3 bits, g128": RTN(bits=3, group_size=128),
    "uniform, 2 bits, g64": RTN(bits=2, group_size=64),
    "nested master at 8 bits": MatQuant(epochs=0, lwc=False, rounding="nearest"),
    "lattice E8P12": QuIP(tune_iters=0, scale=1.0),
    "lattice E8P12RVQ3B": QuIP(codebook="E8P12RVQ3B", tune_iters=0, scale=0.9),
    "lattice E8P12RVQ4B": QuIP(codebook="E8P12RVQ4B", tune_iters=0, scale=0.9),
    "lattice D4": QuIP(codebook="D4", tune_iters=0),
    "lattice HI": QuIP(codebook="HI", tune_iters=0),
    "binary, a fifth salient": PTQ161(epochs=0),
    "trellis, 2 bits": Trellis(rate=2),
}
ROUNDED: dict[str, Method] = {
    "uniform W8A8": OmniQuant(bits=8, activation_bits=8, epochs=0),
    "uniform W4A4": OmniQuant(bits=4, activation_bits=4, epochs=0),
    "sorted_group W4A4, g128": MixedQuant(),
}


def disturbed(model: torch.nn.Module, seed: int, measured: Callable[[], float]) -> float:
    """Returns what is measured with embeddings that differ by NOISE, relative to their size."""
    draw = torch.Generator().manual_seed(seed)

    def change(layer: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * (1 + NOISE * torch.randn(out.shape, generator=draw))

    hook = model.get_input_embeddings().register_forward_hook(change)  # type: ignore[operator]
    try:
        with lowbit.backend("reference"):
            return measured()
    finally:
        hook.remove()


def write(case: str, value: float, notes: str) -> None:
    """Adds a row with a change of the perplexity in percent."""
    row = {"case": case, "metric": "perplexity, change", "value": f"{value:.4f}", "unit": "%"}
    append("kernel_accuracy", [row | {"notes": notes}])
    print(f"{case}  {value:+.4f} %  {notes}", flush=True)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    for label, source in models_of(args).items():
        for name, method in (METHODS | ROUNDED).items():
            if not re.search(args.only, name):
                continue
            with tempfile.TemporaryDirectory() as place:
                out = lowbit.quantize(source, Path(place) / "out", method, calibration(4))
                model, tokenizer = lowbit.load(out)
            tokens = evaluation_text(str(STORIES), tokenizer, SEQLEN)
            limit = args.limit or WINDOWS

            def measured(model: torch.nn.Module = model, tokens=tokens, limit=limit) -> float:
                with torch.no_grad():
                    return perplexity(model, tokens, SEQLEN, limit).value

            with lowbit.backend("reference"):
                wanted = measured()
            notes = (
                f"{wanted:.4f} on the reference backend, {limit} windows of {SEQLEN}, {chosen()}"
            )
            for bits in (16, 8) if name in METHODS else (16,):
                set_input_bits(model, bits)
                inputs = f"{bits}-bit inputs" if name in METHODS else "its own rounded inputs"
                write(f"{label} | {name} | {inputs}", 100 * (measured() / wanted - 1), notes)
            if name in ROUNDED:
                found = [disturbed(model, seed, measured) for seed in range(DRAWS)]
                largest = max((100 * (value / wanted - 1) for value in found), key=abs)
                case = f"{label} | {name} | reference, embeddings changed by {NOISE:g}"
                write(case, largest, f"{notes}, the largest of {DRAWS} draws")


if __name__ == "__main__":
    main()
