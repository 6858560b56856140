"""The search of `lowbit.formats.lattice.search` in C: equal codes in a hundredth of the time."""

import ctypes

import torch
from torch import Tensor

from lowbit.kernels.native.library import INSTRUCTION_SETS, chosen, functions, threads

WORD = 8  # LOWBIT_WORD in search.h


class Call(ctypes.Structure):
    """lowbit_search_call in search.c."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("triples", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("vectors", ctypes.c_int64),
        ("each_shift", ctypes.c_int32),
        ("set", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    ]


def nearest(
    x: Tensor,
    triples: Tensor,
    numbers: Tensor,
    each_shift: bool,
    instruction_set: str | None = None,
) -> Tensor:
    """Returns the codes of the nearest words of E8P12.

    x: (vectors, 8) float32 on the CPU.
    triples: (29, 3) int32, the coordinates with magnitude 1/2 of the patterns of squared norm 12.
    numbers: (6561,) int32, the number of a pattern by its magnitudes minus 1/2, which are read as
        digits to the base 3.
    each_shift: whether to return the nearest words with +1/4 and those with -1/4.
    instruction_set: None: that of `chosen`.

    Returns (1, vectors) int32, or (2, vectors) with each_shift.
    """
    x = x.contiguous()
    codes = torch.empty(1 + each_shift, len(x), dtype=torch.int32)
    if len(x):
        call = Call(
            x=x.data_ptr(),
            codes=codes.data_ptr(),
            triples=triples.data_ptr(),
            numbers=numbers.data_ptr(),
            vectors=len(x),
            each_shift=each_shift,
            set=INSTRUCTION_SETS.index(instruction_set or chosen()),
            parallel=threads.loop,
        )
        functions().lowbit_nearest_words(ctypes.byref(call))
    return codes
