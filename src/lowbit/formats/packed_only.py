"""Layers that keep their codes only as the compiled kernels read them, to save memory.

The stored tensors of such a layer are freed. Each is made again from the packed layer, byte for
byte, where code asks for it: to dequantize, for another backend, for a state dict, a copy or a
pickle. What would change the layer puts them back first.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class PackedOnly(nn.Module):
    """Base class of layers that can free stored tensors.

    _freed: for each freed tensor, what makes it again, and its bytes.
    """

    _freed: dict[str, tuple[Callable[[], Tensor], int]]

    def free(self, name: str, restore: Callable[[], Tensor]) -> None:
        """Frees a parameter. restore: returns its values."""
        parameter = self._parameters[name]
        assert parameter is not None
        self._freed[name] = restore, parameter.nbytes
        del self._parameters[name]

    def put_back(self) -> Self:
        """Puts the freed tensors back, in the order in which they were registered."""
        if self._freed:
            restored = {name: _frozen(restore()) for name, (restore, _) in self._freed.items()}
            self._freed = {}
            self._parameters = {**restored, **self._parameters}
        return self

    def __getattr__(self, name: str) -> Any:
        freed = self.__dict__.get("_freed")
        if freed and name in freed:
            return freed[name][0]()
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, (restore, _) in self._freed.items():
            destination[prefix + name] = restore()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.put_back()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the stored tensors."""
        restored = {name: _frozen(restore()) for name, (restore, _) in self._freed.items()}
        return {**self.__dict__, "_freed": {}, "_parameters": {**restored, **self._parameters}}


def _frozen(tensor: Tensor) -> nn.Parameter:
    with torch.inference_mode(False):
        return nn.Parameter(tensor, requires_grad=False)
