"""Round activations token by token, each on a grid of its own that is found when it comes.

The one place where this is done: training, the stored formats and attention call it, so that what
was learned is what runs. OmniQuant (arXiv 2308.13137), section 4.1, has it as "per-token"; here the
range always includes 0, so that zero points are codes, and no absolute floor coarsens small tokens.
"""

import torch
from torch import Tensor

from lowbit.kernels.straight_through import round_ste


def round_tokens(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Every row of x on the 2^bits values that span its range and 0.

    x: (..., channels) of any float dtype -> the same shape and dtype, computed in float32. With
    `symmetric` 0 stands at code 2^(bits - 1), in steps of 2 absmax / (2^bits - 1). A row of zeros
    stays so. Gradients pass through the rounding to x, and through the range to its extremes.
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
