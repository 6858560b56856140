"""A folder or a hub id to a folder on disk."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

# Everything that a causal LM and its tokenizer need; never pickles, never code.
FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
]
CODE = ["*.py"]


def locate(model: str | Path, trust_remote_code: bool = False) -> Path:
    """The folder of `model`. Raises ValueError when it is neither a folder nor on the hub."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    name = str(model)
    if folder.is_absolute() or name.count("/") > 1 or name.startswith((".", "~")):
        raise ValueError(f"{name}: there is no such folder")
    patterns = FILES + CODE if trust_remote_code else FILES
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(f"{name!r} is neither a folder nor a hub id (OWNER/NAME)") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name!r} is no folder, and the hub does not give it ({reason}). "
            "Check the name, the network and `hf auth login`, or name a local folder"
        ) from None
