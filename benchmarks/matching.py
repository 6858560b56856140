"""What does it gain to match the float model's output instead of the layer's own?

    python benchmarks/matching.py [--models DIR ...] [--limit N] [--only NAME]

Each method quantizes each model twice, with `match: self` and with `match: float`; everything else
is as shipped. Perplexity and KL divergence from the float model are measured on held-back stories.
"""

from runs import EPOCHS, Rows, arguments, models_of

from lowbit.methods import GPTQ, PTQ161, MatQuant, Method, MixedQuant, OmniQuant, QuIP

MATCHES = ("self", "float")
WIDTHS = (8, 4, 3, 2)  # of the slices of a MatQuant folder


def methods(match: str) -> dict[str, Method]:
    return {
        "gptq W4": GPTQ(bits=4, match=match),
        "gptq W3": GPTQ(bits=3, match=match),
        "gptq W2": GPTQ(bits=2, match=match),
        "quip E8P12": QuIP(match=match),
        "omniquant W2": OmniQuant(bits=2, match=match),
        "omniquant W4A4": OmniQuant(bits=4, activation_bits=4, match=match),
        "mixedquant W4A4": MixedQuant(rounding="gptq", match=match),
        "mixedquant W3": MixedQuant(bits=3, activation_bits=16, rounding="gptq", match=match),
        "ptq161, no training": PTQ161(epochs=0, match=match),
        "ptq161": PTQ161(epochs=EPOCHS, match=match),
        "ptq161, refit": PTQ161(epochs=EPOCHS, refit_salient=True, match=match),
        "matquant": MatQuant(match=match),
    }


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    rows = Rows("matching", args)
    for label, model in models_of(args).items():
        for match in MATCHES:
            for name, method in methods(match).items():
                options = {"bits": WIDTHS} if isinstance(method, MatQuant) else {}
                rows.quantize(label, model, f"{name}, {match}", method, reference=model, **options)


if __name__ == "__main__":
    main()
