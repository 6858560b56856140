"""A stand-in of the interface through which vLLM (0.32) loads and runs quantized layers.

It has the classes that `lowbit.vllm_plugin` imports, and blocks whose linears are stacked, created,
loaded and called as vLLM does it. The plugin was run with vLLM itself by hand: see
benchmarks/engines.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.checkpoint import CheckpointReader

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
REGISTERED: dict[str, Any] = {}


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class MethodBase:
    pass


class FusedMoEMethodBase(MethodBase):
    def __init__(self, moe: Any) -> None:
        self.moe = moe


class UnquantizedLinearMethod(MethodBase):
    pass


class Layer(nn.Module):
    """A linear, or several that are stacked, as one of several devices holds it.

    sizes: outputs of each linear on this device.
    inputs: inputs on this device.
    """

    def __init__(
        self, config: Any, prefix: str, sizes: list[int], inputs: int, rank: int = 0, of: int = 1
    ) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = rank, of
        self.quant_method = config.get_quant_method(self, prefix)
        if not isinstance(self.quant_method, UnquantizedLinearMethod):
            self.quant_method.create_weights(
                self, inputs, sizes, inputs, sum(sizes), torch.float32, weight_loader=None
            )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.quant_method.apply(self, x, bias)


class LinearBase(Layer):
    pass


class ParallelLMHead(Layer):
    pass


class RoutedExperts(nn.Module):
    def __init__(self, config: Any, prefix: str, experts: int, tp_size: int = 1) -> None:
        super().__init__()
        parallel = SimpleNamespace(tp_size=tp_size, ep_size=1)
        self.moe_config = SimpleNamespace(num_experts=experts, moe_parallel_config=parallel)
        self.ckpt_gate_proj_name, self.ckpt_up_proj_name = "gate_proj", "up_proj"
        self.ckpt_down_proj_name, self.activation = "down_proj", "silu"
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(self, experts, 0, 0, torch.float32, weight_loader=None)


def apply_moe_activation(activation: str, output: Tensor, hidden: Tensor) -> None:
    gate, up = hidden.chunk(2, -1)
    output.copy_(functional.silu(gate) * up)


class Renaming:
    """A WeightsMapper that adds a prefix."""

    def apply_list(self, names: list[str]) -> list[str]:
        return [f"language_model.{name}" for name in names]

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.apply_list(list(values)), values.values(), strict=True))


def load(module: nn.Module, last: str, tensors: dict[str, Tensor]) -> None:
    """Loads the tensors of one linear (by name within it) into the module that stacks it."""
    for name, tensor in tensors.items():
        parameter: Any = getattr(module, name)
        if last in SHARDS:
            parameter.weight_loader(parameter, tensor, SHARDS[last])
        else:
            parameter.weight_loader(parameter, tensor)


def load_expert(module: nn.Module, number: int, last: str, tensors: dict[str, Tensor]) -> None:
    shard = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[last]
    for name, tensor in tensors.items():
        full = f"{'w2' if shard == 'w2' else 'w13'}_{name}"
        parameter: Any = getattr(module, full)
        loaded = parameter.weight_loader(
            param=parameter,
            loaded_weight=tensor,
            weight_name=full,
            shard_id=shard,
            expert_id=number,
            return_success=True,
        )
        assert loaded


def tensors_of(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one linear of a folder by name within it; a layer of vLLM adds the bias."""
    reader = CheckpointReader(folder)
    mine = [n for n in reader.tensors if n.rpartition(".")[0] == name and not n.endswith(".bias")]
    return {full.rpartition(".")[2]: tensor for full, tensor in reader.read(mine).items()}


def modules(additional: Any) -> dict[str, ModuleType]:
    """The modules that the plugin imports, by name."""

    def register(name: str) -> Any:
        return lambda made: REGISTERED.setdefault(name, made)

    layers = "vllm.model_executor.layers"
    content: dict[str, dict[str, Any]] = {
        "vllm.config": {
            "get_current_vllm_config": lambda: SimpleNamespace(additional_config=additional)
        },
        f"{layers}.fused_moe": {"RoutedExperts": RoutedExperts},
        f"{layers}.fused_moe.activation": {"apply_moe_activation": apply_moe_activation},
        f"{layers}.fused_moe.fused_moe_method_base": {"FusedMoEMethodBase": FusedMoEMethodBase},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": MethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{layers}.quantization": {"register_quantization_config": register},
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{layers}.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
    }
    names = {name.rsplit(".", i)[0] for name in content for i in range(name.count(".") + 1)}
    made = {name: ModuleType(name) for name in names}
    for name, values in content.items():
        vars(made[name]).update(values)
    return made


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts the stand-in where vLLM would be; its `additional` is vLLM's additional_config."""
    additional: dict[str, Any] = {}
    for name, module in modules(additional).items():
        monkeypatch.setitem(sys.modules, name, module)
    ours = [f"lowbit.vllm_plugin.{part}" for part in ("config", "linear", "experts")]
    for name in ours:
        sys.modules.pop(name, None)
    REGISTERED.clear()
    import lowbit.vllm_plugin

    lowbit.vllm_plugin.register()

    def config(section: dict[str, Any]) -> Any:
        made = REGISTERED["lowbit"].from_config(section)
        made.packed_modules_mapping = PACKED
        return made

    yield SimpleNamespace(config=config, additional=additional)
    for name in ours:
        sys.modules.pop(name, None)
