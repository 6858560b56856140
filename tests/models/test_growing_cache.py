"""A cache that grows in place holds what transformers' own holds, and gives the same tokens."""

from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lowbit.models import generation, growing_cache
from lowbit.models.growing_cache import LEAST_ROOM, LEAST_TOKENS, GrowingLayer, let_grow

LENGTHS = (
    1,
    5,
    LEAST_TOKENS,
    1,
    1,
    LEAST_ROOM - 1,
    1,
    1,
    2 * LEAST_ROOM,
    1,
)  # tokens of each update


def some(tokens: int, seed: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = (8, 6)  # keys and values may have heads of different sizes
    return tuple(torch.randn(rows, 3, tokens, size, generator=draw) for size in sizes)  # type: ignore[return-value]


CHANGES: dict[str, Any] = {
    "nothing": lambda layer: None,
    "cropped": lambda layer: layer.crop(-1),
    "other rows": lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
    "reset": lambda layer: layer.reset(),
    "offloaded and back": lambda layer: layer.offload(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_holds_what_a_dynamic_layer_holds(change: Any) -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    for seed, tokens in enumerate(LENGTHS):
        found, wanted = (layer.update(*some(tokens, seed)) for layer in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        if seed == 4:
            change(ours), change(theirs)


def test_what_it_holds_is_not_copied_for_every_token() -> None:
    layer = GrowingLayer()
    layer.update(*some(LEAST_TOKENS, 0))
    places = [layer.update(*some(1, seed))[0].data_ptr() for seed in range(LEAST_ROOM)]
    assert len(set(places)) == 1


def test_only_plain_layers_are_changed() -> None:
    class Special(DynamicCache):
        pass

    mixed = DynamicCache()
    mixed.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)]
    let_grow(mixed)
    assert [type(layer) for layer in mixed.layers] == [GrowingLayer, DynamicSlidingWindowLayer]
    special = Special()
    special.layers = [DynamicLayer()]
    let_grow(special)
    let_grow(None)
    assert type(special.layers[0]) is DynamicLayer


FAMILIES = [*zoo.ZOO, *zoo.DISCOVERED]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("llama", "opt", "mistral") else pytest.mark.exhaustive)
        for n in FAMILIES
    ],
)
def test_equal_tokens_of_every_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_cache, "LEAST_TOKENS", 4)
    model = AutoModelForCausalLM.from_pretrained(zoo.folder(name), dtype=torch.float32)
    grown = generation.greedy(model, [3, 5, 7], 12)
    monkeypatch.setattr(generation, "let_grow", lambda cache: None)
    assert grown == generation.greedy(model, [3, 5, 7], 12)
