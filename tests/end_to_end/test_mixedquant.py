"""MixedQuant end to end: shared tensors are stored once; no token depends on a later one."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import quantized
import torch
import zoo
from torch import Tensor
from transformers import PreTrainedModel

import lowbit
from lowbit.checkpoint import QuantizedFolder
from lowbit.convert import dequantize
from lowbit.formats.sorted_group import SortedGroupLinear, tensor_bytes
from lowbit.methods import MixedQuant

pytestmark = pytest.mark.slow

METHOD = MixedQuant(group_size=16, salient_ratio=0.1, alignment=4, smooth=0.5, min_tokens=8)
FAMILIES = [*zoo.ZOO, "gemma2", "olmoe", "phi3"]
_KEPT = TemporaryDirectory(prefix="lowbit-mixedquant-", ignore_cleanup_errors=True)


@cache
def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
    out = Path(_KEPT.name) / f"{name}-{str(dtype).removeprefix('torch.')}"
    return quantized.quantize(quantized.source(name, dtype), out, METHOD)


@cache
def model(name: str) -> PreTrainedModel:
    """In float64, so that two calls round a value to the same code."""
    loaded, _ = lowbit.load(folder(name), dtype=torch.float64)
    return loaded


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded(name: str) -> None:
    found = QuantizedFolder(folder(name))
    owned = {n for n, entry in found.entries.items() if entry["shares"] is None}
    assert {entry["shares"] for entry in found.entries.values()} <= owned | {None}
    for layer, entry in found.entries.items():
        numbers = {key: value for key, value in entry.items() if key not in ("format", "bias")}
        tensors = [t for t in found.tensors_of(layer) if not t.endswith(".bias")]
        assert tensor_bytes(**numbers) == sum(found.reader.tensors[t].bytes for t in tensors)
    loaded = [lowbit.load(folder(name))[0] for _ in range(2)]
    first, again = (quantized.logits(one) for one in loaded)
    assert torch.equal(first, again)
    error = zoo.error(first, quantized.logits(lowbit.load(quantized.source(name))[0]))
    assert 0.01 < error < 0.9


def test_the_members_of_a_group_are_linked() -> None:
    attention = model("llama").model.layers[1].self_attn
    q, k = attention.q_proj, attention.k_proj
    assert isinstance(k, SortedGroupLinear)
    assert k.owner is q and k.shares == "model.layers.1.self_attn.q_proj"


def test_half_precision_keeps_what_it_holds(tmp_path: Path) -> None:
    made, _ = lowbit.load(folder("llama, tied, biased", torch.bfloat16), dtype=torch.bfloat16)
    assert quantized.logits(made).isfinite().all()
    dtypes = {str(p.dtype) for n, p in made.named_parameters() if ".q_proj." in n}
    assert dtypes == {f"torch.{d}" for d in ("uint8", "float16", "int16", "bfloat16")}


@pytest.mark.parametrize("name", ["opt", "llama", "mistral", "falcon 40b", "mixtral"])
def test_token_by_token_is_all_at_once(name: str) -> None:
    tokens = zoo.tokens(length=12)
    with torch.no_grad():
        whole = model(name)(tokens).logits
        cache, steps = None, []
        for i in range(tokens.shape[1]):
            out = model(name)(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-6, atol=1e-6)


def test_more_tokens_change_nothing_before_them() -> None:
    tokens = zoo.tokens()
    with torch.no_grad():
        longer, shorter = (model("llama")(t).logits for t in (tokens, tokens[:, :9]))
    torch.testing.assert_close(longer[:, :9], shorter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_padded_batch_is_its_rows(name: str) -> None:
    short, long = zoo.tokens(1, rows=1, length=7), zoo.tokens(2, rows=1, length=12)
    pad = torch.full((1, 5), 1)
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    arguments: dict[str, Tensor] = {"attention_mask": mask}
    if name == "llama":  # OPT finds them in the mask
        arguments["position_ids"] = positions
    with torch.no_grad():
        both = model(name)(torch.cat([torch.cat([pad, short], 1), long]), **arguments).logits
        alone = [model(name)(row).logits for row in (short, long)]
    torch.testing.assert_close(both[:1, 5:], alone[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both[1:], alone[1], rtol=1e-6, atol=1e-6)


def test_dequantized_is_the_weight_without_the_rounding_of_inputs(tmp_path: Path) -> None:
    """Orders and permutations are undone; the only difference is that inputs are not rounded."""
    unrounded = METHOD.model_copy(update={"activation_bits": 16})
    out = quantized.quantize(quantized.source("llama"), tmp_path / "out", unrounded)
    plain = dequantize(out, tmp_path / "plain")
    found, wanted = (quantized.logits(lowbit.load(f)[0]) for f in (plain, out))
    assert zoo.error(found, wanted) < 1e-5
