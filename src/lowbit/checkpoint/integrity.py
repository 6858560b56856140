"""Compares a whole quantized folder with what was written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint.hashes import problems
from lowbit.checkpoint.quantized_folder import QuantizedFolder
from lowbit.checkpoint.reader import read_json
from lowbit.checkpoint.recognize import CONFIG, check_config
from lowbit.checkpoint.verify import config_digest, quantization_section


def folder_problems(folder: Path, signature: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Compares a whole quantized folder with what was written, hashes included.

    folder: a folder with a config.json, which is not trusted.
    signature: what the result of the run depends on; None: any run may have made the folder.

    Returns the problem of each file, as the rest of a sentence that begins with the file's name.
    """
    try:
        config = check_config(folder, read_json(folder / CONFIG))
        section = quantization_section(config, folder)
    except ValueError:
        return {"config.json": "is not the config.json of a quantized folder"}
    if section.get("digest", "") not in ("", config_digest(config)):
        return {"config.json": "was edited after quantization"}
    if signature is not None and not _made_by(section, signature):
        return {"config.json": "describes another run"}
    found = {name: problem for name, problem in problems(folder, section) if problem}
    if not found:
        try:
            QuantizedFolder(folder).verify(hashes=False)
        except ValueError as error:
            found["config.json"] = f"does not fit the shards ({error})"
    return found


def _made_by(section: Mapping[str, Any], signature: Mapping[str, Any]) -> bool:
    """Returns whether `made_by` in config.json is that of a run with this signature."""
    made_by = section.get("made_by")
    if not isinstance(made_by, dict):
        return False
    text = made_by.get("calibration")
    stated = {**made_by, "calibration": text.get("digest") if isinstance(text, dict) else None}
    return all(key in stated and stated[key] == value for key, value in signature.items())
