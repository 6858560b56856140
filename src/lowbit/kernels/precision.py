"""The precision of the matrix products with which blocks are trained and run while quantizing.

Where it pays, code runs `with faster():`, whose products are as precise as the run's option
`compute` says. Everything else, such as statistics, Hessians, Cholesky factors and the choice of
codes, is outside of it and computes in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]

_chosen: ContextVar[tuple[Precision, str]] = ContextVar("lowbit_compute", default=("float32", ""))


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Chooses the precision of products in `faster`, for a run on a device."""
    token = _chosen.set((precision, device.type))
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def faster(backward: bool = False) -> Iterator[None]:
    """Computes matrix products with the chosen precision in this context.

    backward: whether gradients are computed; they have the precision of what they belong to.
    """
    precision, device = _chosen.get()
    if precision == "bfloat16" and not backward:
        with torch.autocast(device, torch.bfloat16):
            yield
    elif precision == "tf32":
        with _tf32(True):
            yield
    else:
        yield


@contextmanager
def exact() -> Iterator[None]:
    """Computes in float32 in this context, also inside of `faster`."""
    precision, device = _chosen.get()
    if precision == "bfloat16":
        with torch.autocast(device, enabled=False):
            yield
    elif precision == "tf32":
        with _tf32(False):
            yield
    else:
        yield


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
