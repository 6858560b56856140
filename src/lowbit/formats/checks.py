"""Checks of the tensors from which layers are made, and the dtype of stored scales."""

import torch
from torch import Tensor


def storable(scale: Tensor) -> Tensor:
    """Returns the scale in float16, or in float32 if a value is outside float16's normal range."""
    scale = finite("scale", scale)
    size = scale.abs()
    half = torch.finfo(torch.float16)
    fits = (size == 0) | ((size >= half.tiny) & (size <= half.max))
    return scale.half() if bool(fits.all()) else scale


def finite(name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor in float32. Raises ValueError for values that are not finite."""
    tensor = tensor.detach().float()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite in float32")
    return tensor


def check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    """Raises ValueError if the tensor has another shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}: this layer takes {tuple(shape)}")


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype as config.json writes it, such as "float16"."""
    return str(dtype).removeprefix("torch.")
