"""Whether Triton's kernels can run on a device."""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

from lowbit.kernels.native.library import turned_off

DEVICES = ("cuda", "xpu")  # torch calls AMD's GPUs cuda too
INTERPRET = "TRITON_INTERPRET"  # Triton's own variable, read when its kernels are imported


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors and slowly, to test them."""
    return os.environ.get(INTERPRET) == "1"


@torch.compiler.assume_constant_result
def why_not(device_type: str) -> str | None:
    """Returns why torch computes instead of Triton's kernels; None: the kernels run.

    The first call for a GPU compiles and runs a small kernel there.

    device_type: type of the tensors' device.
    """
    if (off := turned_off()) is not None:
        return off
    if interpreted():
        return "Triton's interpreter is for tests; it runs where it is forced"
    if device_type not in DEVICES:
        return f"Triton has no kernels for {device_type}"
    return _problem(device_type)


@lru_cache
def _problem(device_type: str) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'lowbit[gpu]'"
    try:
        from lowbit.kernels.triton.arrange import arrange

        arrange(torch.ones(1, 1, device=device_type), unit=1)
        torch.get_device_module(device_type).synchronize()
    except Exception as error:  # of the compiler, the driver or the device, of many classes
        return f"Triton cannot run a kernel on {device_type}: {error}"
    return None
