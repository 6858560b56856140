"""What every stored format has in common."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.formats.activation import Activation
from lowbit.formats.checks import check_shape, dtype_name
from lowbit.formats.entry import LayerEntry
from lowbit.formats.sharing import LastInput


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored in few bits.

    Its state dict is what stands in the checkpoint: frozen parameters only, because accelerate
    does not offload buffers to disk. None of them is called `weight`, which transformers would
    convert. `entry()` is what config.json says about the layer and `from_entry` builds an empty
    layer from it alone, so that a checkpoint can be checked without any model.

    Linears that read the same input may share what that input meets first (a rotation, a
    permutation, a mask). The first of them, the owner, holds its tensors; an entry of the others
    has its name as "shares", and `lowbit.formats.link` finds it. A format that shares overrides
    `shares` and `prepare`, calls `prepared` in `forward`, and has a `forward` that stops after
    `prepare` when it is asked to with `prepare_only`.

    Where a format supports it, `activation` says how `forward` rounds its input first.

    A layer of most formats runs at one width. Where it can run at several, `widths` names them, and
    `at` and `set_bits` choose one; `lowbit.formats.widths` has what concerns whole models.

    stored_as: the layer's name in the folder that it was loaded from; None: it comes from none.
    bias: (out_features,) in the checkpoint's dtype, or None.
    """

    format: ClassVar[str]
    Entry: ClassVar[type[LayerEntry]]
    spec: LayerEntry
    activation: Activation | None = None
    stored_as: str | None = None
    bias: Tensor | None

    def __init__(self, spec: LayerEntry) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec.shape
        self._owner: tuple[QuantizedLinear, ...] = ()  # a tuple, so that it is no submodule
        self._last_input = LastInput()
        self.add_frozen("bias", (self.out_features,), spec.bias)

    def add_frozen(self, name: str, shape: tuple[int, ...], dtype: str | None) -> None:
        """Registers a frozen parameter of zeros; None: this layer has no such tensor."""
        data = None if dtype is None else torch.zeros(shape, dtype=getattr(torch, dtype))
        parameter = None if data is None else nn.Parameter(data, requires_grad=False)
        self.register_parameter(name, parameter)

    def entry(self) -> dict[str, Any]:
        """What config.json says about this layer; JSON values only."""
        return self.spec.model_dump()

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Self:
        """An empty layer of the right shapes. Raises ValueError for an entry that cannot be."""
        return cls(cls.Entry.model_validate(entry))

    @classmethod
    def empty(
        cls, shape: Sequence[int], bias: Tensor | None, device: torch.device, **facts: Any
    ) -> Self:
        """A layer for such a bias, on a device; facts: what else its entry says."""
        kind = None if bias is None else dtype_name(bias.dtype)
        with device:
            return cls.from_entry(
                {"format": cls.format, "shape": list(shape), "bias": kind, **facts}
            )

    @classmethod
    def from_tensors(
        cls, shape: Sequence[int], tensors: Mapping[str, Tensor | None], **facts: Any
    ) -> Self:
        """The layer of these tensors, "bias" among them; facts: what else its entry says."""
        device = next(tensor.device for tensor in tensors.values() if tensor is not None)
        layer = cls.empty(shape, tensors["bias"], device, **facts)
        layer.store(tensors)
        return layer

    def store(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Copies tensors into those that this layer has. Raises ValueError where they differ."""
        for name, tensor in (dict.fromkeys(self.state_dict()) | dict(tensors)).items():
            place: Tensor | None = getattr(self, name)
            if (place is None) != (tensor is None):
                given = "missing" if tensor is None else "given"
                raise ValueError(f"{name} is {given}, which does not fit {self.entry()}")
            if place is not None and tensor is not None:
                check_shape(name, tensor, place.shape)
                if tensor.is_floating_point() != place.is_floating_point():
                    raise ValueError(f"{name} is {tensor.dtype}: allowed is {place.dtype}")
                place.copy_(tensor.detach())

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight that `forward` multiplies by: (out_features, in_features) float32."""

    def quantized_input(self, x: Tensor) -> Tensor:
        """What `forward` multiplies the weight by: x, unless this layer rounds what it reads."""
        return x if self.activation is None else self.activation.round(x)

    @property
    def shares(self) -> str | None:
        """The name of the layer that holds what this one shares with it; None: this one does."""
        return None

    @property
    def owner(self) -> "QuantizedLinear":
        """The layer that `shares` names, or this one. Raises ValueError if it is not linked."""
        if self.shares is None:
            return self
        if not self._owner:
            raise ValueError(
                f"this layer shares what {self.shares} holds and was not linked to it: call "
                "lowbit.formats.link with both"
            )
        return self._owner[0]

    def link(self, owner: "QuantizedLinear") -> None:
        """Makes `owner` the layer that `shares` names. Raises ValueError if it cannot be."""
        if owner.shares is not None:
            raise ValueError(f"{self.shares}, which it shares with, itself shares {owner.shares}")
        if (self.format, self.in_features) != (owner.format, owner.in_features):
            raise ValueError(
                f"it is {self.format} with {self.in_features} inputs, but {self.shares}, which it "
                f"shares with, is {owner.format} with {owner.in_features}"
            )
        self._owner = (owner,)

    def prepare(self, x: Tensor) -> Tensor:
        """The work on an input that is the same for all who share it; done by their owner."""
        return x

    def shared_tensors(self) -> list[Tensor]:
        """The tensors that `prepare` reads."""
        return list(self.parameters(recurse=False))

    def is_offloaded(self) -> bool:
        """Whether accelerate has put away what `prepare` reads, until the layer is called."""
        return any(tensor.is_meta for tensor in self.shared_tensors())

    def prepared(self, x: Tensor) -> Tensor:
        """What the owner's `prepare` makes of x, once for all who share it; never write to it."""
        owner = self.owner
        if owner.is_offloaded():
            result: Tensor = owner(x, prepare_only=True)
            return result
        return owner._last_input.prepared(x, owner)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features), in the dtype of x."""
        x = self.quantized_input(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dequantize().to(x.dtype), bias)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths in bits at which this layer can run; empty where there is none to choose."""
        return ()

    @property
    def bits(self) -> int | None:
        """Which of its widths it runs at; None where there is none to choose."""
        return None

    def at(self, bits: int) -> "QuantizedLinear":
        """The same layer, its tensors too, at a width of its own. ValueError where it cannot be."""
        raise ValueError(self._one_width(bits))

    def set_bits(self, bits: int) -> None:
        """Runs at another width from now on. ValueError where it cannot."""
        raise ValueError(self._one_width(bits))

    def _one_width(self, bits: int) -> str:
        return f"it is {self.format}, which runs at one width only, and not at {bits} bits"

    def weight_bytes(self) -> int:
        """Bytes that stand for the weight: all tensors but the bias."""
        return sum(p.numel() * p.element_size() for n, p in self.named_parameters() if n != "bias")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves between devices, but never changes a dtype: scales are part of the format."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.entry().items())
