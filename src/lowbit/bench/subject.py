"""The model that is measured: a quantized folder, or a Llama of random weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.bench.random_model import random_quantized
from lowbit.bench.shapes import Shape, parse_format, parse_shape
from lowbit.checkpoint.recognize import runnable_folder
from lowbit.device import choose_device
from lowbit.formats import repack, set_input_bits
from lowbit.formats.base import QuantizedLinear
from lowbit.load import load_model, locate

SIZES = {  # field of a config -> field of Shape
    "num_hidden_layers": "layers",
    "vocab_size": "vocabulary",
    "hidden_size": "hidden",
    "intermediate_size": "wide",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_size",
}


@dataclass(frozen=True)
class Subject:
    """A loaded model to be measured.

    title: what it is called.
    form: format of most of its linears.
    bits: real bits per weight of its quantized linears, without an output layer that only the
        benchmark has quantized.
    shape: the shape of a Llama; None: it is no Llama.
    """

    title: str
    model: nn.Module
    form: str
    bits: float
    shape: Shape | None

    def shape_for_peer(self) -> Shape:
        """Returns the shape. Raises ValueError for a model that is no Llama."""
        if self.shape is None:
            raise ValueError(
                f"{self.title} has other linears than a Llama, and llama.cpp is measured on a "
                "Llama only: leave out --llama"
            )
        return self.shape


def of_shape(shape: str, form: str, inputs: int, device: str = "cpu") -> Subject:
    """Builds a Llama of random weights; raises ValueError as `parse_shape` and others do.

    shape, form: as `parse_shape` and `parse_format` read them.
    inputs: bits to which kernels round inputs.
    device: where the model runs.
    """
    parse_format(form)
    sizes = parse_shape(shape)
    model = random_quantized(sizes, form)
    set_input_bits(model, inputs)
    _move(model, choose_device(device))
    in_blocks = [m for n, m in model.named_modules() if n != "lm_head"]
    return Subject(f"{shape}, {form}", model, form.partition(":")[0], _bits(in_blocks), sizes)


def of_folder(folder: str, inputs: int, device: str = "cpu") -> Subject:
    """Loads a quantized folder. Raises ValueError for a float one, and as `load_model` does."""
    path = locate(folder)
    if runnable_folder(path).program is None:
        raise ValueError(f"{folder} is a float model: name a folder that lowbit has quantized")
    where = choose_device(device)
    model = load_model(path, inputs=inputs)
    _move(model, where)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    form = Counter(layer.format for layer in layers).most_common(1)[0][0]
    return Subject(path.name, model, form, _bits(layers), _llama_shape(model, layers))


def _move(model: nn.Module, device: torch.device) -> None:
    """Moves a model to a device, in bfloat16 on a GPU, and repacks its layers there."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type != "cpu":
        model.to(device, dtype)
    repack(model, dtype)


def _bits(modules: Sequence[nn.Module]) -> float:
    layers = [module for module in modules if isinstance(module, QuantizedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 8 * sum(layer.weight_bytes() for layer in layers) / weights


def _llama_shape(model: Any, layers: list[QuantizedLinear]) -> Shape | None:
    """Returns the shape of a model whose linears are those of a Llama; else None."""
    config = model.config
    sizes: dict[str, Any] = {ours: getattr(config, name, None) for name, ours in SIZES.items()}
    if sizes["head_size"] is None and sizes["hidden"] and sizes["heads"]:
        sizes["head_size"] = sizes["hidden"] // sizes["heads"]
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        return None
    shape = Shape(**sizes)
    wanted = Counter(shape.linears.values())
    expected = Counter({size: count * shape.layers for size, count in wanted.items()})
    head = (shape.vocabulary, shape.hidden)
    found = Counter((layer.out_features, layer.in_features) for layer in layers)
    return shape if found - Counter([head]) == expected or found == expected else None
