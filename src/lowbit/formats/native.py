"""What the backends named "cpu" of all formats share: products with the compiled kernels."""

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lowbit.formats.backend import Backend
from lowbit.formats.together import has_version
from lowbit.kernels.native import (
    Part,
    Rounding,
    multiply_op,
    pack_layer,
    packed_size,
    stored_codes,
    why_not,
)

if TYPE_CHECKING:
    from lowbit.formats.base import QuantizedLinear

Layer = TypeVar("Layer", bound="QuantizedLinear")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of inputs; sums are not exact to float64


class NativeBackend(Backend[Layer]):
    """Multiplies integer codes by rounded inputs with the kernels of `lowbit.kernels.native`.

    A format says in `parts` how its weight is made of codes and scales. Inputs that the format does
    not round itself are rounded to `layer.input_bits` bits for each group of inputs.
    """

    name = "cpu"

    def supports(
        self, layer: Layer, device: torch.device, dtype: torch.dtype, tokens: int, gradients: bool
    ) -> bool:
        return device.type == "cpu" and dtype in DTYPES and not gradients and why_not() is None

    @abstractmethod
    def parts(self, layer: Layer) -> list[Part]:
        """Returns the one or two parts of the layer's weight."""

    def repack(self, layer: Layer) -> dict[str, Tensor]:
        return {"layer": pack_layer(self.parts(layer), layer.out_features)}

    def restorable(self, layer: Layer) -> dict[str, tuple[int, int, int]]:
        """Returns the stored tensors that the packed layer holds exactly.

        For each name, the number of the part that holds its codes, their bits, and the codes of a
        row.
        """
        return {}

    def packed_bytes(self, layer: Layer) -> tuple[int, int]:
        """Returns the bytes of the packed layer, and those of the stored codes that it can replace.

        layer: it may be on the meta device.
        """
        freed = sum(getattr(layer, name).nbytes for name in self.restorable(layer))
        return packed_size(self.parts(layer), layer.out_features), freed

    def free(self, layer: Layer) -> bool:
        """Packs the layer and frees what the packed layer holds; returns whether that is anything.

        A tensor is not freed if it has other bits than its codes, in the last bytes of rows.
        """
        if any(tensor.is_inference() or tensor.requires_grad for tensor in layer.own_tensors()):
            return False  # their changes could not be noticed
        if layer._freed:
            return True
        packed, freed = layer._repacked.of(layer, self), False
        for name, (part, bits, codes) in self.restorable(layer).items():
            stored = getattr(layer, name)
            restore = partial(stored_codes, packed["layer"], part, tuple(stored.shape), bits)
            # Restoring all would leave holes in memory, a quarter of a model's size.
            if codes * bits % 8 == 0 or torch.equal(restore(), stored):
                layer.free(name, restore)
                freed = True
        if freed:
            # The small tensors that stay may be views of the whole file, mapped into memory.
            for tensor in layer.own_tensors():
                tensor.data = tensor.data.clone()
            layer._repacked.keep(layer, self, packed)
        return freed

    def prepared_with(self, layer: Layer) -> tuple[Any, ...] | None:
        """Returns what the result of `prepare` depends on besides its input.

        Layers prepare an input in the same way if these are equal (==). None: unknown.
        """
        owner = layer.owner
        tensors = owner.shared_tensors()
        if any(tensor.is_meta for tensor in tensors):
            return None
        return (owner, *((id(t), t._version, t.data_ptr()) for t in tensors))

    def product(self, layer: Layer, x: Tensor) -> Tensor:
        """Multiplies as `Backend.product` does; see `Together` for layers with the same input."""
        packed = layer._repacked.of(layer, self)
        key = self.prepared_with(layer) if has_version(x) else None
        if key is None:
            return self.multiply(layer, packed, self.prepare(layer, x))

        def multiply(layers: list["QuantizedLinear"], weights: list[Tensor]) -> list[Tensor]:
            outputs = [one.out_features for one in layers]
            return multiply_op(self.prepare(layer, x), weights, outputs)

        state = (self, x._version, *key)
        y = layer._together.product(layer, x, state, packed["layer"], multiply)
        return self.finish(layer, y)

    def multiply(self, layer: Layer, packed: dict[str, Tensor], prepared: Tensor) -> Tensor:
        y = multiply_op(prepared, [packed["layer"]], [layer.out_features])[0]
        return self.finish(layer, y)

    def finish(self, layer: Layer, y: Tensor) -> Tensor:
        """Returns the layer's product, given that of its packed weight."""
        return y


def rounding(layer: "QuantizedLinear") -> Rounding:
    """Returns how the inputs of a layer are rounded that does not round them itself."""
    return Rounding.bits(layer.input_bits)
