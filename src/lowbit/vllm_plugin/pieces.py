"""Collects the tensors that vLLM loads, and builds lowbit's layers of them. It needs no vLLM."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.checkpoint.layers import check_tensor
from lowbit.formats import build
from lowbit.formats.base import QuantizedLinear
from lowbit.vllm_plugin.cutting import inputs_of, rows_of

Entries = Mapping[str, dict[str, Any]]  # of config.json, by name
Shard = Any  # what vLLM calls a part of a stack: "q", "k", "v", a number, or several numbers
QKV = {"q": 0, "k": 1, "v": 2}
FLOAT_WEIGHT = "weight"  # of a linear that is not quantized, or the empty placeholder


class FloatLinear(nn.Module):
    """A part of a stack that is not quantized."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))

    def dequantize(self) -> Tensor:
        return self.weight.detach().float()


class Pieces:
    """The tensors of some linears, as vLLM loads them one after the other.

    A placeholder parameter of each tensor stands in the layer of vLLM, because it loads what it
    finds there by name. Its `weight_loader` keeps the tensor here instead.
    """

    def __init__(self) -> None:
        self.found: dict[Any, dict[str, Tensor]] = defaultdict(dict)

    def register(self, layer: nn.Module, names: Sequence[str], load: Callable[..., Any]) -> None:
        """Adds placeholders to a layer.

        names: of the tensors.
        load: called with the name of the tensor and then the arguments of a weight_loader.
        """
        for name in names:
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = _bound(load, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def keep(self, owner: Any, name: str, tensor: Tensor) -> None:
        """Keeps a tensor of one linear. owner: which linear"""
        with torch.inference_mode(False):  # else no backend could keep what it derives of it
            self.found[owner][name] = tensor.clone()

    def take(self) -> dict[Any, dict[str, Tensor]]:
        """Returns all tensors by owner, and keeps none."""
        found, self.found = dict(self.found), defaultdict(dict)
        return found


def _bound(load: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda *arguments, **more: load(name, *arguments, **more)


def tensor_names(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names of all tensors that layers of these entries may have, except the bias."""
    names = {FLOAT_WEIGHT}
    for entry in entries:
        with torch.device("meta"):
            names |= build(entry).state_dict().keys()
    return sorted(names - {"bias"})


def place_in_stack(shard: Shard) -> int:
    """Returns a number by which the parts of a stack are in the order of their outputs."""
    if shard is None:
        return 0
    if isinstance(shard, tuple):
        return int(shard[0])
    return QKV[shard] if isinstance(shard, str) else int(shard)


def built(name: str, entry: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the layer of some tensors.

    name: of the linear, for errors.
    entry: its entry in config.json; None: it is not quantized.

    Raises ValueError, with the name of the linear, if tensors are missing or have another shape.
    """
    if entry is None:
        if tensors.get(FLOAT_WEIGHT) is None:
            raise ValueError(f"layer {name}: the tensor {FLOAT_WEIGHT} is missing")
        return FloatLinear(tensors[FLOAT_WEIGHT])
    with torch.device("cpu"):
        layer = build(entry | {"bias": None})  # vLLM adds the bias
    state = layer.state_dict()
    for key, wanted in state.items():
        if key not in tensors:
            raise ValueError(
                f"layer {name}: the tensor {key} is missing: copy the folder from its source again"
            )
        try:
            check_tensor(f"{name}.{key}", tuple(tensors[key].shape), tensors[key].dtype, wanted)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    layer.load_state_dict({key: tensors[key] for key in state}, assign=True)
    layer.stored_as = name
    return layer


def part_of_layer(layer: Any, rows: tuple[int, int], inputs: tuple[int, int]) -> Any:
    """Returns the outputs and inputs of a layer that one device holds, each as (start, stop)."""
    if isinstance(layer, FloatLinear):
        return FloatLinear(layer.weight.detach()[slice(*rows), slice(*inputs)].contiguous())
    try:
        return inputs_of(rows_of(layer, *rows), *inputs)
    except ValueError as error:
        raise ValueError(f"layer {layer.stored_as}: {error}") from None


class Linker:
    """Links layers that share tensors, in whatever order they are built."""

    def __init__(self) -> None:
        self._built: dict[str, QuantizedLinear] = {}
        self._waiting: dict[str, QuantizedLinear] = {}

    def add(self, name: str, layer: Any) -> None:
        """Links a new layer, and those that waited for it."""
        if not isinstance(layer, QuantizedLinear):
            return
        self._built[name] = layer
        if layer.shares is not None:
            self._waiting[name] = layer
        for other, waiting in list(self._waiting.items()):
            if waiting.shares in self._built:
                waiting.link(self._built[waiting.shares])
                del self._waiting[other]
