"""Train parameters of a block with AdamW and keep the values with the lowest loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from lowbit.events import BlockLog
from lowbit.kernels.precision import faster
from lowbit.ranks import ALONE, Ranks

RATE_CUT = 0.1  # factor of the learning rates in a new try after a non-finite loss
TRIES = 3


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[Tensor]
    rate: float


@dataclass(kw_only=True)
class Fit:
    """The course of a training. Losses are means over all batches, at fixed parameters.

    before: the loss of the initial values.
    after: the loss of the best values, which are kept.
    best_epoch: the epoch of the best values; 0 for the initial values.
    curve: the loss after each epoch, over all tries.
    failures: one sentence for each try that ended early.
    """

    before: float
    after: float
    best_epoch: int = 0
    curve: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


_any_is_better: ContextVar[bool] = ContextVar("lowbit_any_is_better", default=False)


@contextmanager
def any_is_better() -> Iterator[None]:
    """Within it, whatever was learned counts as better than what was there before.

    A dry run needs that: what follows, and takes time, then does not depend on a few batches.
    """
    token = _any_is_better.set(True)
    try:
        yield
    finally:
        _any_is_better.reset(token)


def is_better(loss: float, earlier: float, or_equal: bool = False) -> bool:
    """Returns whether a loss is lower than an earlier one; see `any_is_better`."""
    return loss < earlier or (or_equal and loss == earlier) or _any_is_better.get()


def fit(
    groups: Sequence[ParameterGroup],
    loss: Callable[[int], Tensor],
    batches: int,
    epochs: int,
    log: BlockLog,
    weight_decay: float = 0.0,
    ranks: Ranks = ALONE,
    fixed: Callable[[], Callable[[int], Tensor]] | None = None,
) -> Fit:
    """Minimises the mean of loss(0), ..., loss(batches - 1) over the parameters.

    Batches are taken in order. After each epoch the loss is measured over all batches at fixed
    parameters. In the end the parameters have the values with the lowest loss that was measured,
    which may be the initial ones. A non-finite loss or gradient ends the try; the next one starts
    from the initial values with a tenth of the learning rates. There are at most TRIES tries.

    groups: the parameters and their learning rates.
    loss: returns the loss of a batch, given its index.
    batches: the number of batches.
    epochs: the number of passes over all batches.
    log: receives the loss of every epoch, and a warning for every try that ended early.
    weight_decay: AdamW's weight decay, for all parameters.
    ranks: the processes that share the batches. The one that a batch belongs to computes its
        gradients, and all of them take the step. The losses are computed at the same time.
    fixed: returns the loss of a batch at the present parameters. What does not depend on the batch
        is then computed once for all batches that are measured; None: `loss` itself.
    """
    parameters = [p for group in groups for p in group.parameters]
    initial = [p.detach().clone() for p in parameters]

    def measured() -> float:
        with torch.no_grad():
            return mean_loss(loss if fixed is None else fixed(), batches, ranks)

    before = measured()
    result = Fit(before=before, after=before)
    best = initial
    for attempt in range(TRIES if parameters and epochs else 0):
        _restore(parameters, initial)
        optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters), "lr": g.rate * RATE_CUT**attempt} for g in groups],
            weight_decay=weight_decay,
        )
        for epoch in range(1, epochs + 1):
            stepped = _epoch(optimizer, parameters, loss, batches, ranks)
            now = measured() if stepped else math.nan
            if not math.isfinite(now):
                result.failures.append(f"non-finite loss in epoch {epoch} of try {attempt + 1}")
                log.warn(result.failures[-1])
                break
            result.curve.append(now)
            log.epoch(epoch, now)
            if is_better(now, result.after) or math.isnan(result.after):
                result.after, result.best_epoch = now, epoch
                best = [p.detach().clone() for p in parameters]
        else:
            break
    _restore(parameters, best)
    return result


def mean_loss(
    loss: Callable[[int], Tensor], batches: int | Sequence[int], ranks: Ranks = ALONE
) -> float:
    """Returns the mean loss over some batches, computed without gradients.

    loss: returns the loss of a batch, given its index.
    batches: the indices of the batches, or the number of all.
    ranks: the processes that share the batches.
    """
    chosen = range(batches) if isinstance(batches, int) else batches
    with torch.no_grad(), faster():
        if ranks.count > 1:
            return sum(ranks.losses(chosen, lambda i: float(loss(i)))) / len(chosen)
        # A GPU is waited for once, not after every batch.
        return sum(torch.stack([loss(i) for i in chosen]).tolist()) / len(chosen)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether all values are finite, for which a GPU is waited for once."""
    return bool(get_total_norm([t for t in tensors if t.numel()], math.inf).isfinite())


def _epoch(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    batches: int,
    ranks: Ranks,
) -> bool:
    """Trains for one epoch; returns False as soon as a loss or gradient is not finite."""
    for i in range(batches):
        optimizer.zero_grad(set_to_none=True)
        finite = gradients(parameters, loss, i) if ranks.has(i) else True
        if ranks.count > 1:
            finite = share_gradients(parameters, finite, ranks, ranks.owner(i))
        if not finite:
            return False
        optimizer.step()
    return True


def gradients(parameters: Sequence[Tensor], loss: Callable[[int], Tensor], batch: int) -> bool:
    """Adds the gradients of a batch; returns whether its loss and they are finite."""
    with faster():
        value = loss(batch)
    with faster(backward=True):
        value.backward()
    found = [p.grad for p in parameters if p.grad is not None]
    return all_finite([value.detach(), *found])


def share_gradients(parameters: Sequence[Tensor], finite: bool, ranks: Ranks, source: int) -> bool:
    """Gives the gradients of one process to all; returns whether they are finite.

    finite: whether those of this process are.
    """
    known = [p.grad is not None for p in parameters]
    finite, known = ranks.value(lambda: (finite, known), source)
    if finite:
        found = ranks.tensors(
            lambda: {str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}, source
        )
        for index, parameter in enumerate(parameters):
            if known[index] and ranks.index != source:
                parameter.grad = found[str(index)].to(parameter.device)
    return bool(finite)


def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
