"""What every stored format has in common."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from lowbit.formats.activation import Activation
from lowbit.formats.backend import Backend, choose
from lowbit.formats.checks import check_shape, dtype_name
from lowbit.formats.entry import LayerEntry
from lowbit.formats.repacked import Repacked
from lowbit.formats.sharing import LastInput


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored in few bits.

    Its state dict is what stands in the checkpoint: frozen parameters only, because accelerate
    does not offload buffers to disk. None of them is called `weight`, which transformers would
    convert. `entry()` is what config.json says about the layer and `from_entry` builds an empty
    layer from it alone, so that a checkpoint can be checked without any model.

    `forward` is the same for all formats: it prepares the input, has a backend multiply by the
    weight, and adds the bias. `backends` lists those of a format in order of preference; the last
    one is the reference.

    Linears that read the same input may share what that input meets first (a rotation, a
    permutation, a mask). The first of them, the owner, holds its tensors; an entry of the others
    has its name as "shares", and `lowbit.formats.link` finds it. A format that shares overrides
    `shares`, `prepare` and `shared_tensors`.

    Where a format supports it, `activation` says how `forward` rounds its input first.

    A layer of most formats runs at one width. Where it can run at several, `widths` names them, and
    `at` and `set_bits` choose one; `lowbit.formats.widths` has what concerns whole models.

    stored_as: the layer's name in the folder that it was loaded from; None: it comes from none.
    bias: (out_features,) in the checkpoint's dtype, or None.
    """

    format: ClassVar[str]
    Entry: ClassVar[type[LayerEntry]]
    backends: ClassVar[tuple[Backend[Any], ...]]
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
        self._repacked = Repacked()
        self.add_frozen("bias", (self.out_features,), spec.bias)

    def add_frozen(self, name: str, shape: tuple[int, ...], dtype: str | None) -> None:
        """Registers a frozen parameter of zeros; None: this layer has no such tensor."""
        data = None if dtype is None else torch.zeros(shape, dtype=getattr(torch, dtype))
        parameter = None if data is None else nn.Parameter(data, requires_grad=False)
        self.register_parameter(name, parameter)

    def entry(self) -> dict[str, Any]:
        """What config.json says about this layer; JSON values only.

        What may be absent (the fields that have a default) is left out where it is.
        """
        return self.spec.model_dump(exclude_defaults=True)

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Self:
        """An empty layer of the right shapes. Raises ValueError for an entry that cannot be."""
        return cls(cls.Entry.model_validate(entry))

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
        **facts: Any,
    ) -> Self:
        """A layer without values.

        bias: a bias like the one that it will have.
        dtype: of the float weight that the layer stands for; None: not known.
        facts: what else its entry says.
        """
        kind = None if bias is None else dtype_name(bias.dtype)
        entry = {"format": cls.format, "shape": list(shape), "bias": kind, **facts}
        with device:
            return cls.from_entry(entry | ({} if dtype is None else {"dtype": dtype_name(dtype)}))

    @classmethod
    def from_tensors(
        cls,
        shape: Sequence[int],
        tensors: Mapping[str, Tensor | None],
        dtype: torch.dtype | None = None,
        **facts: Any,
    ) -> Self:
        """A layer of these tensors, "bias" among them; dtype and facts as `empty` takes them."""
        device = next(tensor.device for tensor in tensors.values() if tensor is not None)
        layer = cls.empty(shape, tensors["bias"], device, dtype, **facts)
        layer.store(tensors)
        return layer

    def with_dtypes(self, weight: torch.dtype, bias: torch.dtype | None) -> Self:
        """The same layer for a float linear of these dtypes; it is not linked.

        weight: of the float weight that the layer stands for, which its entry then names.
        bias: what the bias is cast to; None where the layer has none.
        """
        state = self.state_dict()
        if (self.bias is None) != (bias is None):
            raise ValueError(f"bias is {bias}, which does not fit {self.entry()}")
        if self.bias is not None:
            state["bias"] = self.bias.detach().to(bias)
        entry = self.entry() | {"dtype": dtype_name(weight)}
        entry["bias"] = None if bias is None else dtype_name(bias)
        with torch.device("meta"):
            made = self.from_entry(entry)
        made.load_state_dict(state, assign=True)
        return made

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
        """What the backends get of an input: (..., in_features) -> (..., any width).

        It is the same for all who share it, and done by their owner.
        """
        return self.quantized_input(x)

    def shared_tensors(self) -> list[Tensor]:
        """The tensors that `prepare` reads."""
        return self.own_tensors()

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

    @final  # type: ignore[misc]  # nn.Module declares it as an attribute
    def forward(self, x: Tensor, prepare_only: bool = False) -> Tensor:
        """The product with the weight, plus the bias, in the dtype of x; autocast has no effect.

        x: (..., in_features) of a float dtype.
        prepare_only: stop after `prepare`. accelerate brings the tensors of an offloaded layer back
            for calls of the layer alone, so that `prepared` calls the owner with this.
        Returns (..., out_features). Raises ValueError for another number of features, and where a
        backend that was forced cannot run.
        """
        if prepare_only:
            return self.prepare(x)
        check_shape("x", x, torch.Size((*x.shape[:-1], self.in_features)))
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.out_features)
        with _without_autocast(x.device):
            prepared = self.prepared(x)
            rows = prepared.reshape(-1, prepared.shape[-1])
            gradients = torch.is_grad_enabled() and (
                rows.requires_grad or any(tensor.requires_grad for tensor in self.own_tensors())
            )
            backend = choose(self, x.device, x.dtype, len(rows), gradients)
            with torch.set_grad_enabled(gradients):
                y = backend.multiply(self, self._repacked.of(self, backend), rows)
                y = y if self.bias is None else y + self.bias.to(y.dtype)
                return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def backend_for(
        self,
        tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        gradients: bool = False,
    ) -> Backend[Any]:
        """The backend that would run a forward.

        tokens: rows of the input, at least 1.
        dtype: of the input.
        device: None: where the layer is. A layer on the meta device can be asked for another one.
        gradients: whether the result must have a gradient.
        """
        there = self.own_tensors()[0].device if device is None else torch.device(device)
        return choose(self, there, dtype, tokens, gradients)

    def repack(self, tokens: int, dtype: torch.dtype = torch.float32) -> None:
        """Makes now what the backend for so many tokens would make in its first forward."""
        self._repacked.of(self, self.backend_for(tokens, dtype=dtype))

    def own_tensors(self) -> list[Tensor]:
        """The layer's parameters, without those of the owner."""
        return [tensor for tensor in self._parameters.values() if tensor is not None]

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

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without what was made for this layer."""
        return {**self.__dict__, "_last_input": LastInput(), "_repacked": Repacked()}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.entry().items())


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would round the products that a format needs exact."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
