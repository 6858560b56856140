"""Reads sizes from a config, the same way everywhere.

Architectures name them differently (n_positions, max_seq_len), a model that also sees images keeps
them one level deeper, in its text_config, and a size may be absent, null or 0: all mean the same.
"""

from collections.abc import Mapping
from typing import Any

from lowbit.checkpoint.config_values import CONTEXT

HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
VOCABULARY = ("vocab_size",)


def context_of(config: Any) -> int | None:
    """Returns the largest number of tokens that a model can read; None if config states none."""
    return _first(config, CONTEXT)


def hidden_of(config: Any) -> int:
    """Returns the number of channels between blocks. Raises ValueError if config states none."""
    return _needed(config, HIDDEN)


def vocabulary_of(config: Any) -> int:
    """Returns the number of tokens that have logits. Raises ValueError if config states none."""
    return _needed(config, VOCABULARY)


def rows_of(config: Any) -> int | None:
    """Returns the number of tokens that have logits; None if config states none."""
    return _first(config, VOCABULARY)


def check_tokens(largest: int, vocabulary: int, text: str) -> None:
    """Raises ValueError if a text has a token that the model does not have.

    largest: the largest token id of the text.
    vocabulary: the number of tokens of the model.
    text: what has the token, such as "the prompt".
    """
    if largest >= vocabulary:
        raise ValueError(
            f"{text} has token {largest}, but the model has {vocabulary} tokens: use the tokenizer "
            "of this model, or leave out special tokens that were added to it"
        )


def without_null_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of config.json without sizes that are null, also in its text_config.

    transformers refuses a size that is null, and takes its default for one that is absent.
    """
    kept = {
        name: value
        for name, value in config.items()
        if value is not None or name not in (*CONTEXT, *HIDDEN, *VOCABULARY)
    }
    if isinstance(inner := kept.get("text_config"), Mapping):
        kept["text_config"] = without_null_sizes(inner)
    return kept


def _needed(config: Any, names: tuple[str, ...]) -> int:
    size = _first(config, names)
    if size is None:
        raise ValueError(f"config.json states no {names[0]}, a size that every model has: add it")
    return size


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    """The first size that is stated by one of the names, in the config of the language model."""
    text = config.get_text_config(decoder=True)
    for holder in (text, config):
        for name in names:
            size = getattr(holder, name, None)
            if isinstance(size, int) and not isinstance(size, bool) and size > 0:
                return size
    return None
