"""Sensitivity: measures the loss of each unit at each width, while all others run at 8 bits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowbit.eval.divergence import kl_divergence
from lowbit.formats.base import QuantizedLinear

Progress = Callable[[int, int], None]  # runs of the model done, runs in all


def sensitivity(
    model: nn.Module,
    units: Sequence[Sequence[QuantizedLinear]],
    widths: Sequence[int],
    windows: Sequence[Tensor],
    progress: Progress = lambda done, of: None,
) -> Tensor:
    """Measures the loss of lowering one unit to one width, for all units and widths.

    model: a model whose layers have several widths; all of them run at 8 bits afterwards.
    units: the layers of each unit.
    widths: the widths to measure.
    windows: (tokens,) int64 each.
    progress: called as progress(done, total), in runs of the model.

    Returns (units, widths) float64: the mean KL(all layers at 8 bits || one unit at that width)
    over all predicted tokens, in nats; 0 at 8 bits.
    Raises ValueError if the model's predictions are not finite.
    """
    losses = torch.zeros(len(units), len(widths), dtype=torch.float64)
    whole = max(width for unit in units for layer in unit for width in layer.widths)
    lower = [i for i, width in enumerate(widths) if width != whole]
    steps = len(windows) * (1 + len(units) * len(lower))
    done = 0
    for unit in units:
        _run_at(unit, whole)
    for window in windows:
        expected = _predictions(model, window)
        done += 1
        progress(done, steps)
        for row, unit in enumerate(units):
            for column in lower:
                _run_at(unit, widths[column])
                predicted = _predictions(model, window)
                losses[row, column] += kl_divergence(expected, predicted).double().sum().item()
                done += 1
                progress(done, steps)
            _run_at(unit, whole)
    if not losses.isfinite().all():
        raise ValueError("the model's predictions on this text are not numbers: check the model")
    return losses / sum(len(window) - 1 for window in windows)


def _run_at(unit: Sequence[QuantizedLinear], bits: int) -> None:
    for layer in unit:
        layer.set_bits(bits)


def _predictions(model: nn.Module, window: Tensor) -> Tensor:
    """Returns the logarithms of all predicted probabilities: (tokens - 1, vocabulary) float32."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(input_ids=window[None].to(device), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1)
