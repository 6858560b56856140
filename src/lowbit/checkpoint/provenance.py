"""Keeps paths of the maker's machine out of the folders that lowbit writes.

Earlier versions of transformers wrote the path from which a model or tokenizer was loaded into
config.json and tokenizer_config.json. Nothing reads these keys again.
"""

import json
import shutil
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lowbit.checkpoint.reader import read_json

KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
CONFIG_END = "config.json"  # config.json, tokenizer_config.json, generation_config.json, ...


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with only the last part of each absolute path that `KEYS` name."""
    return {key: _last_part(value) if key in KEYS else value for key, value in config.items()}


def copy_without_paths(source: Path, to: Path) -> None:
    """Copies a file byte by byte, unless it is a JSON config with such a path."""
    if source.name.endswith(CONFIG_END):
        try:
            config = read_json(source)
        except ValueError:
            config = None
        if isinstance(config, dict) and (shown := without_paths(config)) != config:
            to.write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
            return
    shutil.copyfile(source, to)


def _last_part(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute() or value.startswith("~"):
            return kind(value).name
    return value
