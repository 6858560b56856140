"""A model that the caller holds in memory, as the folder that everything else reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel


@contextmanager
def saved_beside(model: PreTrainedModel, tokenizer: Any, out: Path) -> Iterator[Path]:
    """Saves a float model into a temporary folder on the disk of `out`.

    tokenizer: saved with it; None: the folder has none.
    out: the temporary folder stands beside it, since other places may be too small.
    Raises ValueError for a model that is quantized, or not all in memory.
    """
    _check(model)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as place:
        folder = Path(place) / name_of(model)
        try:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except Exception as error:  # transformers has many, for a bad generation config for one
            raise ValueError(
                f"the model cannot be saved to be read block by block: {error}"
            ) from error
        yield folder


def name_of(model: PreTrainedModel) -> str:
    """What the model is called in a result: the end of its path or hub id, else its class."""
    name = Path(str(getattr(model.config, "name_or_path", "") or "")).name
    return name or type(model).__name__


def _check(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model is a {type(model).__name__}: allowed are a folder, a hub id, or a transformers "
            "model (of a model with adapters, merge them first)"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is already quantized; quantize the float model instead")
    absent = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if absent is not None:
        raise ValueError(
            f"parameter {absent} is not in memory (it is on the meta device): load the model whole,"
            " or name its folder, which is then read block by block"
        )
