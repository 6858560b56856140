"""What do quantized activations cost, and what repairs it?

    python benchmarks/activations.py [--models DIR ...] [--limit N] [--only NAME]

OmniQuant at W4A4, W6A6 and W8A8, with what it learns switched on one after another, and MixedQuant
at W4A4; on every model and on its "outliers" variant, the same function in float whose norms scale
a few channels up by 32 or 64, which is how large models look.
"""

import tempfile
from pathlib import Path

from outliers import add_outliers
from runs import EPOCHS, Rows, arguments, models_of

from lowbit.methods import Method, MixedQuant, OmniQuant


def cases() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for bits in (4, 6, 8):
        plain = OmniQuant(bits=bits, activation_bits=bits, epochs=EPOCHS, lwc=True, let=False)
        name = f"W{bits}A{bits}"
        found[f"{name} rtn"] = plain.model_copy(update={"epochs": 0, "lwc": False})
        found[f"{name} clipping"] = plain
        found[f"{name} clipping + LET"] = plain.model_copy(
            update={"let": True, "alpha": 0.75 if bits == 4 else 0.5}
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
            for kind, variant in (("plain", model), ("outliers", outliers)):
                label = f"{name} {kind}"
                rows.record(label, "float", variant)
                for case, method in cases().items():
                    rows.quantize(label, variant, case, method)


if __name__ == "__main__":
    main()
