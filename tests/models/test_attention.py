"""Queries, keys and values are rounded in every attention that calls transformers' interface."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit.blocks.attention import PREFIX, round_attention
from lowbit.kernels.tokens import round_tokens
from lowbit.models import attention
from lowbit.models.attention import attentions_of, calls_interface, round_attentions

CALLERS = [n for n in (*zoo.ZOO, *zoo.DISCOVERED) if not n.startswith(("falcon", "gpt2"))]
W4: dict[str, Any] = {"bits": 4, "symmetric": False}


def plain(name: str) -> Any:
    return zoo.make((zoo.ZOO | zoo.DISCOVERED)[name])


@pytest.mark.parametrize("name", [*zoo.ZOO, *zoo.DISCOVERED])
def test_those_are_found_that_call_the_interface(name: str) -> None:
    """A spy in transformers' table of attention functions records the calls."""
    model = plain(name)
    called: set[nn.Module] = set()

    def spy(own: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.add(module)
            return own(module, *args, **kwargs)

        return attend

    for implementation in ("sdpa", "eager"):
        own = ALL_ATTENTION_FUNCTIONS[PREFIX + implementation]
        ALL_ATTENTION_FUNCTIONS[implementation] = spy(own)
    try:
        model(zoo.tokens())
    finally:
        for implementation in ("sdpa", "eager"):
            del ALL_ATTENTION_FUNCTIONS[implementation]
    assert {m for m in model.modules() if calls_interface(m)} == called
    assert bool(called) != name.startswith("falcon")


def marked(name: str, rounding: dict[str, Any] = W4, implementation: str = "sdpa") -> Any:
    model = plain(name)
    if implementation == "eager":
        model.set_attn_implementation("eager")
    names = [n for n, module in model.named_modules() if calls_interface(module)]
    round_attentions(model, dict.fromkeys(names, rounding))
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CALLERS)
def test_rounding_to_nothing_is_transformers_own(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks too: of padding on either side, and of sliding windows."""
    monkeypatch.setattr(attention, "round_tokens", lambda x, **rounding: x)
    ours, theirs = marked(name, implementation=implementation), plain(name)
    if implementation == "eager":
        theirs.set_attn_implementation("eager")
    assert ours.config._attn_implementation == PREFIX + theirs.config._attn_implementation
    mask = torch.ones(2, zoo.TOKENS, dtype=torch.long)
    mask[0, :7], mask[1, -5:] = 0, 0
    for options in ({}, {"attention_mask": mask}):
        found, wanted = (m(zoo.tokens(), **options).logits for m in (ours, theirs))
        assert torch.equal(found[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_queries_keys_and_values_are_rounded_per_token_and_head(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are rounded after the rotary embeddings, in one group per token and head."""
    seen: list[Tensor] = []

    def spy(x: Tensor, **rounding: Any) -> Tensor:
        seen.append(x)
        assert rounding == W4
        return round_tokens(x, **rounding)

    monkeypatch.setattr(attention, "round_tokens", spy)
    model = marked(name)
    logits = model(zoo.tokens()).logits
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    shapes = [(2, n, zoo.TOKENS, width) for n in heads] * config.num_hidden_layers
    assert [tuple(x.shape) for x in seen] == shapes
    error = zoo.error(logits, plain(name)(zoo.tokens()).logits)
    assert 0.01 < error < 0.9


def test_a_name_that_is_not_there_or_is_no_attention() -> None:
    model = zoo.make(zoo.ZOO["llama"])
    with pytest.raises(ValueError, match="attention model.layers.2.self_attn, .*does not have"):
        round_attentions(model, {"model.layers.2.self_attn": W4})
    with pytest.raises(ValueError, match="model.layers.0.mlp, .* LlamaMLP that does not call"):
        round_attentions(model, {"model.layers.0.mlp": W4})
    falcon = zoo.make(zoo.ZOO["falcon 7b"])
    with pytest.raises(ValueError, match="FalconAttention that does not call"):
        round_attentions(falcon, {"transformer.h.0.self_attention": W4})


def test_another_implementation_is_refused_before_or_after() -> None:
    model = marked("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="'sdpa' does not: set .*lowbit-sdpa"):
        model(zoo.tokens())
    model.set_attn_implementation("lowbit-eager")
    assert model(zoo.tokens()).logits.isfinite().all()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' cannot round"):
        round_attention(model.model.layers[0].self_attn, W4)


def test_the_source_names_them_relative_to_the_block() -> None:
    source = zoo.source("gpt_neox")
    assert source.attentions(source.block_names[1]) == ("attention",)
    assert source.disk_path(f"{source.block_names[1]}.attention") == "gpt_neox.layers.1.attention"
    assert attentions_of(source.load_block(source.block_names[0])) == ("attention",)
