"""The one block-wise trainer: AdamW over learned parameters, the best iterate, never a dead run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.blocks import Event

RATE_CUT = 0.1  # a run that met a non-finite loss is tried again with this share of its rates
TRIES = 3


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are learned with one rate."""

    parameters: Sequence[Tensor]
    rate: float


@dataclass
class Fit:
    """How a training went. Losses are means over the batches, at fixed parameters."""

    before: float
    after: float
    best_epoch: int = 0  # 0: the initial values
    curve: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value != []}


def fit(
    groups: Sequence[ParameterGroup],
    loss: Callable[[int], Tensor],
    batches: int,
    epochs: int,
    log: Callable[[Event], None],
    weight_decay: float = 0.0,
) -> Fit:
    """Minimises the mean of loss(0), ..., loss(batches - 1) and leaves the best iterate in place.

    Batches are taken in order. After each epoch the loss is measured over all batches at fixed
    parameters; the best of these and of the initial values wins. A non-finite loss or gradient ends
    the try: the next starts from the initial values with a tenth of the rates; after TRIES the best
    values so far, at worst the initial ones, stay.
    """
    parameters = [p for group in groups for p in group.parameters]
    initial = [p.detach().clone() for p in parameters]
    before = mean_loss(loss, batches)
    result = Fit(before=before, after=before)
    best = initial
    for attempt in range(TRIES if parameters and epochs else 0):
        _restore(parameters, initial)
        optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters), "lr": g.rate * RATE_CUT**attempt} for g in groups],
            weight_decay=weight_decay,
        )
        for epoch in range(1, epochs + 1):
            stepped = _epoch(optimizer, parameters, loss, batches)
            now = mean_loss(loss, batches) if stepped else math.nan
            if not math.isfinite(now):
                result.failures.append(f"non-finite loss in epoch {epoch} of try {attempt + 1}")
                log(Event("warning", {"text": result.failures[-1]}))
                break
            result.curve.append(now)
            log(Event("epoch", {"epoch": epoch, "loss": now}))
            if now < result.after or math.isnan(result.after):
                result.after, result.best_epoch = now, epoch
                best = [p.detach().clone() for p in parameters]
        else:
            break
    _restore(parameters, best)
    return result


def mean_loss(loss: Callable[[int], Tensor], batches: int) -> float:
    """The mean over all batches, without gradients."""
    with torch.no_grad():
        return sum(float(loss(i)) for i in range(batches)) / batches


def _epoch(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    batches: int,
) -> bool:
    """One pass; False when a loss or gradient is not finite (its step is not taken)."""
    for i in range(batches):
        optimizer.zero_grad(set_to_none=True)
        value = loss(i)
        if not torch.isfinite(value):
            return False
        value.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            return False
        optimizer.step()
    return True


def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
