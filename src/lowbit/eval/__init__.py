"""Measures what quantization costs: perplexity, KL divergence, task scores and bits per weight."""

from lowbit.eval.divergence import Divergence
from lowbit.eval.evaluate import evaluate
from lowbit.eval.evaluation import Evaluation
from lowbit.eval.options import EvalOptions
from lowbit.eval.perplexity import Perplexity, perplexity, perplexity_per_document
from lowbit.eval.scores import TaskOptions, TaskScore

__all__ = [
    "Divergence",
    "EvalOptions",
    "Evaluation",
    "Perplexity",
    "TaskOptions",
    "TaskScore",
    "evaluate",
    "perplexity",
    "perplexity_per_document",
]
