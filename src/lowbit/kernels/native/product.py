"""The operator that multiplies by packed layers."""

import ctypes

import torch
from torch import Tensor

from lowbit.kernels.native.library import INSTRUCTION_SETS, chosen, functions, threads


class Call(ctypes.Structure):
    """lowbit_call in dispatch.c."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("set", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("layers", ctypes.POINTER(ctypes.c_void_p)),
        ("outputs", ctypes.POINTER(ctypes.c_void_p)),
        ("parallel", ctypes.c_void_p),
    ]


def multiply(
    x: Tensor, layers: list[Tensor], outputs: list[int], instruction_set: str | None = None
) -> list[Tensor]:
    """Multiplies by one or more packed layers that round the same input in the same way.

    x: (tokens, inputs) of a float dtype; the product computes in float32.
    layers: results of `pack_layer` for this instruction set.
    outputs: rows of each layer.
    instruction_set: None: that of `chosen`.

    Returns a float32 tensor (tokens, rows) for each layer. Each is the same, to the last bit, for
    every number of tokens and threads and for every instruction set.
    """
    name = instruction_set or chosen()
    x = x.float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    results = [x.new_empty(len(x), count) for count in outputs]
    if not x.numel():
        return [result.zero_() for result in results]
    pointers = ctypes.c_void_p * len(layers)
    call = Call(
        x=x.data_ptr(),
        tokens=len(x),
        stride=x.stride(0),
        set=INSTRUCTION_SETS.index(name),
        count=len(layers),
        layers=pointers(*(layer.data_ptr() for layer in layers)),
        outputs=pointers(*(result.data_ptr() for result in results)),
        parallel=threads.loop,
    )
    if functions().lowbit_multiply(ctypes.byref(call)):
        raise MemoryError(f"a product of {len(x)} tokens needs more memory than there is")
    return results


# torch.compile cannot trace calls of ctypes. `Library.define` costs 7 us a call, a custom_op 10.
_LIBRARY = torch.library.Library("lowbit_native", "DEF")
_LIBRARY.define("multiply(Tensor x, Tensor[] layers, int[] outputs) -> Tensor[]")


def _multiply(x: Tensor, layers: list[Tensor], outputs: list[int]) -> list[Tensor]:
    return multiply(x, layers, outputs)


def _shapes(x: Tensor, layers: list[Tensor], outputs: list[int]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], count, dtype=torch.float32) for count in outputs]


_LIBRARY.impl("multiply", _multiply, "CPU")
_LIBRARY.impl("multiply", _shapes, "Meta")


def multiply_op(x: Tensor, layers: list[Tensor], outputs: list[int]) -> list[Tensor]:
    """Multiplies as `multiply` does, through torch's dispatcher, so that it can be compiled."""
    result: list[Tensor] = torch.ops.lowbit_native.multiply(x, layers, outputs)
    return result
