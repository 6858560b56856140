import pytest
from transformers import GPT2Config, LlamaConfig, LlavaConfig, MptConfig, PreTrainedConfig

from lowbit.models.sizes import context_of, hidden_of, vocabulary_of, without_null_sizes

LLAMA = LlamaConfig(hidden_size=64, vocab_size=101, max_position_embeddings=64)
CONFIGS: dict[str, tuple[PreTrainedConfig, tuple[int, int, int | None]]] = {
    "plain": (LLAMA, (64, 101, 64)),
    "other names": (GPT2Config(n_embd=64, vocab_size=101, n_positions=64), (64, 101, 64)),
    "names of MPT": (MptConfig(d_model=64, vocab_size=101, max_seq_len=64), (64, 101, 64)),
    "one level deeper": (LlavaConfig(text_config=LLAMA), (64, 101, 64)),
    "context 0": (
        LlamaConfig(hidden_size=64, vocab_size=101, max_position_embeddings=0),
        (64, 101, None),
    ),
}


@pytest.mark.parametrize(("config", "sizes"), CONFIGS.values(), ids=CONFIGS)
def test_sizes(config: PreTrainedConfig, sizes: tuple[int, int, int | None]) -> None:
    assert (hidden_of(config), vocabulary_of(config), context_of(config)) == sizes


@pytest.mark.parametrize("value", ["absent", None])
def test_absent_and_null(value: str | None) -> None:
    config = PreTrainedConfig()
    if value is None:
        config.max_position_embeddings = config.hidden_size = None
    assert context_of(config) is None
    with pytest.raises(ValueError, match="states no hidden_size"):
        hidden_of(config)


def test_null_sizes_are_left_out_and_other_nulls_stay() -> None:
    stated = {"n_ctx": None, "hidden_size": 64, "pad_token_id": None}
    kept = {"hidden_size": 64, "pad_token_id": None}
    assert without_null_sizes(stated) == kept
    assert without_null_sizes({"text_config": stated, "dim": None}) == {"text_config": kept}
