"""Cuts rows or inputs out of a layer exactly, for tensor parallelism.

Layers in the formats uniform, nested and binary can be cut. The others transform or sort all inputs
of a layer together. So do uniform layers that rotate their inputs, whose rows alone can be cut.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import build
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.binary import BinaryLinear
from lowbit.formats.nested import NestedLinear
from lowbit.formats.uniform import UniformLinear
from lowbit.kernels.bits import pack, unpack

SALIENT_BITS = 4  # of a salient code and of a zero point of the format binary
Tensors = dict[str, Tensor]
Changes = dict[str, Any]


def rows_of(layer: QuantizedLinear, start: int, stop: int) -> QuantizedLinear:
    """Returns a layer of the outputs `start` to `stop`. Raises ValueError if it cannot be cut."""
    if (start, stop) == (0, layer.out_features):
        return layer
    changes: Changes = {"shape": [stop - start, layer.in_features]}
    return _cut(layer, ROWS, slice(start, stop), changes)


def inputs_of(layer: QuantizedLinear, start: int, stop: int) -> QuantizedLinear:
    """Returns a layer of the inputs `start` to `stop`. Raises ValueError if it cannot be cut."""
    if (start, stop) == (0, layer.in_features):
        return layer
    if isinstance(layer, UniformLinear) and layer.rotation is not None:
        raise ValueError(
            "it rotates all its inputs together, which cannot be cut: run it with "
            "tensor_parallel_size=1"
        )
    if layer.activation is not None:
        raise ValueError("it rounds each token by the range of all its inputs, which cannot be cut")
    changes: Changes = {"shape": [layer.out_features, stop - start]}
    return _cut(layer, INPUTS, slice(start, stop), changes)


def _cut(layer: QuantizedLinear, how: "How", part: slice, changes: Changes) -> QuantizedLinear:
    if layer.format not in how:
        raise ValueError(
            f"its format {layer.format} cannot be cut for tensor parallelism: allowed are "
            f"{', '.join(how)}; run it with tensor_parallel_size=1"
        )
    tensors, more = how[layer.format](layer, part)
    made = build(layer.entry() | changes | more)
    made.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()})
    return made


def _uniform_rows(layer: Any, part: slice) -> tuple[Tensors, Changes]:
    assert isinstance(layer, UniformLinear)
    state = _by_row(layer, ("packed", "scale"), part)
    if layer.zero is not None:
        width = layer.spec.bits + layer.spec.zero_shift
        state["zero"] = pack(layer.zeros().T[:, part].contiguous(), width)
    return state, {}


def _uniform_inputs(layer: Any, part: slice) -> tuple[Tensors, Changes]:
    assert isinstance(layer, UniformLinear)
    state = dict(layer.state_dict())
    state["packed"] = pack(layer.codes()[:, part].contiguous(), layer.spec.bits)
    groups = _groups(layer, part)
    state["scale"] = layer.scale[:, groups]
    if layer.zero is not None:
        state["zero"] = layer.zero[groups]
    return state, {}


def _nested_rows(layer: Any, part: slice) -> tuple[Tensors, Changes]:
    assert isinstance(layer, NestedLinear)
    state = _by_row(layer, ("master", "packed", "scale"), part)
    if layer.zero is not None:
        state["zero"] = layer.zero[:, part]
    if layer.slice_scale is not None:
        state["slice_scale"] = layer.slice_scale[:, part]
    if layer.slice_zero is not None:
        state["slice_zero"] = layer.slice_zero[:, :, part]
    if layer.overflow is not None:
        raise ValueError("it is a slice with extra precision, whose codes cannot be cut by row")
    return state, {}


def _nested_inputs(layer: Any, part: slice) -> tuple[Tensors, Changes]:
    assert isinstance(layer, NestedLinear)
    if layer.overflow is not None:
        raise ValueError("it is a slice with extra precision, whose codes cannot be cut by input")
    state, groups = dict(layer.state_dict()), _groups(layer, part)
    if layer.spec.resident == "master":
        state["master"] = layer.master[:, part]
    else:
        state["packed"] = pack(layer.codes()[:, part].contiguous(), layer.bits)
    state["scale"] = layer.scale[:, groups]
    if layer.zero is not None:
        state["zero"] = layer.zero[groups]
    if layer.slice_scale is not None:
        state["slice_scale"] = layer.slice_scale[:, :, groups]
    if layer.slice_zero is not None:
        state["slice_zero"] = layer.slice_zero[:, groups]
    return state, {}


def _binary_rows(layer: Any, part: slice) -> tuple[Tensors, Changes]:
    assert isinstance(layer, BinaryLinear)
    names = ("sign", "row_scale", "row_mean", "salient", "salient_scale")
    state = _by_row(layer, names, part)
    if "salient_zero" in state:
        zeros = unpack(state["salient_zero"][None], SALIENT_BITS, layer.out_features)
        state["salient_zero"] = pack(zeros[:, part].contiguous(), SALIENT_BITS)[0]
    return state, {}


def _binary_inputs(layer: Any, part: slice) -> tuple[Tensors, Changes]:
    assert isinstance(layer, BinaryLinear)
    if layer.shares is not None:
        raise ValueError(f"its mask is that of {layer.shares}, which is not cut in the same way")
    state, columns = dict(layer.state_dict()), layer.in_features
    mask = torch.zeros(columns, dtype=torch.bool)
    if layer.spec.salient:
        mask = unpack(state["mask"][None], 1, columns)[0].bool()
    mine = mask[part]
    salient, plain = int(mine.sum()), int((~mine).sum())
    if not plain:
        raise ValueError("one device would hold salient inputs only")
    before = int((~mask[: part.start]).sum())
    signs = unpack(state["sign"], 1, columns - layer.spec.salient)
    state["sign"] = pack(signs[:, before : before + plain].contiguous(), 1)
    if "column_scale" in state:
        state["column_scale"] = state["column_scale"][before : before + plain]
    if not salient:
        for name in ("salient", "salient_scale", "salient_zero", "mask"):
            state.pop(name, None)
        return state, {"salient": 0}
    first = int(mask[: part.start].sum())
    codes = unpack(state["salient"], SALIENT_BITS, layer.spec.salient)
    state["salient"] = pack(codes[:, first : first + salient].contiguous(), SALIENT_BITS)
    state["mask"] = pack(mine.to(torch.uint8)[None], 1)[0]
    return state, {"salient": salient}


def _by_row(layer: QuantizedLinear, names: tuple[str, ...], part: slice) -> Tensors:
    """Returns the tensors of a layer, of which those named here have one row for each output."""
    state = dict(layer.state_dict())
    return {name: t[part] if name in names else t for name, t in state.items()}


def _groups(layer: "UniformLinear | NestedLinear", part: slice) -> slice:
    """Returns the groups of inputs. Raises ValueError if they are no whole groups."""
    size = layer.spec.group_size
    if size is None or size >= layer.in_features:
        return slice(None)
    if part.start % size or (part.stop % size and part.stop != layer.in_features):
        raise ValueError(
            f"the {part.stop - part.start} inputs of one device are no whole groups of {size}: "
            "choose another tensor_parallel_size, or quantize with smaller groups"
        )
    return slice(part.start // size, -(-part.stop // size))


How = dict[str, Callable[[Any, slice], tuple[Tensors, Changes]]]
ROWS: How = {"uniform": _uniform_rows, "nested": _nested_rows, "binary": _binary_rows}
INPUTS: How = {"uniform": _uniform_inputs, "nested": _nested_inputs, "binary": _binary_inputs}
