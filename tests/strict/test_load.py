"""Quantized folders of every format run on the strict device as they run on the CPU."""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import quantized
import torch
import zoo
from safetensors import safe_open
from torch import Tensor

import lowbit
from lowbit.formats import FORMATS
from lowbit.formats.base import QuantizedLinear
from lowbit.methods import PTQ161, RTN, MatQuant, Method, MixedQuant, QuIP, Trellis

pytestmark = pytest.mark.slow

_KEPT = TemporaryDirectory(prefix="lowbit-strict-", ignore_cleanup_errors=True)
W4A4: dict[str, Any] = {"bits": 4, "group_size": 16, "activation_bits": 4}
FEW: dict[str, Any] = {"min_tokens": 8}
TRELLIS = FEW | {"state_bits": 9, "scale": 1.1, "row_scale": "never"}
FOLDERS: dict[str, tuple[Method, str, dict[str, Any]]] = {
    "uniform": (RTN(bits=3, group_size=16), "llama", {}),
    "uniform, rotated 4-bit inputs": (RTN(**W4A4, rotate=True), "llama", {}),
    "uniform, experts": (RTN(bits=4, group_size=16), "mixtral", {}),
    "uniform, table of embeddings": (
        RTN(bits=4, group_size=16),
        "llama, tied, biased",
        {"embedding_bits": 4},
    ),
    "nested": (MatQuant(group_size=16, epochs=0, lwc=False, rounding="nearest"), "llama", {}),
    "lattice, E8P": (QuIP(codebook="E8P12", **FEW), "llama", {}),
    "lattice, two stages": (QuIP(codebook="E8P12RVQ4B", **FEW), "llama", {}),
    "lattice, half-integers": (QuIP(codebook="HI", **FEW), "opt", {}),
    "trellis": (Trellis(rate=2, **TRELLIS), "llama", {}),
    "trellis, 1.5 bits": (Trellis(rate=1.5, **TRELLIS), "llama", {}),
    "binary": (PTQ161(epochs=0, alignment=4, **FEW), "llama", {}),
    "sorted_group": (MixedQuant(**W4A4, alignment=4, **FEW), "llama", {}),
    "sorted_group, float inputs, int8 beside": (
        MixedQuant(bits=4, activation_bits=16, group_size=16, alignment=4, salient_bits=8, **FEW),
        "llama",
        {},
    ),
}
ONE_EACH = ("uniform", "nested", "lattice, E8P", "trellis", "binary", "sorted_group")


@cache
def folder(name: str) -> Path:
    method, model, options = FOLDERS[name]
    out = Path(_KEPT.name) / name
    if method.streams():  # two linears that share an input and another are enough
        down = "layers.1.fc2" if model == "opt" else "layers.1.mlp.down_proj"
        only = ("layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj", down)
        options = {"only": only, "self_check": False} | options
    return quantized.quantize(quantized.source(model), out, method, **options)


def loaded(name: str, device: Any, **options: Any) -> Any:
    return lowbit.load(folder(name), device_map=device, **options)[0]


def on(model: Any, *tensors: Tensor) -> list[Tensor]:
    device = next(model.parameters()).device
    return [tensor.to(device) for tensor in tensors]


def forward(model: Any) -> Tensor:
    """Logits of two texts."""
    (tokens,) = on(model, torch.cat([zoo.tokens(), zoo.tokens().flip(1)]))
    with torch.no_grad():
        return model(tokens).logits.cpu()


def padded(model: Any) -> Tensor:
    """Logits of a batch whose second text is shorter."""
    tokens = torch.cat([zoo.tokens(), zoo.tokens().flip(1)])
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    tokens, mask = on(model, tokens, mask)
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits[mask.bool()].cpu()


def generated(model: Any) -> Tensor:
    (tokens,) = on(model, zoo.tokens()[:, :7])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = model.generate(tokens, **options, output_logits=True, return_dict_in_generate=True)
    return torch.cat(out.logits).cpu()


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "forward": forward,
    "padded": padded,
    "generated": generated,
}


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype and found.isfinite().all()
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.exhaustive
def test_every_format_has_a_folder() -> None:
    found = {
        layer.format
        for name in FOLDERS
        for layer in loaded(name, None).modules()
        if isinstance(layer, QuantizedLinear)
    }
    assert found >= FORMATS.keys() - {"dense"}


def sample(names: Iterable[str]) -> list[Any]:
    """Marks all but one folder of each format."""
    more = pytest.mark.exhaustive
    return [name if name in ONE_EACH else pytest.param(name, marks=more) for name in names]


@pytest.mark.parametrize("name", sample(FOLDERS))
def test_a_folder(name: str) -> None:
    cpu, strict = loaded(name, None), loaded(name, "strict:0", dtype=torch.float32)
    assert {p.device.type for p in strict.parameters()} == {"strict"}
    for way in WAYS.values():
        assert_near(way(strict), way(cpu))


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)],
    ids=["float16", "bfloat16"],
)
@pytest.mark.parametrize("name", sample(FOLDERS))
def test_a_folder_in_half_precision(name: str, dtype: torch.dtype) -> None:
    strict = loaded(name, "strict:0", dtype=dtype)
    wanted, found = forward(loaded(name, None, dtype=dtype)), forward(strict)
    assert found.dtype == dtype and found.isfinite().all()
    jumps = "inputs" in name or "experts" in name  # another rounding of an input, another expert
    assert relative_error(found, wanted) < (0.5 if jumps else 0.03)
    assert torch.equal(found, forward(strict))  # nothing reads memory that was not written
    assert generated(strict).isfinite().all() and padded(strict).isfinite().all()


@pytest.mark.parametrize(
    "bits", [3, *(pytest.param(b, marks=pytest.mark.exhaustive) for b in (8, 6, 2))]
)
def test_another_width(bits: int) -> None:
    cpu, strict = loaded("nested", None), loaded("nested", "strict:0", dtype=torch.float32)
    for model in (cpu, strict):
        lowbit.set_bits(model, bits)
    assert_near(forward(strict), forward(cpu))
    sliced = loaded("nested", "strict:0", dtype=torch.float32, bits=bits)
    assert_near(forward(sliced), forward(cpu))


def test_a_model_that_is_moved() -> None:
    model = loaded("lattice, E8P", None)
    wanted = forward(model)
    assert_near(forward(model.to("strict")), wanted)
    assert_near(forward(model.to("cpu")), wanted)


PLACES: dict[str, dict[str, Any]] = {
    "a block on the CPU": {
        "model.embed_tokens": "strict:0",
        "model.layers.0": "strict:0",
        "model.layers.1": "cpu",
        "model.norm": "strict:0",
        "model.rotary_emb": "strict:0",
        "lm_head": "strict:0",
    },
    "a block on disk": {
        "model.embed_tokens": "strict:0",
        "model.layers.0": "strict:0",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "strict:0",
        "lm_head": "cpu",
    },
}


def _open(path: str, framework: str, device: Any) -> Any:
    if str(device).startswith("strict"):  # as where safetensors cannot read to a device
        raise TypeError
    return safe_open(path, framework, device)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name",
    ["uniform", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ONE_EACH[1:])],
)
def test_some_layers_elsewhere(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.offload.safe_open", _open)
    wanted = forward(loaded(name, None))
    model = lowbit.load(folder(name), device_map=PLACES[place], dtype=torch.float32)[0]
    tokens = torch.cat([zoo.tokens(), zoo.tokens().flip(1)]).to("strict")
    with torch.no_grad():
        found = model(tokens).logits.cpu()
    assert_near(found, wanted)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    model.generate(tokens[:1, :5], **options)
