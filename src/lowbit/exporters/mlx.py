"""The target `mlx`: mlx-lm on Apple silicon.

Of a layer of (out, in) with codes of `bits` bits it stores:

| name     | dtype  | shape                 | holds                             |
| -------- | ------ | --------------------- | --------------------------------- |
| `weight` | uint32 | (out, in * bits / 32) | the codes of a row, low first     |
| `scales` | float  | (out, groups)         |                                   |
| `biases` | float  | (out, groups)         | -scale * zero point               |

    weight = scales * code + biases

Since `biases` are float, zero points may be fractions of a code. A layer that no group size of mlx
fits is stored in float.

Source: github.com/ml-explore/mlx, docs of mlx.core.quantize.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.exporters.bitstream import by_column, stream_codes
from lowbit.exporters.exporter import StoredLayer, grid_for, regrouping
from lowbit.exporters.folder import FolderExporter, float_weight
from lowbit.exporters.grid import Grid, largest_group, regrouped, widened
from lowbit.formats.base import QuantizedLinear
from lowbit.kernels.bits import pack

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)
# Architectures of mlx_lm.models (mlx-lm 0.32) that lowbit's folders can have; others cannot run.
ARCHITECTURES = frozenset(
    (
        "afmoe apertus bailing_moe baichuan_m1 cohere cohere2 dbrx deepseek deepseek_v2 "
        "deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone exaone4 falcon_h1 gemma gemma2 gemma3 "
        "gemma3_text gemma3n gemma4 gemma4_text glm glm4 glm4_moe gpt_bigcode gpt_neox gptj "
        "gpt_oss granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2 "
        "internlm3 jamba lfm2 lfm2_moe llama llama4 llama4_text mamba mamba2 mimo minicpm "
        "minicpm3 minimax ministral3 mistral mistral3 mixtral nemotron nemotron_h olmo olmo2 "
        "olmo3 olmoe phi phi3 phimoe qwen qwen2 qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe "
        "qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma seed_oss smollm3 stablelm "
        "starcoder2"
    ).split()
)


class MlxExporter(FolderExporter):
    """Writes mlx's affine layout; each layer keeps its width and group size.

    Scales and biases are float16 where that is exact, as it is for symmetric layers, or if it was
    chosen as `dtype`, and otherwise float32.
    """

    name = "mlx"
    readers = "mlx-lm"
    tags = ("mlx",)
    library = "mlx"
    packs_tables = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        kind = self.folder.config.get("model_type")
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"mlx-lm has no model of the architecture {kind!r}: export to ct or dense"
            )
        self.settings: dict[str, dict[str, int]] = {}

    @property
    def usage(self) -> str:
        commands = "`mlx_lm.generate --model MODEL --prompt PROMPT`, `mlx_lm.chat --model MODEL`"
        return f"In mlx-lm: {commands}."

    def store(self, name: str, layer: QuantizedLinear) -> StoredLayer:
        grid = grid_for(self, layer)
        size = largest_group(grid, GROUPS)
        if size is None or grid.in_features * grid.bits % 32:
            return self._float(name, layer, grid)
        changed = regrouped(grid, size)
        if changed.bits not in WIDTHS:
            changed = widened(changed, 8)
        scale, bias = self._scale_and_bias(changed)
        words = pack(changed.codes, changed.bits).view(torch.int32).view(torch.uint32)
        tensors = {"weight": words, "scales": scale, "biases": bias}
        if layer.bias is not None:
            tensors["bias"] = self.store_float(name, layer.bias.detach())
        self.settings[name] = {"group_size": size, "bits": changed.bits}
        container = f"affine, {changed.bits} bits, groups of {size}, {_named(scale.dtype)} scales"
        return StoredLayer(container, tensors, regrouping(grid, changed))

    def _scale_and_bias(self, grid: Grid) -> tuple[Tensor, Tensor]:
        scale = grid.scale.float()
        bias = -scale * grid.zero.float() * 2.0**-grid.zero_shift
        dtype = self.options.float_dtype
        if dtype is None:
            half = scale.half(), bias.half()
            exact = torch.equal(half[0].float(), scale) and torch.equal(half[1].float(), bias)
            dtype = torch.float16 if exact else torch.float32
        return float_weight(scale, dtype), float_weight(bias, dtype)

    def _float(self, name: str, layer: QuantizedLinear, grid: Grid) -> StoredLayer:
        dtype = self.options.float_dtype or torch.float32
        tensors = {"weight": float_weight(grid.weight(), dtype)}
        if layer.bias is not None:
            tensors["bias"] = self.store_float(name, layer.bias.detach())
        changes = (f"rows of {grid.in_features} inputs fit no group of mlx: stored in float",)
        return StoredLayer(_named(dtype), tensors, changes)

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if "scales" not in tensors:
            return tensors["weight"].float()
        settings, words = self.settings[name], tensors["weight"].view(torch.int32)
        columns = tensors["scales"].shape[1] * settings["group_size"]
        codes = stream_codes(words, settings["bits"], columns)
        # In float64, so that this finds what the container rounds, not what the sum rounds.
        scale = by_column(tensors["scales"].double().numpy(), columns)
        weight = scale * codes + by_column(tensors["biases"].double().numpy(), columns)
        return torch.from_numpy(weight).float()

    def quantization(self) -> dict[str, Any]:
        return self._section()

    def config(self) -> dict[str, Any]:
        return super().config() | {"quantization": self._section()}

    def _section(self) -> dict[str, Any]:
        """Returns the settings of every module; False: it is stored in float."""
        every = {name: self.settings.get(name, False) for name in self.folder.entries}
        floats = dict.fromkeys(self.float_modules(), False)
        first = next(iter(self.settings.values()), {"group_size": GROUPS[1], "bits": 4})
        return {**first, "mode": "affine", **floats, **every}


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
