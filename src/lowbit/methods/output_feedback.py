"""The field `output_feedback` of the methods that round by a Hessian.

Errors of outputs do not all matter alike to what the model predicts. With output feedback, a linear
is rounded by the Hessian E[g g^T] of its output as well, where g is the gradient of the float
model's loss by the output, on labels that are drawn from the model's own predictions. An error of
one row is then fed into the rows that are not rounded yet (YAQA, Tseng et al., arXiv 2505.22988).
"""

from dataclasses import replace
from typing import Any

from pydantic import Field

from lowbit.blocks import BlockTask
from lowbit.blocks.hessian import Hessian

WITHOUT = "rounded without output feedback"
OUTPUT_NOT_POSITIVE_DEFINITE = f"Hessian of its output not positive definite: {WITHOUT}"


def output_feedback_field() -> Any:
    """Returns the field, whose default is False."""
    return Field(
        False,
        description="Whether rounding also weighs the outputs of a linear, by the gradients of the "
        "model's loss, which takes one pass backward through the float model before the first "
        "block.",
    )


def output_hessian(task: BlockTask, linear: str, min_tokens: int) -> Hessian | str:
    """Returns the Hessian of a linear's output, or the fallback sentence if there is none to use.

    min_tokens: the number of tokens that must have reached the linear.
    """
    hessian = task.output_hessians[linear]
    if hessian.tokens < min_tokens:
        return f"too few gradients reached its output ({hessian.tokens} tokens): {WITHOUT}"
    if not hessian.matrix.diagonal().any():
        return f"no gradient reached its output: {WITHOUT}"
    return replace(hessian, matrix=hessian.matrix.to(next(task.block.parameters()).device))


def joined(*fallbacks: str | None) -> str | None:
    """Returns the fallback sentences of a linear as one; None: there are none."""
    return "; ".join(sentence for sentence in fallbacks if sentence is not None) or None
