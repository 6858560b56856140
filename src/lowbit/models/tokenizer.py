"""Loads the tokenizer of a folder."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lowbit.models.streamed import load_config

# Names of the files of a tokenizer (transformers, sentencepiece, tiktoken) and of its code.
FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "tokenization_*.py",
)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a folder; None if the folder has no tokenizer files.

    Raises ValueError if it has tokenizer files that transformers cannot read.
    """
    if not any(path.is_file() for pattern in FILES for path in folder.glob(pattern)):
        return None
    config = load_config(folder, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises a plain Exception for a bad tokenizer.json
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder} has a tokenizer that cannot be loaded: {reason}") from None


def check_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a model that is to be quantized.

    Raises ValueError if it has none, or a damaged one: nobody could use the result.
    """
    try:
        return need_tokenizer(folder, trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{error}; or leave the tokenizer out of OUT with --without-tokenizer "
            "(without_tokenizer=True)"
        ) from None


def need_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a folder. Raises ValueError if it has none."""
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if tokenizer is None:
        raise ValueError(
            f"{folder} has no tokenizer: copy the tokenizer files of its model into it "
            "(tokenizer.json, tokenizer_config.json)"
        )
    return tokenizer
