"""What a method is: a frozen configuration that turns a block in float into a quantized one."""

from abc import abstractmethod
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError, model_validator
from torch import nn

from lowbit.blocks import BlockTask
from lowbit.config import Config, explain, unknown_name
from lowbit.methods.result import BlockResult
from lowbit.patterns import matches


class Method(Config):
    """A method IS its configuration; `name` is also the name of its file.

    per_linear: names of the fields that `overrides` may change for some linears.
    learns: whether `BlockResult.learned` can be a task's `start`.
    """

    name: ClassVar[str]
    per_linear: ClassVar[tuple[str, ...]] = ()
    learns: ClassVar[bool] = False

    overrides: dict[str, dict[str, Any]] = Field(
        {},
        description='Fields that differ for some linears, by pattern of their names: {"down_proj": '
        '{"bits": 4}}; of several patterns that match, the last one wins.',
    )

    @model_validator(mode="after")
    def _check_overrides(self) -> Self:
        for pattern, fields in self.overrides.items():
            for field in fields:
                if field not in self.per_linear:
                    what = f"field that {self.name} can have per linear"
                    sentence = unknown_name(field, self.per_linear, what)
                    raise ValueError(f"overrides.{pattern}: {sentence}")
            try:
                self._with(fields)
            except ValidationError as error:
                raise ValueError(f"overrides.{pattern}: {explain(error)}") from None
        return self

    def _with(self, fields: dict[str, Any]) -> Self:
        return self.model_validate({**self.model_dump(exclude={"overrides"}), **fields})

    def at(self, linear: str) -> Self:
        """The settings for one linear, by its full name: "model.layers.3.mlp.down_proj"."""
        fields: dict[str, Any] = {}
        for pattern, differing in self.overrides.items():
            if matches(linear, pattern):
                fields |= differing
        return self._with(fields) if fields else self

    def streams(self) -> tuple[str, ...]:
        """The streams of hidden states that it needs; none: no calibration text."""
        return ()

    def windows_per_batch(self) -> int:
        """How many calibration windows make one batch of a stream."""
        return 1

    @abstractmethod
    def weight_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a linear on disk without its bias; scales and all else that it needs included.

        rows, columns: outputs and inputs of the linear.
        """

    @abstractmethod
    def quantize(self, task: BlockTask) -> BlockResult:
        """Chooses the numbers for one block; `task.block` stays as it is."""

    def install(self, block: nn.Module, result: BlockResult, stream: str) -> None:
        """Changes the block to what `stream` must pass through; "float" is left alone."""
        if stream != "float":
            result.install(block)

    def signature(self) -> dict[str, Any]:
        """Everything that shapes the result, as JSON values; what may differ per linear first."""
        fields = self.model_dump(mode="json")
        return {"name": self.name, **{name: fields[name] for name in self.per_linear}, **fields}
