"""What is the perplexity of each method, and at how many real bits?

    python benchmarks/perplexity.py [--models DIR ...] [--data DIR] [--limit N] [--only NAME]

All models in the given directories, and the models in examples/models, are quantized with:

- rtn, and GPTQ and OmniQuant as they are shipped, at 4, 3 and 2 bits, per channel and in groups of
  128 and 64; at 2 bits their zero points are fine, which takes slightly more bits;
- at 2 bits both with zero points that are codes ("whole zeros");
- OmniQuant as published ("omniquant paper"): whole ranges, 20 epochs, nearest codes, no fine zeros;
- each codebook of QuIP#, E8P12 also with training after rounding, and each rate of trellis codes.

They are measured on held-back stories and, with --data, on the test text of WikiText-2. LET is
learned for OPT, as in the original scripts. The calibration stories are in no evaluation text.
"""

from runs import EPOCHS, Rows, arguments, models_of

from lowbit.formats.trellis.codebook import RATES
from lowbit.methods import GPTQ, RTN, Method, OmniQuant, QuIP, Trellis
from lowbit.models import family_name

CODEBOOKS = ("E8P12", "D4", "HI", "E8P12RVQ3B", "E8P12RVQ4B")
PAPER = {
    "init": "minmax",
    "rounding": "nearest",
    "epochs": 20,
    "damping": 0.01,
    "fine_zeros": False,
}
GRIDS = [(bits, size) for bits in (4, 3, 2) for size in (None, 128, 64)]


def methods_for(bits: int, group_size: int | None, family: str) -> dict[str, Method]:
    grid = {"bits": bits, "group_size": group_size}
    learned = OmniQuant(**grid, let=family == "opt")
    methods = {"rtn": RTN(**grid), "gptq shipped": GPTQ(**grid), "omniquant shipped": learned}
    if bits == 2:
        methods["gptq whole zeros"] = GPTQ(**grid, fine_zeros=False)
        methods["omniquant whole zeros"] = learned.model_copy(update={"fine_zeros": False})
    methods["omniquant paper"] = learned.model_copy(update=PAPER)
    name = f"W{bits}" + (f" g{group_size}" if group_size else "")
    return {f"{method} {name}": settings for method, settings in methods.items()}


def all_methods(family: str) -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for bits, group_size in GRIDS:
        methods |= methods_for(bits, group_size, family)
    for codebook in CODEBOOKS:
        methods[f"quip {codebook}"] = QuIP(codebook=codebook)
    for rate in RATES:
        methods[f"trellis {rate:g}"] = Trellis(rate=rate)
    methods["quip+tuning E8P12"] = QuIP(finetune_epochs=EPOCHS)
    return methods


def main() -> None:
    args = arguments(__doc__).parse_args()
    rows = Rows("perplexity", args)
    for label, model in models_of(args).items():
        rows.record(label, "float", model)
        for name, method in all_methods(family_name(model)).items():
            rows.quantize(label, model, name, method)


if __name__ == "__main__":
    main()
