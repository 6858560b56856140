"""What each unit costs at each width: measured, one unit at a time, against the 8-bit codes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowbit.eval.divergence import kl_divergence
from lowbit.formats.base import QuantizedLinear

Progress = Callable[[int, int], None]  # runs of the model done, runs of


def sensitivity(
    model: nn.Module,
    units: Sequence[Sequence[QuantizedLinear]],
    widths: Sequence[int],
    windows: Sequence[Tensor],
    progress: Progress = lambda done, of: None,
) -> Tensor:
    """Mean KL(all layers at 8 bits || one unit at a width) over all predicted tokens, in nats.

    units: the layers of each, which hold their 8-bit codes; they run at 8 bits afterwards.
    windows: (tokens,) int64 each  ->  (units, widths) float64; 0 at 8 bits

    Raises ValueError where the model's predictions are not numbers.
    """
    lost = torch.zeros(len(units), len(widths), dtype=torch.float64)
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
                found = _predictions(model, window)
                lost[row, column] += kl_divergence(expected, found).double().sum().item()
                done += 1
                progress(done, steps)
            _run_at(unit, whole)
    if not lost.isfinite().all():
        raise ValueError("the model's predictions on this text are not numbers: nothing to compare")
    return lost / sum(len(window) - 1 for window in windows)


def _run_at(unit: Sequence[QuantizedLinear], bits: int) -> None:
    for layer in unit:
        layer.set_bits(bits)


def _predictions(model: nn.Module, window: Tensor) -> Tensor:
    """(tokens - 1, vocabulary) float32, logarithms of probabilities."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(input_ids=window[None].to(device), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1)
