"""Loads the processor of a folder, which turns text and images into the arguments of a model."""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from lowbit.models.config import load_config
from lowbit.parsing import reason_of

FILES = ("processor_config.json", "preprocessor_config.json")


def need_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """Returns the processor of a folder.

    Raises ValueError if it has none, as models that read text alone, or a damaged one.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(
            f"{folder} has no processor ({' or '.join(FILES)}), so the model cannot be calibrated "
            "with images: copy the processor of the model into the folder, or give text"
        )
    config = load_config(folder, trust_remote_code)
    try:
        processor = AutoProcessor.from_pretrained(
            folder, config=config, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises errors of many types
        missing = isinstance(error, ImportError)
        advice = "install the package" if missing else "copy it again from the source of the model"
        raise ValueError(
            f"{folder} has a processor that cannot be loaded: {advice} ({reason_of(error)})"
        ) from error
    if not callable(processor) or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{folder}: {type(processor).__name__} reads no images, so the model cannot be "
            "calibrated with images: give text"
        )
    return processor
