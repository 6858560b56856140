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
    return over_windows(losses_of(model, windows_of(tokens, seqlen, limit), progress), seqlen)


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
    rows = beginnings_of(documents, seqlen, limit)
    return over_documents(losses_of(model, rows, progress), seqlen)


def windows_of(tokens: Tensor, seqlen: int, limit: int | None = None) -> list[Tensor]:
    """The windows that `perplexity` is measured on: (seqlen,) int64 each."""
    windows = len(tokens) // seqlen
    if windows == 0:
        raise ValueError(
            f"the text has {len(tokens):,} tokens, less than one window of {seqlen:,}: "
            "use a longer text or a smaller --seqlen"
        )
    return list(tokens[: windows * seqlen].view(windows, seqlen)[:limit])


def beginnings_of(
    documents: Sequence[Tensor], seqlen: int, limit: int | None = None
) -> list[Tensor]:
    """What `perplexity_per_document` is measured on: (up to seqlen,) int64 each."""
    return [document[:seqlen] for document in documents][:limit]


def losses_of(
    model: nn.Module, rows: Sequence[Tensor], progress: Progress = lambda done, of: None
) -> list[Tensor]:
    """The cross-entropy of every token but the first of each row, (tokens - 1,) float32 each."""
    losses = []
    for i, row in enumerate(rows):
        losses.append(_losses(model, row))
        progress(i + 1, len(rows))
    return losses


def over_windows(losses: Sequence[Tensor], seqlen: int) -> Perplexity:
    """Every window counts the same."""
    means = [row.mean().item() for row in losses]
    return Perplexity(_exp(sum(means) / len(means)), len(losses), seqlen, _count(losses))


def over_documents(losses: Sequence[Tensor], seqlen: int) -> Perplexity:
    """Every token counts the same."""
    total = sum(row.double().sum().item() for row in losses)
    predicted = _count(losses)
    return Perplexity(_exp(total / predicted), len(losses), seqlen, predicted)


def _count(losses: Sequence[Tensor]) -> int:
    return sum(len(row) for row in losses)


def _exp(loss: float) -> float:
    """exp that is infinite where a float ends."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) or loss != loss else math.inf


def _losses(model: nn.Module, row: Tensor) -> Tensor:
    device = next(model.parameters()).device
    row = row.to(device)
    with torch.no_grad():
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), row[1:].to(logits.device), reduction="none")
