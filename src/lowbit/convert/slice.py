"""A folder of 8-bit codes that matquant made to one of a slice in its own bits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint import QuantizedFolder, file_sha256
from lowbit.checkpoint.folder import write_folder
from lowbit.checkpoint.ranges import collapse
from lowbit.checkpoint.slices import widths_of
from lowbit.checkpoint.verify import config_digest
from lowbit.formats import build
from lowbit.formats.nested import NestedLinear, to_uniform
from lowbit.formats.nested.widths import WidthPlan

Progress = Callable[[int, int], None]  # shards done, shards of


def slice_folder(
    folder: str | Path,
    out: str | Path,
    bits: WidthPlan,
    *,
    nested: bool = False,
    verify: bool = True,
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
    files = quantized.reader.files
    write_folder(out, cutting.shards(on_progress), len(files), cutting.config, folder)
    return out


class _Cutting:
    """A folder on its way into slices. entries: of all layers, of the slices once they are cut."""

    def __init__(self, quantized: QuantizedFolder, widths: dict[str, int], nested: bool) -> None:
        self.quantized = quantized
        self.widths = widths
        self.nested = nested
        self.entries = dict(quantized.entries)

    def check_extra_codes(self) -> None:
        """ValueError for a layer whose slice uses the code that extra precision adds."""
        for name, width in self.widths.items():
            if not self.entries[name]["extra_precision"] or width == 8:
                continue
            above = int((self._read(name).at(width).codes() == 2**width).sum())
            if above:
                raise ValueError(
                    f"layer {name}: {above:,} of its weights have the code {2**width} that extra "
                    f"precision adds: the uniform format holds 0 to {2**width - 1} at {width} "
                    "bits; cut nested slices instead (--nested)"
                )

    def shards(self, progress: Progress) -> Iterator[dict[str, Tensor]]:
        reader = self.quantized.reader
        tensors = {name: self.quantized.tensors_of(name) for name in self.widths}
        replaced = {tensor for names in tensors.values() for tensor in names}
        progress(0, len(reader.files))
        for done, file in enumerate(reader.files, 1):
            here = {name for name, info in reader.tensors.items() if info.file == file}
            shard = reader.read(sorted(here - replaced))
            for name, stored in tensors.items():
                if stored[0] in here:
                    shard |= self._cut(name)
            yield shard
            progress(done, len(reader.files))

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

    def _cut(self, name: str) -> dict[str, Tensor]:
        layer, width = self._read(name), self.widths[name]
        cut = to_uniform(layer, width) if not self.nested else _nested_slice(layer, width)
        self.entries[name] = cut.entry()
        return {f"{name}.{key}": tensor for key, tensor in cut.state_dict().items()}

    def _read(self, name: str) -> NestedLinear:
        layer = build(self.quantized.entries[name])
        assert isinstance(layer, NestedLinear)
        stored = self.quantized.reader.read(self.quantized.tensors_of(name))
        layer.load_state_dict({k.removeprefix(f"{name}."): t for k, t in stored.items()})
        return layer


def _nested_slice(layer: NestedLinear, bits: int) -> NestedLinear:
    return layer if layer.spec.resident == "slice" else layer.slice(bits)
