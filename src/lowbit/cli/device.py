"""--device to transformers' device_map."""

import torch

from lowbit.pipeline.options import choose_device


def device_map(device: str) -> str | None:
    """auto: over all GPUs that there are, and None, the CPU, where there is none."""
    chosen = choose_device(device)
    if device == "auto" and chosen.type == "cuda":
        return "auto"
    return None if chosen == torch.device("cpu") else str(chosen)
