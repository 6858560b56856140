"""The tokenizer of a folder."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Raises ValueError when the folder has none that transformers understands."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a bad tokenizer.json, tokenizers raises a plain one
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder} has no tokenizer that can be loaded: {reason}") from None
