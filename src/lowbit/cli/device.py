"""Converts --device to the device_map of transformers."""

import torch

from lowbit.device import choose_device


def device_map(device: str) -> str | None:
    """Returns a device_map for --device; auto: all GPUs, or None for the CPU if there are none."""
    chosen = choose_device(device)
    if device == "auto" and chosen.type != "cpu":
        return "auto"
    return None if chosen == torch.device("cpu") else str(chosen)
