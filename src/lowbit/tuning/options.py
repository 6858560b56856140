"""The options of a tuning."""

from typing import Literal

from lowbit.config import Config, option

Place = Literal["auto", "memory", "disk"]


class TuneOptions(Config):
    """How the vectors of a quantized model are tuned, apart from the text."""

    steps: int = option(
        200, "Steps of the optimiser (AdamW).", shapes_result=True, ge=1, le=1_000_000
    )
    batch: int = option(4, "Windows of text in one step.", shapes_result=True, ge=1)
    rate: float = option(
        3e-3,
        "Learning rate of scales and signs, relative to each value; it falls to 0 along a cosine.",
        shapes_result=True,
        gt=0,
        lt=1,
    )
    norm_rate: float = option(
        1e-3,
        "Learning rate of norms and biases, relative to the size of the vector.",
        shapes_result=True,
        ge=0,
        lt=1,
    )
    held_out: float = option(
        0.125,
        "Share of the windows that is not trained on; the vectors that are best on it are kept.",
        shapes_result=True,
        gt=0,
        lt=1,
    )
    measure_every: int = option(
        50,
        "Steps between two measurements on the held-out windows, after which a stopped run can "
        "continue; the last step is measured too.",
        shapes_result=True,
        ge=1,
    )
    device: str = option(
        "auto",
        'Where to compute: "cpu", "cuda:0" or another device of torch, such as "xpu"; "auto": the '
        "first CUDA device if there is one.",
        shapes_result=True,
    )
    blocks: Place = option(
        "auto",
        'Where the blocks of the quantized model and their inputs are: in "memory", or on "disk", '
        'with one block in memory at a time; "auto": in memory, or on disk if they need more than '
        "half of it.",
        shapes_result=False,
    )
    restart: bool = option(
        False,
        "Whether to delete what a stopped run left in OUT.work, and start over.",
        shapes_result=False,
    )
    trust_remote_code: bool = option(
        False,
        "Whether Python code in the models' folders may be run, and is copied to OUT.",
        shapes_result=False,
    )

    def shaping_result(self) -> dict[str, object]:
        """Returns the options that change the result, as JSON values."""
        return self.model_dump(mode="json", exclude={"blocks", "restart", "trust_remote_code"})
