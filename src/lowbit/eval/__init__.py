"""What quantization cost: perplexity beside honest bits, for float and quantized models alike."""

from lowbit.eval.evaluate import EvalOptions, Evaluation, evaluate
from lowbit.eval.perplexity import Perplexity, perplexity, perplexity_per_document

__all__ = [
    "EvalOptions",
    "Evaluation",
    "Perplexity",
    "evaluate",
    "perplexity",
    "perplexity_per_document",
]
