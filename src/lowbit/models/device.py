"""Chooses the device on which a command computes."""

import torch


def choose_device(name: str) -> torch.device:
    """Returns the device of a name; "auto": the first CUDA device if there is one, else the CPU.

    Raises ValueError for an unknown name, and for a CUDA device that does not exist.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not known: use cpu, cuda:N or auto")
    available = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ValueError(
            f"device {name!r} does not exist: torch finds {available} CUDA devices; use cpu, auto "
            "or a lower number"
        )
    return device
