"""What a run can be told besides its method: where it computes, what it leaves alone."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from lowbit.config import Config


class RunOptions(Config):
    """How a run is done, apart from the method and its text.

    device: "cpu", "cuda:0" or "auto". restart: start over in an OUT that holds another run.
    streams: where hidden states live; "auto" is memory unless they are large. allow_float: patterns
    of matrices that may stay float although no table groups them. cache: a folder for the windows.
    skip: patterns of linears that stay float. only: the others stay float. lm_head_bits: quantizes
    the output layer, rounded to nearest with a scale per row. start_from: an OUT whose learned
    parameters this run begins with; with `epochs=0` it replays them.
    dry_run_block: whether a block is rehearsed before the run; None: before a long run.
    recipe: the name that config.json shall give for the method's settings.
    """

    device: str = "auto"
    restart: bool = False
    streams: Literal["auto", "memory", "disk"] = "auto"
    allow_float: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    lm_head_bits: int | None = Field(None, ge=2, le=8)
    start_from: Path | None = None
    dry_run_block: bool | None = None
    trust_remote_code: bool = False
    cache: Path | None = None
    recipe: str | None = None


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
