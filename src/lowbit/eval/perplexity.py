"""Perplexity as the papers measure it, and document by document."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Progress = Callable[[int, int], None]  # windows done, windows of


@dataclass(frozen=True)
class Perplexity:
    """value over `windows` windows (or documents) of up to `seqlen` tokens; `predicted` tokens."""

    value: float
    windows: int
    seqlen: int
    predicted: int


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    seqlen: int,
    limit: int | None = None,
    progress: Progress = lambda done, of: None,
) -> Perplexity:
    """exp(mean of the windows' mean losses), over non-overlapping windows of one token stream.

    tokens: (count,) int64; a rest shorter than a window is dropped. Within a window each token but
    the first is predicted (GPTQ's and OmniQuant's evaluation). limit: at most so many windows.
    Raises ValueError when there is not one window.
    """
    windows = len(tokens) // seqlen
    if windows == 0:
        raise ValueError(
            f"the text has {len(tokens):,} tokens, less than one window of {seqlen:,}: "
            "use a longer text or a smaller --seqlen"
        )
    rows = tokens[: windows * seqlen].view(windows, seqlen)[:limit]
    losses = []
    for i, row in enumerate(rows):
        losses.append(_losses(model, row).mean().item())
        progress(i + 1, len(rows))
    value = _exp(sum(losses) / len(losses))
    return Perplexity(value, len(rows), seqlen, len(rows) * (seqlen - 1))


def perplexity_per_document(
    model: nn.Module,
    documents: Sequence[Tensor],
    seqlen: int,
    limit: int | None = None,
    progress: Progress = lambda done, of: None,
) -> Perplexity:
    """exp(mean loss over all predicted tokens), each document by itself from its first token.

    documents: (count,) int64 each, cut to `seqlen` tokens. Not comparable with `perplexity`: no
    document is read across a boundary, and long documents weigh more.
    """
    rows = [document[:seqlen] for document in documents][:limit]
    total, predicted = 0.0, 0
    for i, row in enumerate(rows):
        losses = _losses(model, row)
        total += losses.double().sum().item()
        predicted += len(losses)
        progress(i + 1, len(rows))
    return Perplexity(_exp(total / predicted), len(rows), seqlen, predicted)


def _exp(loss: float) -> float:
    """exp that is infinite where a float ends."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) or loss != loss else math.inf


def _losses(model: nn.Module, row: Tensor) -> Tensor:
    """The cross-entropy of every token but the first, (tokens - 1,) float32."""
    device = next(model.parameters()).device
    row = row.to(device)
    with torch.no_grad():
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), row[1:].to(logits.device), reduction="none")
