"""The `weight` of a quantized layer, for code of models that looks at the weights of its linears.

Such code asks for the dtype or the device of a weight (the indexer of DeepSeek-V3.2), and seldom
computes with it. `PackedWeight` answers both; the float weight exists only while it is needed. Of a
packed table of embeddings, only the rows that are looked up exist.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

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
        looked_up: Any = getattr(self._layer, "rows", None)
        if looked_up is not None and isinstance(index, int | Tensor):
            number = torch.as_tensor(index, device=self.device)
            if number.dtype in (torch.int64, torch.int32):
                found: Tensor = looked_up(number % self.shape[0] if number.dim() == 0 else number)
                return found
        return self.dequantized()[index]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        return PackedWeight(deepcopy(self._layer, memo))

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        looked_up = _looked_up(func, args)
        if looked_up is not None:
            return looked_up
        if args and isinstance(args[0], PackedWeight):
            _refuse_change(getattr(func, "__name__", ""))
        named = {key: _whole(value) for key, value in (kwargs or {}).items()}
        return func(*map(_whole, args), **named)


def _looked_up(function: Any, args: Sequence[Any]) -> Tensor | None:
    """Returns the rows that a lookup in a packed table finds; None if it is something else."""
    order = {functional.embedding: (1, 0), torch.embedding: (0, 1)}.get(function)
    if order is None or len(args) < 2:
        return None
    weight, tokens = (args[index] for index in order)
    rows: Any = getattr(weight._layer, "rows", None) if isinstance(weight, PackedWeight) else None
    return None if rows is None else rows(tokens)


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
