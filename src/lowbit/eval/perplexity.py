"""Computes perplexity over windows, as the papers do, or over single documents."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Progress = Callable[[int, int], None]  # windows done, windows in all


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    value: infinite or NaN for a broken model.
    windows: number of windows, or of documents.
    seqlen: tokens in a window, or most tokens of a document.
    predicted: number of predicted tokens.
    """

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
    """Computes exp(mean of the windows' mean losses) over non-overlapping windows.

    Every token of a window except the first is predicted. This is the evaluation of GPTQ and
    OmniQuant.

    model: maps `input_ids` to an output with `logits`, as models of transformers do.
    tokens: (count,) int64; a remainder shorter than a window is dropped.
    seqlen: tokens in a window.
    limit: most windows to measure; None: all.
    progress: called as progress(done, total), in windows.

    Raises ValueError if the text is shorter than a window.
    """
    return over_windows(losses_of(model, windows_of(tokens, seqlen, limit), progress), seqlen)


def perplexity_per_document(
    model: nn.Module,
    documents: Sequence[Tensor],
    seqlen: int,
    limit: int | None = None,
    progress: Progress = lambda done, of: None,
) -> Perplexity:
    """Computes exp(mean loss over all predicted tokens), with each document alone.

    It cannot be compared with `perplexity`: no window spans two documents, and long documents weigh
    more.

    model: as for `perplexity`.
    documents: (count,) int64 each.
    seqlen: most tokens of a document; the rest is dropped.
    limit: most documents to measure; None: all.
    progress: called as progress(done, total), in documents.
    """
    rows = beginnings_of(documents, seqlen, limit)
    return over_documents(losses_of(model, rows, progress), seqlen)


def windows_of(tokens: Tensor, seqlen: int, limit: int | None = None) -> list[Tensor]:
    """Cuts tokens into the windows of `perplexity`: (seqlen,) int64 each."""
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
    """Cuts documents for `perplexity_per_document`: (up to seqlen,) int64 each."""
    return [document[:seqlen] for document in documents][:limit]


def losses_of(
    model: nn.Module, rows: Sequence[Tensor], progress: Progress = lambda done, of: None
) -> list[Tensor]:
    """Computes the cross-entropy of all tokens except the first of a row: (tokens - 1,) float32."""
    losses = []
    for i, row in enumerate(rows):
        losses.append(_losses(model, row))
        progress(i + 1, len(rows))
    return losses


def over_windows(losses: Sequence[Tensor], seqlen: int) -> Perplexity:
    """Returns the perplexity in which every window has the same weight."""
    means = [row.mean().item() for row in losses]
    return Perplexity(_exp(sum(means) / len(means)), len(losses), seqlen, _count(losses))


def over_documents(losses: Sequence[Tensor], seqlen: int) -> Perplexity:
    """Returns the perplexity in which every token has the same weight."""
    total = sum(row.double().sum().item() for row in losses)
    predicted = _count(losses)
    return Perplexity(_exp(total / predicted), len(losses), seqlen, predicted)


def _count(losses: Sequence[Tensor]) -> int:
    return sum(len(row) for row in losses)


def _exp(loss: float) -> float:
    """exp(loss), or infinity if that is too large for a float."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) or loss != loss else math.inf


def _losses(model: nn.Module, row: Tensor) -> Tensor:
    device = next(model.parameters()).device
    row = row.to(device)
    with torch.no_grad():
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), row[1:].to(logits.device), reduction="none")
