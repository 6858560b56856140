"""What do quantized activations cost in perplexity, and which techniques reduce that?

    python benchmarks/activations.py [--models DIR ...] [--limit N] [--only NAME]

It measures OmniQuant at W4A4, W6A6 and W8A8, with its techniques added one after another, RTN, GPTQ
and OmniQuant with rotated inputs at W4A4, and MixedQuant at W4A4. Each model is also measured with
outlier channels, as large models have them: in this variant norms multiply a few channels by 32 or
64, and the float function stays the same.
"""

import tempfile
from pathlib import Path

from outliers import add_outliers
from runs import EPOCHS, Rows, arguments, models_of

from lowbit.methods import GPTQ, RTN, Method, MixedQuant, OmniQuant


def cases() -> dict[str, Method]:
    """Returns the methods to measure, by name."""
    found: dict[str, Method] = {}
    for bits in (4, 6, 8):
        plain = OmniQuant(
            bits=bits, activation_bits=bits, epochs=EPOCHS, init="minmax", rounding="nearest"
        )
        name = f"W{bits}A{bits}"
        found[f"{name} rtn"] = plain.model_copy(update={"epochs": 0, "lwc": False})
        found[f"{name} clipping"] = plain
        found[f"{name} clipping + LET"] = plain.model_copy(
            update={"let": True, "alpha": 0.75 if bits == 4 else 0.5}
        )
        found[f"{name} clipping + LET + feedback"] = found[f"{name} clipping + LET"].model_copy(
            update={"rounding": "gptq"}
        )
    found["W4A4 gptq"] = GPTQ(bits=4, activation_bits=4)
    found["W4A4 rtn rotated"] = RTN(bits=4, activation_bits=4, rotate=True)
    found["W4A4 gptq rotated"] = GPTQ(bits=4, activation_bits=4, rotate=True)
    found["W4A4 clipping + feedback rotated"] = OmniQuant(
        bits=4, activation_bits=4, rotate=True, epochs=EPOCHS
    )
    mixed = {"smooth": None, "clip": False, "sort": "none", "salient_ratio": 0.0}
    for name, fields in {
        "rows": {"group_size": None},
        "g128": {},
        "g128 sorted": {"sort": "mean3std"},
        "g128 smooth": {"smooth": 0.5},
        "g128 salient": {"salient_ratio": 0.05},
        "g128 all": {"sort": "mean3std", "salient_ratio": 0.05, "clip": True},
    }.items():
        settings = {"group_size": 128, "alignment": 4} | mixed | fields
        found[f"W4A4 mixed {name}"] = MixedQuant(**settings)
    return found


def main() -> None:
    args = arguments(__doc__).parse_args()
    rows = Rows("activations", args)
    for name, model in models_of(args).items():
        with tempfile.TemporaryDirectory() as folder:
            outliers = add_outliers(model, Path(folder) / "outliers")
            for suffix, variant in (("plain", model), ("outliers", outliers)):
                label = f"{name} {suffix}"
                rows.record(label, "float", variant)
                for case, method in cases().items():
                    rows.quantize(label, variant, case, method)


if __name__ == "__main__":
    main()
