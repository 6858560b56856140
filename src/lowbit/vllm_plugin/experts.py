"""What vLLM calls for the experts of a mixture."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from lowbit.vllm_plugin.pieces import Entries, Linker, Pieces, built, tensor_names

INNER, OUTER = ("w1", "w3"), "w2"  # vLLM's names: gate and up; down
STACKS = {"w1": "w13", "w3": "w13", "w2": "w2"}  # prefix of the names of a matrix's tensors


class LowbitExpertsMethod(FusedMoEMethodBase):
    """Runs lowbit's layers of one expert after the other, on the tokens that chose it.

    names: names of the matrices of all experts by (number, "w1" | "w2" | "w3").
    entries: the entries of config.json by name; a matrix without one is not quantized.
    linker: links layers that share tensors.

    Raises ValueError for what is not built: several devices, and experts with a bias.
    """

    def __init__(
        self, moe: Any, names: dict[tuple[int, str], str], entries: Entries, linker: Linker
    ) -> None:
        super().__init__(moe)
        self.names, self.linker = names, linker
        self.entries = {name: entries.get(name) for name in names.values()}
        parallel = moe.moe_parallel_config
        first = next(iter(self.entries))
        if parallel.tp_size > 1 or parallel.ep_size > 1:
            raise ValueError(
                f"layer {first}: experts in lowbit's formats are not shared among devices: run "
                "them with tensor_parallel_size=1, without expert parallelism"
            )
        biased = [name for name, e in self.entries.items() if e is not None and e["bias"]]
        if biased:
            raise ValueError(f"layer {biased[0]}: it is an expert with a bias, which is not built")
        self.pieces = Pieces()

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """Adds a placeholder of every tensor to the layer; all experts have the same."""
        names = tensor_names([entry for entry in self.entries.values() if entry is not None])
        stacked = [f"{stack}_{name}" for stack in dict.fromkeys(STACKS.values()) for name in names]
        self.pieces.register(layer, stacked, self._load)

    def _load(
        self,
        name: str,
        param: Any,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        part = name.removeprefix(f"{STACKS[shard_id]}_")
        self.pieces.keep((expert_id, shard_id), part, loaded_weight)
        return True if return_success else None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replaces the placeholders by lowbit's layers."""
        found = self.pieces.take()
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        for name in [name for name, p in layer.named_parameters() if not p.numel()]:
            delattr(layer, name)
        layer.lowbit = nn.ModuleDict()
        for (number, shard), name in self.names.items():
            with torch.inference_mode(False):
                part = built(name, self.entries[name], found.pop((number, shard), {})).to(device)
            self.linker.add(name, part)
            layer.lowbit[f"{number}_{shard}"] = part

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """Returns None: no kernel of vLLM runs the experts."""
        return None

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Returns the weighted sum of the experts that each token chose.

        x: (tokens, hidden).
        topk_weights, topk_ids: (tokens, k), the weights and numbers of the experts.
        """
        weights = topk_weights.to(x.dtype)
        before = bool(getattr(layer, "apply_router_weight_on_input", False))
        output = torch.zeros_like(x)
        for number in {number for number, _ in self.names}:
            tokens, place = (topk_ids == number).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            factor = weights[tokens, place, None]
            rows = x[tokens] * factor if before else x[tokens]
            made = self._expert(layer, number, rows)
            output.index_add_(0, tokens, made if before else made * factor)
        return output

    def _expert(self, layer: Any, number: int, x: Tensor) -> Tensor:
        """Returns what one expert makes of some tokens: (tokens, hidden)."""
        parts = layer.lowbit
        inner = [parts[f"{number}_{shard}"](x) for shard in INNER if (number, shard) in self.names]
        hidden = torch.cat(inner, -1)
        activated = hidden.new_empty(len(hidden), inner[0].shape[-1])
        apply_moe_activation(layer.activation, activated, hidden)
        result: Tensor = parts[f"{number}_{OUTER}"](activated)
        return result
