"""What does it gain to match the float model's output instead of the layer's own?

    python benchmarks/matching.py [--models DIR ...] [--limit N] [--only NAME]

Each method quantizes each model twice, with `match: self` and with `match: float`; everything else
is as shipped. Perplexity and KL divergence from the float model are measured on held-back stories.
"""

from runs import Rows, arguments, models_of

from lowbit.methods import GPTQ, Method, OmniQuant, QuIP

MATCHES = ("self", "float")


def methods(match: str) -> dict[str, Method]:
    return {
        "gptq W4": GPTQ(bits=4, match=match),
        "gptq W3": GPTQ(bits=3, match=match),
        "gptq W2": GPTQ(bits=2, match=match),
        "quip E8P12": QuIP(match=match),
        "omniquant W2": OmniQuant(bits=2, match=match),
        "omniquant W4A4": OmniQuant(bits=4, activation_bits=4, match=match),
    }


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    rows = Rows("matching", args)
    for label, model in models_of(args).items():
        for match in MATCHES:
            for name, method in methods(match).items():
                rows.quantize(label, model, f"{name}, {match}", method, reference=model)


if __name__ == "__main__":
    main()
