"""What a run can be told besides its method: where it computes, what it leaves alone."""

from pathlib import Path
from typing import Any, Literal

import torch

from lowbit.config import Config, option, shapes_result

Place = Literal["auto", "memory", "disk"]


class RunOptions(Config):
    """How a run is done, apart from the method and its calibration text."""

    device: str = option(
        "auto",
        'Where to compute: "cpu", "cuda:0" or another GPU; "auto": the first GPU if there is one.',
        shapes_result=True,
    )
    restart: bool = option(
        False,
        "Whether to delete another run that OUT holds, and start over.",
        shapes_result=False,
    )
    streams: Place = option(
        "auto",
        'Where hidden states are kept; "auto": in memory, or on disk if they would take more than '
        "a quarter of it.",
        shapes_result=False,
    )
    allow_float: tuple[str, ...] = option(
        (),
        "Patterns of matrices that may stay in float although lowbit does not know what they are.",
        shapes_result=True,
    )
    skip: tuple[str, ...] = option(
        (),
        'Patterns of linears that stay in float: "down_proj", "layers.0.*".',
        shapes_result=True,
    )
    only: tuple[str, ...] = option(
        (),
        "Patterns of the only linears that are quantized; empty: all are.",
        shapes_result=True,
    )
    lm_head_bits: int | None = option(
        None,
        "Bits of the output layer, which is rounded to nearest with a scale for each row; None: it "
        "stays in float.",
        shapes_result=True,
        ge=2,
        le=8,
    )
    start_from: Path | None = option(
        None,
        "Folder of an earlier run whose learned parameters this run starts from; with the method's "
        "epochs at 0 it applies them as they are.",
        shapes_result=True,
    )
    dry_run_block: bool | None = option(
        None,
        "Whether one block is tried before the run, so that what cannot work fails early; None: if "
        "the run may take more than an hour.",
        shapes_result=False,
    )
    trust_remote_code: bool = option(
        False,
        "Whether Python code that comes with the model may be run.",
        shapes_result=False,
    )
    cache: Path | None = option(
        None,
        "Folder that keeps the tokens of calibration texts for later runs; None: none does.",
        shapes_result=False,
    )
    recipe: str | None = option(
        None,
        "Name of the recipe that config.json shall state; None: none.",
        shapes_result=True,
    )

    def shaping_result(self) -> dict[str, Any]:
        """The options that shape the result, as JSON values, in the order of the fields."""
        names = {name for name, field in type(self).model_fields.items() if shapes_result(field)}
        return self.model_dump(mode="json", include=names)


def choose_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device if there is one. ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not known: use cpu, cuda:N or auto")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(f"device {name!r} was asked for, but torch finds {found} CUDA devices")
    return device
