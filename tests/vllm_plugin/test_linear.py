"""Linears in a stand-in of vLLM compute what lowbit.load computes, stacked and cut."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import quantized
import torch
import vllm_stand_in
import zoo
from torch import Tensor
from vllm_stand_in import PACKED, Layer, LinearBase, ParallelLMHead, tensors_of

import lowbit
from lowbit.methods import PTQ161, RTN, MatQuant, MixedQuant, Trellis

pytestmark = pytest.mark.slow

ROOT = TemporaryDirectory(prefix="lowbit-vllm-", ignore_cleanup_errors=True)
BLOCK = "model.layers.0"
FOLDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "uniform": (RTN(bits=3, group_size=8, fine_zeros=True), {}),
    "partly float": (RTN(bits=4, group_size=8, symmetric=True), {"skip": ["*.k_proj"]}),
    "output layer": (RTN(bits=4, group_size=8), {"lm_head_bits": 8}),
    "nested": (MatQuant(group_size=8, lwc=False, epochs=0, min_tokens=1), {}),
    "lattice": ("quip", {}),
    "trellis": (Trellis(rate=1.5, state_bits=9, min_tokens=8, scale=1.1, row_scale="never"), {}),
    "binary": (PTQ161(epochs=0, min_tokens=1), {}),
    "sorted_group": (MixedQuant(group_size=16, min_tokens=1), {}),
    "rotated": (
        RTN(bits=4, group_size=16, activation_bits=8, rotate=True, round_attention=False),
        {},
    ),
}
STACKS = {
    f"{BLOCK}.mlp.gate_up_proj": ([80, 80], 48),
    f"{BLOCK}.self_attn.qkv_proj": ([48, 24, 24], 48),
    f"{BLOCK}.mlp.down_proj": ([48], 80),
}


@cache
def made(name: str) -> Path:
    """A quantized folder, made once."""
    method, options = FOLDERS[name]
    source = quantized.source("llama")
    return quantized.quantize(source, Path(ROOT.name) / name, method, self_check=False, **options)


def parts_of(stack: str) -> dict[str, str]:
    """The linears of a stack by the last parts of their names."""
    owner, _, last = stack.rpartition(".")
    return {part: f"{owner}.{part}".lstrip(".") for part in PACKED.get(last, [last])}


def loaded(
    config: Any, folder: Path, stack: str, sizes: list[int], inputs: int, *device: int
) -> Layer:
    """A linear of the stand-in with its tensors, the parts of a stack in reversed order."""
    kind = ParallelLMHead if stack == "lm_head" else LinearBase
    module = kind(config, stack, sizes, inputs, *device)
    for part, name in reversed(parts_of(stack).items()):
        vllm_stand_in.load(module, part, tensors_of(folder, name))
    return module


def finished(*modules: Any) -> None:
    for module in modules:
        module.quant_method.process_weights_after_loading(module)
        assert not list(module.parameters(recurse=False))


def wanted(folder: Path, stack: str, x: Tensor) -> Tensor:
    """What the loaded model computes."""
    model = lowbit.load(folder)[0]
    return torch.cat([model.get_submodule(name)(x) for name in parts_of(stack).values()], -1)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FOLDERS)
def test_every_format(name: str, vllm: Any) -> None:
    folder = made(name)
    config = vllm.config(quantized.section(folder))
    stacks = {stack: loaded(config, folder, stack, *shape) for stack, shape in STACKS.items()}
    finished(*stacks.values())
    for stack, module in stacks.items():
        x = random(5, STACKS[stack][1])
        with torch.inference_mode():
            assert zoo.error(module(x), wanted(folder, stack, x)) < 1e-5
            assert torch.equal(module(x, torch.ones(1)), module(x) + 1)


def test_an_output_layer_is_filled_up(vllm: Any) -> None:
    """vLLM rounds the size of the vocabulary up, and cuts the outputs off later."""
    folder = made("output layer")
    head = loaded(vllm.config(quantized.section(folder)), folder, "lm_head", [128], 48)
    finished(head)
    x = random(2, 48)
    assert head(x).shape == (2, 128)
    assert zoo.error(head(x)[:, : zoo.VOCABULARY], wanted(folder, "lm_head", x)) < 1e-5
    plain = vllm.config(quantized.section(made("uniform")))
    assert plain.get_quant_method(head, "lm_head") is None  # vLLM has an own way to run it


@pytest.mark.parametrize("name", ["uniform", "partly float", "nested", "binary"])
def test_two_devices(name: str, vllm: Any) -> None:
    """Outputs are cut and joined again; inputs are cut, and the outputs are summed."""
    folder = made(name)
    config = vllm.config(quantized.section(folder))
    down, qkv = f"{BLOCK}.mlp.down_proj", f"{BLOCK}.self_attn.qkv_proj"
    x, y = random(3, 80), random(3, 48)
    total, rows = torch.zeros(3, 48), list[Tensor]()
    for rank in range(2):
        part = loaded(config, folder, down, [48], 40, rank, 2)
        heads = loaded(config, folder, qkv, [24, 12, 12], 48, rank, 2)
        finished(part, heads)
        total += part(x[:, 40 * rank : 40 * rank + 40])
        rows.append(heads(y))
    assert zoo.error(total, wanted(folder, down, x)) < 1e-5
    joined = [torch.cat([row.split([24, 12, 12], -1)[i] for row in rows], -1) for i in range(3)]
    assert zoo.error(torch.cat(joined, -1), wanted(folder, qkv, y)) < 1e-5


def test_more_devices_than_heads_of_keys(vllm: Any) -> None:
    folder, stack = made("uniform"), f"{BLOCK}.self_attn.qkv_proj"
    config = vllm.config(quantized.section(folder))
    x = random(2, 48)
    keys = wanted(folder, stack, x)[:, 48:72]
    for rank in range(4):
        part = loaded(config, folder, stack, [12, 12, 12], 48, rank, 4)
        finished(part)
        head = rank // 2
        assert zoo.error(part(x)[:, 12:24], keys[:, 12 * head : 12 * head + 12]) < 1e-5


REFUSED: dict[str, tuple[str, str, Callable[[dict[str, Tensor]], object]]] = {
    "a lattice on two devices": ("lattice", "its format lattice cannot be cut", lambda t: None),
    "rotated inputs on two devices": ("rotated", "it rotates all its inputs", lambda t: None),
    "a missing tensor": ("uniform", "the tensor scale is missing", lambda t: t.pop("scale")),
    "another shape": (
        "uniform",
        "config.json asks for",
        lambda t: t.update(scale=t["scale"][:, :-1]),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, vllm: Any) -> None:
    name, message, edit = REFUSED[case]
    folder, down = made(name), f"{BLOCK}.mlp.down_proj"
    config = vllm.config(quantized.section(folder))
    devices = 2 if "two devices" in case else 1
    module = LinearBase(config, down, [48], 80 // devices, 0, devices)
    edit(tensors := tensors_of(folder, down))
    vllm_stand_in.load(module, "down_proj", tensors)
    with pytest.raises(ValueError, match=rf"layer {down}: .*{message}"):
        finished(module)
