"""The field `damping` of the methods that round by a Hessian, and what its value "auto" stands for.

A Hessian of few calibration tokens is nearly 0 in many directions that other text does use, and
rounding with feedback moves errors into just these directions. Damping prevents that, so the fewer
the tokens, the more of it is needed.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

Damping = Literal["auto"] | Annotated[float, Field(gt=0)]
LEAST = 0.01  # the value of GPTQ's code


def damping_field(use: str = "") -> Any:
    """Returns the field, whose default is "auto". use: what follows the description."""
    text = "Share of the Hessian's mean diagonal that is added to its diagonal"
    auto = f'"auto": the number of inputs over the number of calibration tokens, at least {LEAST}'
    return Field("auto", description=f"{text}{use}; {auto}.")


def damping_share(damping: Damping, tokens: int, width: int) -> float:
    """Returns the share of the Hessian's mean diagonal to add to its diagonal.

    "auto" is width / tokens, but at least 0.01. Measured with GPTQ at 3 bits on tinystories-656k
    (inputs 128 to 384 wide, float 46.2, round to nearest 74.4): with 64 tokens a perplexity of 77
    with 0.01, 59.5 with 1 and 58.5 with 4; with 256 tokens 63.4 with 0.01, 57.2 with 1; with 16,384
    tokens differences between 0.01 and 0.3 are noise.

    damping: the value of the field; a number is returned as it is.
    tokens: the calibration tokens that the Hessian is a mean over.
    width: the number of inputs.
    """
    return max(LEAST, width / max(tokens, 1)) if damping == "auto" else damping
