"""The stored formats by name, and a layer from what config.json says about it."""

from typing import Any

from lowbit.config import unknown_name
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.uniform import UniformLinear

FORMATS: dict[str, type[QuantizedLinear]] = {
    "uniform": UniformLinear,
}


def build(entry: dict[str, Any]) -> QuantizedLinear:
    """The empty layer that an entry describes. Raises ValueError for an entry that cannot be."""
    if not isinstance(entry, dict):
        raise ValueError(f"entry is {entry!r:.80}: allowed is a dict that names its format")
    name = entry.get("format", "")
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format: {unknown_name(str(name), FORMATS, 'format')}")
    return FORMATS[name].from_entry(entry)
