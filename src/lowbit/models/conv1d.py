"""GPT-2's Conv1D as an nn.Linear: the same layer, with a weight that is stored transposed.

transformers' Conv1D computes x @ weight + bias with a weight of (in, out). In a skeleton each of
them becomes a `TransposedLinear`, so that everything that knows nn.Linear knows it too. Its state
dict is that of the Conv1D: the weight is transposed while it is read, and again when it is written.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class TransposedLinear(nn.Linear):
    """A linear layer whose weight is (in, out) in its state dict, as Conv1D stores it."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        name = f"{prefix}weight"
        if name in own:
            own[name] = own[name].T.contiguous()
        super()._load_from_state_dict(own, prefix, *args)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T


def linears_for_conv1d(model: PreTrainedModel) -> None:
    """Replaces every Conv1D of a model on the meta device by a `TransposedLinear`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            rows, columns = module.nf, module.nx
            linear = TransposedLinear(columns, rows, bias=module.bias is not None, device="meta")
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, linear)


def as_on_disk(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Returns a tensor of a module as the checkpoint stores it, or back: both are the same step.

    module: an ancestor of the tensor's module, such as the block.
    name: the tensor's name in `module`, such as "attn.c_attn.weight".
    """
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    transposed = isinstance(owner, TransposedLinear) and attribute == "weight"
    return tensor.T.contiguous() if transposed else tensor
