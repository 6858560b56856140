"""A folder to a model that runs, whole or streamed block by block."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.checkpoint.slices import widths_of
from lowbit.checkpoint.verify import read_config
from lowbit.formats.widths import WidthPlan, set_bits
from lowbit.load.transformers_plugin import (
    VerifiedSection,
    mark_attentions,
    on_cpu,
    places_of,
    replace_linears,
)
from lowbit.models.locate import locate
from lowbit.models.streamed import StreamedModel, load_config
from lowbit.models.tokenizer import load_tokenizer


def load(
    model: str | Path,
    *,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    bits: WidthPlan | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Loads a quantized or a float model: (model, tokenizer); the latter None where there is none.

    model: a folder, or a hub id.
    device_map: as transformers takes it; None: everything on the CPU.
    dtype: of all that is not quantized; None: float32 on the CPU (half precision there is hundreds
        of times slower), else the checkpoint's own.
    verify: check the hashes of all files; False checks names, shapes and sizes only.
    trust_remote_code: run Python code that comes with the model.
    bits: of a folder that matquant made, keep only slices of these widths, cut while it is read:
        one width, {name or pattern: width}, or the path of a YAML file of that; None: the 8-bit
        codes, for `set_bits`.

    Raises ValueError that names the file or tensor that is wrong.
    """
    folder = locate(model, trust_remote_code)
    return (
        load_model(folder, device_map, dtype, verify, trust_remote_code, bits),
        load_tokenizer(folder, trust_remote_code),
    )


def load_model(
    folder: Path,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    bits: WidthPlan | None = None,
) -> PreTrainedModel:
    """The model alone; see `load`."""
    section = read_config(folder).get("quantization_config")
    verified = None
    if isinstance(section, dict) and section.get("quant_method") == "lowbit":
        QuantizedFolder(folder).verify(hashes=verify)
        verified = VerifiedSection(section, bits)
    elif bits is not None:
        raise ValueError(f"{folder} is a float model: bits is for what lowbit has quantized")
    else:
        check_float(folder)
    if bits is not None and "disk" in places_of(device_map):
        raise ValueError(
            f"{folder}: slices are cut in memory; to have layers on the disk, write a folder of "
            "the slice first"
        )
    with _refused(folder):
        config = load_config(folder, trust_remote_code)
        if verified is not None:
            config.quantization_config = verified
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or (torch.float32 if on_cpu(device_map) else "auto"),
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model, report = loaded
        if report["missing_keys"]:  # transformers has invented them
            raise ValueError(f"tensor {min(report['missing_keys'])} is missing")
    return model


def set_widths(model: PreTrainedModel, folder: Path, bits: WidthPlan) -> None:
    """Runs the loaded model of a folder, which holds 8-bit codes, at other widths from now on.

    bits: as `load` takes it, with names on disk; what it does not name runs at its folder's width.
    """
    set_bits(model, widths_of(QuantizedFolder(folder), bits))


def stream(
    folder: Path, trust_remote_code: bool = False, bits: WidthPlan | None = None
) -> StreamedModel:
    """The model of a float or a quantized folder, to be run block by block in float32.

    bits: the widths at which a folder that matquant made runs; see `load`.

    Raises ValueError that names the file or tensor that is wrong.
    """
    section = read_config(folder).get("quantization_config")
    config = load_config(folder, trust_remote_code)
    if section is None and bits is None:
        check_float(folder)
        return StreamedModel(folder, config, trust_remote_code)
    quantized = QuantizedFolder(folder)
    quantized.verify()
    entries = dict(quantized.entries)
    if bits is not None:
        widths = widths_of(quantized, bits)
        entries |= {name: {**entries[name], "bits": width} for name, width in widths.items()}

    def prepare(model: PreTrainedModel) -> None:
        replace_linears(model, entries)
        mark_attentions(model, quantized.attention)

    return StreamedModel(folder, config, trust_remote_code, prepare)


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Turns what transformers makes of a bad config.json, whatever it is, into a ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{folder} cannot be loaded: {kind}{error}") from error


def check_float(folder: Path) -> None:
    """ValueError for a folder without quantization_config that has no float weights to load.

    It may hold pickles, broken shards, or weights that lowbit has quantized: then the guard tensor
    shows it.
    """
    for name, info in CheckpointReader(folder).tensors.items():
        if 0 in info.shape:
            raise ValueError(
                f"{folder}: tensor {name} is empty, as where lowbit has quantized, "
                "but config.json says nothing of it"
            )
