"""What a method returns for a block, and the sentences for what it had to do in a simpler way."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lowbit.blocks import BlockTask
from lowbit.blocks.install import install
from lowbit.blocks.training import Fit
from lowbit.formats.activation import Activation
from lowbit.formats.base import QuantizedLinear
from lowbit.run_report import BlockReport, LinearReport, TrainingReport

NEAREST = "rounded to nearest"
NOT_POSITIVE_DEFINITE = f"Hessian not positive definite: {NEAREST}"


@dataclass(kw_only=True)
class BlockResult:
    """A quantized block, as the difference to the float one.

    linears: by the name of the linear that each replaces.
    tensors: new values of ALL other parameters that changed, by name.
    attention: how attentions round their queries, keys and values, by name.
    learned: what a later run can start from; written to OUT/learned/.
    report: what is known of the block and its linears.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Activation] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)
    report: BlockReport = field(default_factory=BlockReport)

    def install(self, block: nn.Module) -> None:
        """Makes the float block the quantized one, in place."""
        attention = {name: rounding.model_dump() for name, rounding in self.attention.items()}
        install(block, self.linears, self.tensors, attention)


def too_few_tokens(tokens: int, instead: str = NEAREST) -> str:
    """The sentence for a linear, of an expert, that saw too few calibration tokens."""
    return f"too few calibration tokens ({tokens}): {instead}"


def warn_of_hessians(task: BlockTask, linears: Mapping[str, LinearReport]) -> None:
    """One warning for all linears of the block whose Hessian is not positive definite.

    There is none for experts that saw too few tokens: they can be many, and report.json names them.
    """
    names = [name for name, found in linears.items() if found.fallback == NOT_POSITIVE_DEFINITE]
    if names:
        task.log.warn(f"{', '.join(names)}: {NOT_POSITIVE_DEFINITE}")


def trained_report(
    linears: Mapping[str, LinearReport],
    fitted: Fit,
    nearest: float | None,
    after: float,
    fallbacks: Sequence[str],
) -> BlockReport:
    """The report of a block that was trained.

    nearest: the loss of rounding to nearest, if it was measured.
    after: the loss of what is returned.
    fallbacks: sentences about the whole block.
    """
    training = TrainingReport(
        before=fitted.before,
        after=fitted.after,
        best_epoch=fitted.best_epoch,
        curve=fitted.curve,
        failures=fitted.failures,
    )
    return BlockReport(
        linears=dict(linears),
        training=training,
        loss_rtn=nearest,
        loss_before=fitted.before,
        loss_after=after,
        fallback="; ".join(fallbacks) or None,
    )


def signal_to_noise(weight: Tensor, linear: QuantizedLinear) -> float:
    """10 log10(|W|^2 / |W - dequantize()|^2), in decibels; inf for an exact copy.

    weight: (out, in) float32, the weight that was rounded.
    """
    noise = float((weight - linear.dequantize().to(weight.device)).square().sum())
    signal = float(weight.square().sum())
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
