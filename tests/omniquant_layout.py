"""The layout of OmniQuant's omni_parameters.pth, and what its parameters do, in plain PyTorch.

Written from the paper's formulas and the names and shapes of the file, apart from lowbit's code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Q, K, V = (f"self_attn.{name}_proj" for name in "qkv")


@dataclass(frozen=True)
class Family:
    """Where OmniQuant rescales channels: of each place the source, and those that read it."""

    block: str
    places: Mapping[str, tuple[str, tuple[str, ...]]]
    others: tuple[str, ...]
    rotary: bool

    @property
    def linears(self) -> tuple[str, ...]:
        return (*(name for _, readers in self.places.values() for name in readers), *self.others)


FAMILIES = {
    "llama": Family(
        "model.layers.{}.",
        {
            "qkv": ("input_layernorm", (Q, K, V)),
            "out": (V, ("self_attn.o_proj",)),
            "fc1": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        },
        ("mlp.down_proj",),
        True,
    ),
    "opt": Family(
        "model.decoder.layers.{}.",
        {
            "qkv": ("self_attn_layer_norm", (Q, K, V)),
            "out": (V, ("self_attn.out_proj",)),
            "fc1": ("final_layer_norm", ("fc1",)),
        },
        ("fc2",),
        False,
    ),
}


def tensors_of(model: Path, family: Family, block: int) -> dict[str, Tensor]:
    start = family.block.format(block)
    every = load_file(model / "model.safetensors").items()
    return {n.removeprefix(start): t.float() for n, t in every if n.startswith(start)}


def parameters(
    tensors: Mapping[str, Tensor],
    family: Family,
    group_size: int,
    shift: bool,
    heads: int,
    draw: torch.Generator,
    tied: bool = True,
) -> dict[str, Tensor]:
    """Random parameters of one block, as OmniQuant saves them: float16, clips as (rows, 1)."""

    def near(count: int, spread: float) -> Tensor:
        return 1 + spread * (2 * torch.rand(count, generator=draw) - 1)

    found: dict[str, Tensor] = {}
    for place, (_, readers) in family.places.items():
        width = tensors[f"{readers[0]}.weight"].shape[1]
        found[f"{place}_smooth_scale"] = near(width, 0.5)
        found[f"{place}_smooth_shift"] = (near(width, 0.3) - 1) * shift
    rows = tensors[f"{Q}.weight"].shape[0]
    scale = near(rows, 0.4)
    if family.rotary and tied:  # both members of a rotary pair
        first = scale.view(heads, 2, -1)[:, :1]
        scale = first.expand(-1, 2, -1).reshape(-1)
    found["qkt_smooth_scale"] = scale
    for name in family.linears:
        out, wide = tensors[f"{name}.weight"].shape
        for end in ("upbound_factor", "lowbound_factor"):
            groups = out * -(-wide // group_size)
            found[f"{name}.weight_quantizer.{end}"] = near(groups, 0.5).unsqueeze(1) * 2
    return {name: tensor.half() for name, tensor in found.items()}


def folded(
    tensors: Mapping[str, Tensor], family: Family, learned: Mapping[str, Tensor], qkt: bool
) -> dict[str, Tensor]:
    """The tensors of a block after the equivalent transformation."""
    new = dict(tensors)

    def add(name: str, value: Tensor) -> None:
        if f"{name}.bias" in new:
            new[f"{name}.bias"] = new[f"{name}.bias"] + value
        else:
            assert not value.any(), "a shift needs a bias"

    for place, (source, readers) in family.places.items():
        scale = learned[f"{place}_smooth_scale"].float()
        shift = learned[f"{place}_smooth_shift"].float()
        add(source, -shift)
        for part in ("weight", "bias"):
            if f"{source}.{part}" in new:
                tensor = new[f"{source}.{part}"]
                new[f"{source}.{part}"] = tensor / scale.view(-1, *[1] * (tensor.dim() - 1))
        for name in readers:
            add(name, new[f"{name}.weight"] @ shift)
            new[f"{name}.weight"] = new[f"{name}.weight"] * scale
    scale = learned["qkt_smooth_scale"].float()
    for name, factor in ((Q, 1 / scale), (K, scale)) if qkt else ():
        for part in ("weight", "bias"):
            if f"{name}.{part}" in new:
                tensor = new[f"{name}.{part}"]
                new[f"{name}.{part}"] = tensor * factor.view(-1, *[1] * (tensor.dim() - 1))
    return new


def rounded(weight: Tensor, upper: Tensor, lower: Tensor, bits: int, group_size: int) -> Tensor:
    """A weight after fake quantization with learned clipping, section 2 of the paper."""
    out, wide = weight.shape
    assert wide % group_size == 0
    groups = weight.reshape(-1, group_size)
    high = upper.float().sigmoid() * groups.amax(1, keepdim=True)
    low = lower.float().sigmoid() * groups.amin(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    codes = ((groups / step).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * step).reshape(out, wide)


def quantized(
    tensors: Mapping[str, Tensor],
    family: Family,
    learned: Mapping[str, Tensor],
    bits: int,
    group_size: int,
    qkt: bool,
) -> dict[str, Tensor]:
    """The tensors of a block as OmniQuant writes them.

    qkt: whether the scales of q and k are applied; without rounded activations they change neither
        what is computed nor a code.
    """
    new = folded(tensors, family, learned, qkt)
    for name in family.linears:
        clips = (learned[f"{name}.weight_quantizer.{end}bound_factor"] for end in ("up", "low"))
        new[f"{name}.weight"] = rounded(new[f"{name}.weight"], *clips, bits, group_size)
    return new
