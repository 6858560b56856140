"""Rounds activations token by token, each on a grid that is computed from this token.

Training, the stored formats and attention all call this code, so that a layer rounds in a forward
as it did in training. OmniQuant (arXiv 2308.13137), section 4.1, calls it "per-token". There are
two differences: the range always includes 0, so that every zero point is a code, and the scale has
no absolute lower limit, which would make the grid of small tokens coarser.
"""

import torch
from torch import Tensor

from lowbit.kernels.straight_through import round_ste


def round_tokens(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Rounds every row of x to 2^bits equidistant values that span its range and 0.

    Computes in float32. A row of zeros stays zero. Gradients pass through the rounding to x, and
    through the range to the smallest and largest value of the row.

    x: (..., channels) of any float dtype.
    bits: width of the codes.
    symmetric: whether 0 is always code 2^(bits - 1), with steps of 2 absmax / (2^bits - 1).

    Returns the same shape and dtype.
    """
    values, top = x.float(), 2**bits - 1
    low = values.amin(-1, keepdim=True).clamp(max=0)
    high = values.amax(-1, keepdim=True).clamp(min=0)
    span = 2 * torch.maximum(high, -low) if symmetric else high - low
    scale = torch.where(span > 0, (span / top).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    if symmetric:
        zero: Tensor | float = 2.0 ** (bits - 1)
    else:
        zero = torch.round(-low / scale).detach()
    codes = (round_ste(values / scale) + zero).clamp(0, top)
    return ((codes - zero) * scale).to(x.dtype)
