"""The Viterbi encoder of `lowbit.solvers.viterbi` in C: equal bytes in a hundredth of the time."""

import ctypes

import torch
from torch import Tensor

from lowbit.kernels.native.library import INSTRUCTION_SETS, chosen, functions, threads

SEQUENCE = 256  # weights of a sequence, LOWBIT_SEQUENCE in viterbi.h


class Call(ctypes.Structure):
    """lowbit_encode_call in viterbi.c."""

    _fields_ = [
        ("target", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("state_bits", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("values", ctypes.c_int32),
        ("set", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
        ("failed", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


def encode(target: Tensor, table: Tensor, shift: int, instruction_set: str | None = None) -> Tensor:
    """Returns the codes of the bit strings that are nearest to the targets.

    target: (sequences, 256) float32 on the CPU; NaN: any value will do.
    table: (values, 2**state_bits) float32, the values of each state, where values is 1 or 2.
    shift: bits of a step, 1 to 5.
    instruction_set: None: that of `chosen`.

    Returns (sequences, 256 / values * shift / 8) uint8.
    """
    values, states = table.shape
    target, table = target.contiguous(), table.contiguous()
    codes = torch.empty(len(target), target.shape[1] // values * shift // 8, dtype=torch.uint8)
    if not len(target):
        return codes
    call = Call(
        target=target.data_ptr(),
        table=table.data_ptr(),
        codes=codes.data_ptr(),
        sequences=len(target),
        state_bits=states.bit_length() - 1,
        shift=shift,
        values=values,
        set=INSTRUCTION_SETS.index(instruction_set or chosen()),
        parallel=threads.loop,
    )
    if functions().lowbit_encode(ctypes.byref(call)):
        raise MemoryError(f"encoding {states} states needs more memory than there is")
    return codes
