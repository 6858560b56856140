"""A folder of 8-bit codes that matquant made to one of a slice in its own bits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint import QuantizedFolder, file_sha256
from lowbit.checkpoint.folder import write_folder
from lowbit.checkpoint.quantized_folder import Progress
from lowbit.checkpoint.ranges import collapse
from lowbit.checkpoint.slices import widths_of
from lowbit.checkpoint.verify import config_digest
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.widths import WidthPlan, needs_codes, slice_layer


def slice_folder(
    folder: str | Path,
    out: str | Path,
    bits: WidthPlan,
    *,
    nested: bool = False,
    verify: bool = True,
    trust_remote_code: bool = False,
    on_progress: Progress = lambda done, of: None,
) -> Path:
    """Writes the upper bits of a MatQuant folder's 8-bit codes, and returns the new folder.

    All other tensors are copied bit for bit. One shard is in memory at a time.

    folder: a folder that MatQuant made.
    out: the folder to write, which must not exist.
    bits: one width from 2 to 8 for all layers, or {name or pattern of a layer: width}, or the path
        of a YAML file of that, as `lowbit.mix` makes it.
    nested: False: layers are stored in the uniform format, whose weights equal the slice's to the
        last bit. True: they keep the nested format, which also holds the additional level of
        `extra_precision`.
    verify: whether files are checked against their hashes first.
    trust_remote_code: whether Python code that comes with the model is copied.
    on_progress: called with the shards that are written, and their number in all.

    Raises ValueError, before anything is written, for a folder that is damaged, an `out` that
    exists, and a layer that the uniform format cannot hold.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already: choose another folder, or remove it")
    quantized = QuantizedFolder(folder)
    quantized.verify(hashes=verify)
    cutting = _Cutting(quantized, widths_of(quantized, bits), nested)
    if not nested:
        cutting.check_extra_codes()
    shards, count = cutting.shards(on_progress), len(quantized.reader.files)
    write_folder(out, shards, count, cutting.config, folder, trust_remote_code)
    return out


class _Cutting:
    """A folder that is being sliced. entries: of all layers; of the slices once they are cut."""

    def __init__(self, quantized: QuantizedFolder, widths: dict[str, int], nested: bool) -> None:
        self.quantized = quantized
        self.widths = widths
        self.nested = nested
        self.entries = dict(quantized.entries)

    def check_extra_codes(self) -> None:
        """ValueError for a layer whose slice uses the code that extra precision adds."""
        for name, width in self.widths.items():
            if not needs_codes(self.entries[name]):
                continue
            try:
                slice_layer(self.quantized.layer(name), width, keep_format=False)
            except ValueError as error:
                raise ValueError(
                    f"layer {name}: {error}; cut nested slices instead (--nested)"
                ) from None

    def shards(self, progress: Progress) -> Iterator[dict[str, Tensor]]:
        return self.quantized.converted_shards(self._cut, progress)

    def _cut(self, name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of a layer's slice, or those of a layer without widths; and the guard."""
        if name in self.widths:
            layer = slice_layer(layer, self.widths[name], self.nested)
            stated = {k: v for k, v in self.entries[name].items() if k == "dtype"}
            self.entries[name] = layer.entry() | stated  # of the float weight: a slice's too
        tensors: dict[str, Tensor] = dict(layer.state_dict())
        if (guard := self.quantized.guard) == f"{name}.weight":
            tensors["weight"] = self.quantized.reader.read([guard])[guard]
        return tensors

    def config(self, out: Path) -> dict[str, Any]:
        """The master's config.json with what has changed; `out` holds the shards."""
        master = self.quantized.quantization
        files = {
            path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(out.glob("*.safetensors"))
        }
        sliced = {
            "master": self.quantized.folder.resolve().name,
            "digest": config_digest(self.quantized.config),
            "bits": collapse(self.widths),
        }
        section = {
            **master,
            "modules": collapse(self.entries),
            "files": files,
            "made_by": {**(master.get("made_by") or {}), "sliced": sliced},
        }
        config = {**self.quantized.config, "quantization_config": section}
        section["digest"] = config_digest(config)
        return config
