"""Makes config.json of a folder that is made of another quantized folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint.companions import companions_of
from lowbit.checkpoint.hashes import FILES, OTHER_FILES, facts_of_files
from lowbit.checkpoint.provenance import without_paths
from lowbit.checkpoint.quantized_folder import QuantizedFolder
from lowbit.checkpoint.ranges import collapse
from lowbit.checkpoint.reader import INDEX
from lowbit.checkpoint.verify import config_digest

AS_IN_SOURCE = ("dtype", "transposed", "stack")  # of an entry: how the float weight was stored


def as_in_source(entry: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a layer's new entry, with what the layer does not know of its float weight.

    before: the entry in the folder from which the layer came.
    """
    return entry | {key: value for key, value in before.items() if key in AS_IN_SOURCE}


def derived_config(
    quantized: QuantizedFolder,
    out: Path,
    entries: Mapping[str, dict[str, Any]],
    made_by: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns config.json of a folder that is made of a quantized one.

    quantized: the folder from which it is made.
    out: the new folder, which holds all else.
    entries: the entries of its layers, by name on disk.
    made_by: what made_by says besides that of the quantized folder.
    """
    before = quantized.quantization
    names = sorted(path.name for path in out.glob("*.safetensors"))
    others = [Path(INDEX), *companions_of(out, code=True)]
    section = {
        **before,
        "modules": collapse(dict(entries)),
        FILES: facts_of_files(out, names),
        OTHER_FILES: facts_of_files(out, others),
        "made_by": {**(before.get("made_by") or {}), **made_by},
    }
    config = {**without_paths(quantized.config), "quantization_config": section}
    section["digest"] = config_digest(config)
    return config
