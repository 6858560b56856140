"""What a run found out about each linear and each block: OUT/report.json.

The method fills in `LinearReport` and `BlockReport`; everybody who shows a report reads the same
classes. They are the one place where a key of report.json is spelt: what is at its default is left
out of the file.

Files are read tolerantly. Keys that are not known are passed over, since another version may have
written them, and `fallbacks` is also found under its former name, "given_up". A number that JSON
cannot hold becomes null: decibels that are null are infinite (an exact copy), a loss that is null
was not finite.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
)


def _infinite_if_null(value: Any) -> Any:
    return math.inf if value is None else value


def _hundredths(value: float) -> float:
    return round(value, 2)


def _null_if_infinite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Signal to noise, rounded to 0.01 dB; infinite for an exact copy, which is null in JSON.
Decibels = Annotated[
    float,
    BeforeValidator(_infinite_if_null),
    AfterValidator(_hundredths),
    PlainSerializer(_null_if_infinite),
]
# A loss; None where it is not known or not finite.
Loss = Annotated[
    float | None, AfterValidator(lambda value: None if value is None else _null_if_infinite(value))
]
Name = Annotated[str, Field(max_length=10_000)]


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class LinearReport(_Report):
    """What is known of one quantized linear.

    signal_to_noise_db: 10 log10(|W|^2 / |W - dequantize()|^2) of the weight that was rounded.
    slices_db: the same by number of bits, for a weight that can be read at several.
    proxy_loss: the share of the output's energy that is lost, by the inputs' Hessian.
    salient_ratio: the share of the inputs that have more bits than the others.
    permutation: how the order of its inputs is kept: "stored", "folded" into the linear before, or
        "none" if they are not reordered.
    scale: of a codebook: one for the whole "tensor", or one for each "row".
    tokens: how many calibration tokens it saw.
    fallback: why and how it was quantized in a simpler way than asked for, in one sentence.
    """

    signal_to_noise_db: Decibels
    slices_db: dict[int, Decibels] = {}
    proxy_loss: Loss = None
    salient_ratio: float | None = None
    permutation: Literal["none", "stored", "folded"] | None = None
    scale: Literal["tensor", "row"] | None = None
    tokens: int | None = None
    fallback: str | None = None


class TrainingReport(_Report):
    """How the training of a block went.

    before, after: the loss of the initial and of the best values.
    best_epoch: when the best values were found; 0 are the initial ones.
    curve: the loss after each epoch.
    failures: what ended a try that was then repeated with smaller rates.
    """

    before: Loss = None
    after: Loss = None
    best_epoch: int = 0
    curve: list[Loss] = []
    failures: list[str] = []


class BlockReport(_Report):
    """What is known of one block.

    linears: by name, relative to the block; in memory while the method works, on disk in the file.
    training: None where nothing was trained.
    loss_rtn: the loss of rounding to nearest.
    loss_before, loss_after: the loss before training, and of what was written.
    fallback: why and how the whole block was quantized in a simpler way than asked for.
    """

    linears: dict[Name, LinearReport] = {}
    training: TrainingReport | None = None
    loss_rtn: Loss = None
    loss_before: Loss = None
    loss_after: Loss = None
    fallback: str | None = None

    @property
    def worst_proxy_loss(self) -> float | None:
        """The largest of all linears."""
        found = (linear.proxy_loss for linear in self.linears.values())
        return max((loss for loss in found if loss is not None), default=None)

    def renamed(self, names: Mapping[str, str]) -> "BlockReport":
        """The same report with other names for the linears.  names: the new by the old one."""
        linears = {names[name]: linear for name, linear in self.linears.items()}
        return self.model_copy(update={"linears": linears})

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is at its default is left out."""
        return self.model_dump(mode="json", exclude_defaults=True)


class RunReport(_Report):
    """report.json: all that a run reports, by names on disk.

    fallbacks: the sentences of all linears and blocks that fell back, by full name.
    left_float: full names of the matrices that no method got.
    blocks: by the block's name; their linears are named relative to the block.
    """

    fallbacks: dict[Name, str] = Field({}, validation_alias=AliasChoices("fallbacks", "given_up"))
    left_float: list[Name] = []
    blocks: dict[Name, BlockReport] = {}

    @classmethod
    def of(cls, blocks: Mapping[str, BlockReport], left_float: Sequence[str]) -> "RunReport":
        """The report of a finished run; collects what fell back."""
        fallbacks = {
            f"{block}.{linear}": found.fallback
            for block, report in blocks.items()
            for linear, found in report.linears.items()
            if found.fallback is not None
        }
        fallbacks |= {
            block: report.fallback
            for block, report in blocks.items()
            if report.fallback is not None
        }
        return cls(fallbacks=fallbacks, left_float=list(left_float), blocks=dict(blocks))

    def to_json(self) -> dict[str, Any]:
        """JSON values, in the order in which a reader wants them."""
        return {
            "fallbacks": self.fallbacks,
            "left_float": self.left_float,
            "blocks": {name: block.to_json() for name, block in self.blocks.items()},
        }
