"""The operator that multiplies by a layer of trellis codes, decoded as they are stored."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.native.library import INSTRUCTION_SETS, chosen, functions, threads


class Code(ctypes.Structure):
    """lowbit_code in trellis.h."""

    _fields_ = [
        ("state_bits", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("values", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("multiplier", ctypes.c_uint32 * 2),
    ]


class Call(ctypes.Structure):
    """lowbit_trellis_call in trellis.c."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("code", Code),
        ("top", ctypes.c_int32),
        ("set", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class TrellisProduct:
    """How to multiply.

    state_bits, shift, values, multipliers: the code, as `formats/trellis` explains it.
    top: the largest number that inputs are rounded to; `planes.Rounding` explains it.
    """

    state_bits: int
    shift: int
    values: int
    multipliers: tuple[int, int]
    top: int


def multiply(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    how: TrellisProduct,
    instruction_set: str | None = None,
) -> Tensor:
    """Multiplies by a weight of trellis codes, with inputs that are rounded in pieces of 512.

    x: (tokens, inputs) of a float dtype; the product computes in float32.
    packed: (strips, tiles, bytes) uint8.
    scale: (outputs,) float32, by which the values of a row are multiplied.
    instruction_set: None: that of `chosen`.

    Returns (tokens, outputs) float32, the same to the last bit for every number of tokens and
    threads and for every instruction set.
    """
    x = x.float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    packed, scale = packed.contiguous(), scale.contiguous()
    y = x.new_empty(len(x), len(scale))
    if not x.numel():
        return y.zero_()
    multipliers = (ctypes.c_uint32 * 2)(*how.multipliers)
    call = Call(
        x=x.data_ptr(),
        packed=packed.data_ptr(),
        scale=scale.data_ptr(),
        y=y.data_ptr(),
        tokens=len(x),
        stride=x.stride(0),
        inputs=x.shape[1],
        outputs=len(scale),
        code=Code(how.state_bits, how.shift, how.values, packed.shape[2], multipliers),
        top=how.top,
        set=INSTRUCTION_SETS.index(instruction_set or chosen()),
        parallel=threads.loop,
    )
    if functions().lowbit_trellis_multiply(ctypes.byref(call)):
        raise MemoryError(f"a product of {len(x)} tokens needs more memory than there is")
    return y


# torch.compile cannot trace calls of ctypes.
_LIBRARY = torch.library.Library("lowbit_trellis", "DEF")
_LIBRARY.define(
    "multiply(Tensor x, Tensor packed, Tensor scale, int state_bits, int shift, int values, "
    "int first, int second, int top) -> Tensor"
)


def _multiply(  # noqa: PLR0913 (the fields of a TrellisProduct)
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    state_bits: int,
    shift: int,
    values: int,
    first: int,
    second: int,
    top: int,
) -> Tensor:
    how = TrellisProduct(state_bits, shift, values, (first, second), top)
    return multiply(x, packed, scale, how)


def _shape(x: Tensor, packed: Tensor, scale: Tensor, *code: int) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0], dtype=torch.float32)


_LIBRARY.impl("multiply", _multiply, "CPU")
_LIBRARY.impl("multiply", _shape, "Meta")


def multiply_op(x: Tensor, packed: Tensor, scale: Tensor, how: TrellisProduct) -> Tensor:
    """Multiplies as `multiply` does, through torch's dispatcher, so that it can be compiled."""
    result: Tensor = torch.ops.lowbit_trellis.multiply(
        x, packed, scale, how.state_bits, how.shift, how.values, *how.multipliers, how.top
    )
    return result
