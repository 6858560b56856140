"""The `weight` of a quantized layer, for code of models that looks at the weights of its linears.

Such code asks for the dtype or the device of a weight (the indexer of DeepSeek-V3.2), and seldom
computes with it. `PackedWeight` answers both; the float weight exists only while it is needed.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lowbit.formats.base import QuantizedLinear


class PackedWeight:
    """Has the dtype, shape and device of a weight, and is dequantized where torch computes with it.

    layer: the layer whose weight it is.

    Raises TypeError where code would change the weight in place.
    """

    # transformers' initialisers leave alone what is marked so.
    _is_hf_initialized = True
    requires_grad = False
    is_meta = False

    def __init__(self, layer: "QuantizedLinear") -> None:
        self._layer = layer

    @property
    def dtype(self) -> torch.dtype:
        return self._layer.float_dtype

    @property
    def device(self) -> torch.device:
        return self._layer.own_tensors()[0].device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._layer.out_features, self._layer.in_features))

    def dequantized(self) -> Tensor:
        """Returns the weight: (out_features, in_features) in `dtype`."""
        return self._layer.dequantize().to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(f"the weight of a quantized layer has no attribute {name!r}")
        _refuse_change(name)
        return getattr(self.dequantized(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dequantized()[index]

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if args and isinstance(args[0], PackedWeight):
            _refuse_change(getattr(func, "__name__", ""))
        named = {key: _whole(value) for key, value in (kwargs or {}).items()}
        return func(*map(_whole, args), **named)


def _whole(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_whole, value))
    return value.dequantized() if isinstance(value, PackedWeight) else value


def _refuse_change(function: str) -> None:
    """Raises TypeError for a function of torch that changes a tensor: its name ends in _."""
    if function.endswith("_") and not function.endswith("__"):
        raise TypeError(
            f"{function} would change the weight of a quantized layer, which is packed and cannot "
            "be changed: leave this linear in float with --skip"
        )
