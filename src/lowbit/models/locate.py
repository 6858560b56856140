"""A folder or a hub id to a folder on disk."""

from pathlib import Path

from huggingface_hub import HfApi, get_repo_discussions, snapshot_download
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

# The hub's own converter and what it calls its pull requests, as transformers looks for them.
CONVERTER = "SFconvertbot"
CONVERSION = "Adding `safetensors` variant of this model"


def locate(model: str | Path, trust_remote_code: bool = False) -> Path:
    """The folder of `model`. Raises ValueError when it is neither a folder nor on the hub.

    Where a repository has its weights only as pickles, it is the revision to which the hub has
    converted them; ValueError when there is none.
    """
    folder, name = Path(model), str(model)
    if name and folder.is_dir():  # Path("") is the current folder
        return folder
    if name and folder.is_file():
        raise ValueError(f"{name} is a file: name the folder that it is in")
    if folder.is_absolute() or name.count("/") > 1 or name.startswith((".", "~")):
        raise ValueError(f"{name}: there is no such folder")
    patterns = FILES + CODE if trust_remote_code else FILES
    try:
        found = Path(snapshot_download(name, allow_patterns=patterns))
        if any(found.glob("*.safetensors")):
            return found
        revision = converted_revision(name, found.name)
        if revision is not None:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(f"{name!r} is neither a folder nor a hub id (OWNER/NAME)") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name!r} is no folder, and the hub does not give it ({reason}). "
            "Check the name, the network and `hf auth login`, or name a local folder"
        ) from None
    folder_name = name.rpartition("/")[2]
    raise ValueError(
        f"{name!r} has no safetensors, and the hub has not converted it. If you trust its source: "
        f"hf download {name} --local-dir {folder_name}, then "
        f"lowbit convert {folder_name} {folder_name}-safetensors --from-bin, and use that folder"
    )


def converted_revision(name: str, commit: str) -> str | None:
    """refs/pr/N, where the hub offers this commit of the repository in safetensors; or None.

    Only a pull request of the hub's own converter counts, on top of this very commit: anybody may
    open one of the same title.
    """
    offered = get_repo_discussions(
        name, author=CONVERTER, discussion_type="pull_request", discussion_status="open"
    )
    for request in offered:
        reference = request.git_reference
        if (request.title, request.author) != (CONVERSION, CONVERTER) or reference is None:
            continue
        history = [entry.commit_id for entry in HfApi().list_repo_commits(name, revision=reference)]
        if history[1:2] == [commit]:
            return str(reference)
    return None
