"""What an entry states of the tensors of a quantized folder, and how a replay is compared.

Integer tensors have hashes. Float tensors are in a file of the entry, because another processor may
compute the last bits of them differently; those that equal the float model's are left out.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.ranges import collapse

CLOSE = 1e-6  # the largest difference of float tensors, as a share of the value


def tensor_sha256(tensor: Tensor) -> str:
    """Returns a hash of dtype, shape and values."""
    said = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode()
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(said + values.view(torch.uint8).numpy().tobytes()).hexdigest()


def layers_sha256(modules: Mapping[str, Any]) -> str:
    """Returns a hash of the entries of all layers. modules: as config.json has them"""
    text = json.dumps(modules, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def layers_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the entries of all layers as config.json has them, from the records of shards."""
    return collapse({name: each for r in records for name, each in r.get("modules", {}).items()})


def is_close(tensor: Tensor, stated: Tensor) -> bool:
    """Returns whether a float tensor is what was stated of it.

    Values may differ by CLOSE, or by one step where the dtype has larger steps.
    """
    if tensor.dtype != stated.dtype or tensor.shape != stated.shape:
        return False
    share = max(CLOSE, torch.finfo(stated.dtype).eps)
    return torch.allclose(tensor.float(), stated.float(), rtol=share, atol=0.0)


def differing(
    tensors: Mapping[str, Tensor], integers: Mapping[str, str], floats: Mapping[str, Tensor]
) -> dict[str, str]:
    """Returns how tensors differ from what an entry states of them, by name.

    tensors: those of a shard, by name on disk. Float tensors of which nothing is stated are those
        of the float model.
    integers: the hashes of all integer tensors.
    floats: the float tensors that differ from the float model's.
    """
    found = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            if name in floats and not is_close(tensor, floats[name]):
                found[name] = "differs by more than the last bit"
        elif name not in integers:
            found[name] = "is not in the entry"
        elif tensor_sha256(tensor) != integers[name]:
            found[name] = "has other integers"
    return found
