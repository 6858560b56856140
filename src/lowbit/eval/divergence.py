"""How far a model's predictions are from the float model's, token by token.

Perplexity says whether the right token stayed likely; the Kullback-Leibler divergence says how much
of the whole distribution moved, and is the sharper measure where little did. Both models are
streamed block by block: neither is ever whole in memory, nor are the logits of a text.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lowbit.formats import use_backend
from lowbit.load import stream

Progress = Callable[[str, int, int], None]  # what is done, steps done, steps of
MOST_OF_MEMORY = 0.125  # hidden states that need more of the machine's go to disk; two are held
LOGITS = 2**25  # of one model at a time, 128 MiB: tokens are compared in pieces of so many


@dataclass(frozen=True)
class Divergence:
    """A model against a reference.

    kl: mean KL(reference || model) over the predicted tokens, in nats. agreement: on which share of
    them both hold the same token for the likeliest. tokens: how many they are.
    """

    kl: float
    agreement: float
    tokens: int


class StreamedLogits:
    """A folder's logits on given rows, made when they are asked for.

    rows: (tokens,) int64 each, of any lengths. The blocks are run at once, over all rows; kept are
    the hidden states behind the last one, in memory or, where they are large, in temporary files.
    bits: the widths at which a folder that matquant made runs. Quantized layers run their reference
    backend, so that a score depends on no compiler and no instruction set.
    """

    @use_backend("reference")
    def __init__(
        self,
        folder: Path,
        rows: Sequence[Tensor],
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        progress: Progress = lambda what, done, of: None,
        bits: int | str | None = None,
    ) -> None:
        self.folder = folder
        self.rows = rows
        model = stream(folder, trust_remote_code, bits)
        self.vocabulary = int(model.config.vocab_size)
        needed = 4 * sum(len(row) for row in rows) * int(model.config.hidden_size)
        large = needed > MOST_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._files = TemporaryDirectory(prefix="lowbit-") if large else None
        self._hidden = model.run(
            [row[None] for row in rows],
            device,
            Path(self._files.name) if self._files else None,
            lambda done, of: progress(f"{folder.name}: blocks", done, of),
        )
        self._without_blocks = model.without_blocks(device)

    @use_backend("reference")
    def __call__(self, index: int, part: slice) -> Tensor:
        """(tokens of the part, vocabulary) float32 of one row."""
        hidden = self._hidden[index].hidden[..., part, :]
        return self._without_blocks.logits(self.rows[index][None, part], hidden)[0].float()


def divergence(
    reference: StreamedLogits,
    model: StreamedLogits,
    rows: range,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Divergence, list[Tensor]]:
    """The model against the reference on some of the rows, which both must hold.

    Every token but the first of a row is predicted, as in `perplexity`. Also returns the model's
    losses at these tokens, (tokens - 1,) float32 on the CPU per row. Raises ValueError when the two
    vocabularies differ.
    """
    if reference.vocabulary != model.vocabulary:
        raise ValueError(
            f"{reference.folder} predicts {reference.vocabulary:,} tokens, {model.folder} "
            f"{model.vocabulary:,}: only models of one vocabulary have a divergence"
        )
    losses: list[Tensor] = []
    kl, agreed, tokens = 0.0, 0, 0
    for done, index in enumerate(rows, 1):
        row = model.rows[index]
        pieces = []
        for start in range(0, len(row) - 1, max(1, LOGITS // model.vocabulary)):
            part = slice(start, min(start + max(1, LOGITS // model.vocabulary), len(row) - 1))
            expected = torch.log_softmax(reference(index, part), -1)
            found = torch.log_softmax(model(index, part), -1)
            kl += kl_divergence(expected, found).double().sum().item()
            agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
            target = row[part.start + 1 : part.stop + 1].to(found.device)
            pieces.append(-found.gather(-1, target[:, None])[:, 0].cpu())
        losses.append(torch.cat(pieces))
        tokens += len(row) - 1
        progress(done, len(rows))
    return Divergence(kl / tokens, agreed / tokens, tokens), losses


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Of two logarithms of probabilities, (..., vocabulary): KL(expected || found), (...)."""
    share = expected.exp()
    # 0 * (-inf - x) is 0 here; a NaN of a broken model stays one.
    return torch.where(share == 0, share, share * (expected - found)).sum(-1)
