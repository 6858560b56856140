"""A model that the caller holds in memory, as the folder that everything else reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def as_folder(model: str | Path | nn.Module, tokenizer: Any, beside: Path) -> Iterator[str | Path]:
    """A folder or hub id as it is; a model in memory as a temporary folder.

    tokenizer: of a model in memory, if it has one.
    beside: where a temporary folder stands: next to this path.
    Raises ValueError for a tokenizer that comes with a folder, and as `saved_beside` does.
    """
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ValueError(
                f"tokenizer is for a model in memory; {model} brings its own: leave it out, or "
                "save that tokenizer into the folder"
            )
        yield model
        return
    with saved_beside(model, tokenizer, beside) as folder:
        yield folder


@contextmanager
def saved_beside(model: nn.Module, tokenizer: Any, out: Path) -> Iterator[Path]:
    """Saves a float model into a temporary folder on the disk of `out`.

    tokenizer: saved with it; None: the folder has none.
    out: the temporary folder stands beside it, since other places may be too small.
    Raises ValueError for a model that is quantized, or not all in memory.
    """
    checked = _check(model)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as place:
        folder = Path(place) / name_of(checked)
        try:
            checked.save_pretrained(folder)
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


def _check(model: nn.Module) -> PreTrainedModel:
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
    return model
