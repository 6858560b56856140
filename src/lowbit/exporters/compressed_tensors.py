"""The target `ct`: compressed-tensors, which vLLM, SGLang and transformers read.

Its containers are `pack-quantized` (codes of 2 to 8 bits) and, for layers that round their inputs
to 8 bits per token, `int-quantized`. Of a layer of (out, in) with codes of `bits` bits it stores:

| name                | dtype | shape                            | holds                          |
| ------------------- | ----- | -------------------------------- | ------------------------------ |
| `weight_packed`     | int32 | (out, ceil(in * bits / 32))      | the codes of a row, low first  |
| `weight_scale`      | float | (out, groups)                    |                                |
| `weight_zero_point` | int32 | (ceil(out * bits / 32), groups)  | asymmetric layers: along rows  |
| `weight_shape`      | int64 | (2,)                             | out, in                        |
| `weight`            | int8  | (out, in)                        | int-quantized: code - 128      |

Source: github.com/vllm-project/compressed-tensors, compressors/pack_quantized.
"""

from collections import defaultdict
from collections.abc import Mapping
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowbit.exporters.bitstream import by_column, stream_codes
from lowbit.exporters.exporter import StoredLayer, grid_for, regrouping
from lowbit.exporters.folder import FolderExporter
from lowbit.exporters.grid import Grid, Refused, divides, grid_of, regrouped, with_whole_zeros
from lowbit.formats.base import QuantizedLinear
from lowbit.kernels.bits import pack

PACKED, WHOLE = "pack-quantized", "int-quantized"
SMALLEST_GROUP = 4  # inputs; smaller groups would take more bits for scales than for codes
Scheme = tuple[str, int, int | None, bool]  # container, bits, group size or None, symmetric


class CompressedTensorsExporter(FolderExporter):
    """Writes the compressed-tensors layout, exact for every grid of 2 to 8 bits.

    Layers of different bits, group sizes or symmetry become several schemes of one config.json.
    """

    name = "ct"
    readers = "vLLM, SGLang, transformers with compressed-tensors"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.schemes: dict[str, Scheme] = {}
        self.common = _common_group(self.folder.entries)

    def store(self, name: str, layer: QuantizedLinear) -> StoredLayer:
        whole = _as_int8(layer, self.options.drop_activations)
        stored = _int8(whole) if whole is not None else _packed(grid_for(self, layer), self.common)
        tensors, scheme, changes = stored
        if layer.bias is not None:
            tensors["bias"] = self.store_float(name, layer.bias.detach())
        self.schemes[name] = scheme
        loss = None if whole is None else "inputs are rounded to 8 bits by the program's own rule"
        return StoredLayer(_described(scheme), tensors, changes, loss)

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        container, bits, _, symmetric = self.schemes[name]
        scale = tensors["weight_scale"].float().numpy()
        if container == WHOLE:
            return torch.from_numpy(tensors["weight"].numpy().astype(np.float32) * scale)
        rows, columns = tensors["weight_shape"].tolist()
        codes = stream_codes(tensors["weight_packed"], bits, columns)
        points: Any = 2 ** (bits - 1)
        if not symmetric:
            stream = tensors["weight_zero_point"].T.contiguous()
            points = by_column(stream_codes(stream, bits, rows).T, columns)
        steps = (codes - points).astype(np.float32)
        return torch.from_numpy(by_column(scale, columns) * steps)

    def quantization(self) -> dict[str, Any]:
        layers: dict[Scheme, list[str]] = defaultdict(list)
        for name, scheme in self.schemes.items():
            layers[scheme].append(name)
        containers = {container for container, *_ in layers}
        groups = {
            f"group_{number}": _group(scheme, names if len(layers) > 1 else ["Linear"])
            for number, (scheme, names) in enumerate(layers.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": containers.pop() if len(containers) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self.float_modules(),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": "0.18.0",
            # transformers' reader packs no zero points in its empty model, so that asymmetric
            # folders fail there unless they are decompressed while they are read.
            **({} if all(scheme[3] for scheme in layers) else {"dequantize": True}),
        }


def _as_int8(layer: QuantizedLinear, drop_activations: bool) -> Grid | None:
    """Returns the grid of a layer whose inputs and weights are 8-bit integers, else None."""
    rounding, grid = layer.activation, grid_of(layer)
    if rounding is None or grid is None or drop_activations or rounding.bits != 8:
        return None
    fits = grid.bits == 8 and grid.per_row and grid.symmetric
    return grid if fits else None


def _int8(grid: Grid) -> tuple[dict[str, Tensor], Scheme, tuple[str, ...]]:
    codes = (grid.codes.to(torch.int16) - 128).to(torch.int8)
    return {"weight": codes, "weight_scale": grid.scale}, (WHOLE, 8, None, True), ()


def _packed(grid: Grid, common: int | None) -> tuple[dict[str, Tensor], Scheme, tuple[str, ...]]:
    changed = _dividing(with_whole_zeros(grid))
    if common is not None and not changed.symmetric and divides(changed, common):
        changed = regrouped(changed, common)
    bits, symmetric = changed.bits, changed.symmetric
    tensors = {
        "weight_packed": _words(pack(changed.codes, bits)),
        "weight_scale": changed.scale,
        "weight_shape": torch.tensor(changed.codes.shape, dtype=torch.int64),
    }
    if not symmetric:
        stream = pack(changed.zero.T.to(torch.uint8).contiguous(), bits)
        tensors["weight_zero_point"] = _words(stream).T.contiguous()
    size = None if changed.per_row else changed.group_size
    return tensors, (PACKED, bits, size, symmetric), regrouping(grid, changed)


def _common_group(entries: Mapping[str, dict[str, Any]]) -> int | None:
    """Returns one group size for all asymmetric layers; None: they need no common one.

    transformers 5 reads asymmetric layers in one scheme only. Layers whose rows the group size does
    not divide get smaller groups, and all others must then have these too.
    """
    sizes = set()
    for entry in entries.values():
        if entry.get("symmetric") is False:
            columns = entry["shape"][1]
            size = min(entry["group_size"] or columns, columns)
            sizes.add(size if columns % size == 0 else gcd(columns, size))
    common = gcd(*sizes)
    return common if len(sizes) > 1 and common >= SMALLEST_GROUP else None


def _dividing(grid: Grid) -> Grid:
    """Returns the grid in groups that divide a row, which the readers demand."""
    if divides(grid, grid.group_size):
        return grid
    sizes = (n for n in range(grid.group_size, SMALLEST_GROUP - 1, -1) if divides(grid, n))
    if (size := next(sizes, None)) is None:
        raise Refused(
            f"its rows of {grid.in_features} inputs cannot be cut into groups that divide them: "
            "quantize with another group_size, or export it with --to dense"
        )
    return regrouped(grid, size)


def _words(stream: Tensor) -> Tensor:
    """Pads rows of bytes to whole words: (rows, n) uint8 -> (rows, ceil(n / 4)) int32."""
    return functional.pad(stream, (0, -stream.shape[1] % 4)).contiguous().view(torch.int32)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """Returns an entry of config_groups."""
    container, bits, size, symmetric = scheme
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs | {"dynamic": True} if container == WHOLE else None,
        "output_activations": None,
        "format": container,
    }


def _described(scheme: Scheme) -> str:
    container, bits, size, _ = scheme
    groups = "rows" if size is None else f"groups of {size}"
    return f"{container}, {bits} bits, {groups}"
