"""What every format asks of the tensors that it is given, and how it stores their scales."""

import torch
from torch import Tensor


def storable(scale: Tensor) -> Tensor:
    """The scale in float16, or in float32 where float16 would lose range."""
    scale = finite("scale", scale)
    size = scale.abs()
    half = torch.finfo(torch.float16)
    fits = (size == 0) | ((size >= half.tiny) & (size <= half.max))
    return scale.half() if bool(fits.all()) else scale


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor in float32, checked."""
    tensor = tensor.detach().float()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite in float32")
    return tensor


def check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}: this layer takes {tuple(shape)}")


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it: "float16"."""
    return str(dtype).removeprefix("torch.")
