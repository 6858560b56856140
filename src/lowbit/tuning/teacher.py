"""The predictions of the float model, which are computed once and kept on disk.

A whole distribution takes 500 KB for each token of a vocabulary of 128,000. Kept are the TOP most
likely tokens and what is left of the probability: 516 bytes. The divergence over these outcomes is
a lower bound of the divergence over all tokens.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.kept import is_kept, keep
from lowbit.checkpoint.writer import save_tensors
from lowbit.eval.divergence import LOGITS, StreamedLogits, kl_divergence

TOP = 64  # most likely tokens that are kept


class Teacher:
    """The predictions of the float model for each window, on disk.

    folder: holds one file for each window once `is_complete`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def is_complete(self) -> bool:
        return is_kept(self.folder)

    def write(
        self, model: StreamedLogits, progress: Callable[[int, int], None] = lambda done, of: None
    ) -> None:
        """Computes and keeps the predictions for all rows of a model.

        progress: called as progress(done, total), in windows.
        """
        self.folder.mkdir(exist_ok=True)
        at_once = max(1, LOGITS // model.vocabulary)
        for window, row in enumerate(model.rows):
            last = len(row) - 1
            starts = range(0, last, at_once)
            parts = [slice(start, min(start + at_once, last)) for start in starts]
            found = [most_likely(model(window, part)) for part in parts]
            tokens, kept = (torch.cat(each) for each in zip(*found, strict=True))
            save_tensors(self._file(window), {"tokens": tokens.int(), "logarithms": kept})
            progress(window + 1, len(model.rows))
        keep(self.folder)

    def __getitem__(self, window: int) -> tuple[Tensor, Tensor]:
        """Returns what `most_likely` returned for a window."""
        reader = CheckpointReader.of_file(self._file(window))
        found = reader.read(reader.tensors)
        return found["tokens"].long(), found["logarithms"]

    def _file(self, window: int) -> Path:
        return self.folder / f"{window:05d}.safetensors"


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the most likely tokens of each position, and the logarithms of their probabilities.

    logits: (positions, vocabulary) float32.

    Returns tokens (positions, TOP) int64, fewer with a small vocabulary, and what `outcomes`
    returns for them.
    """
    tokens = logits.topk(min(TOP, logits.shape[-1] - 1)).indices
    return tokens, outcomes(logits, tokens)


def outcomes(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns the logarithms of the probabilities of some tokens, and of all others together.

    logits: (positions, vocabulary) float32.
    tokens: (positions, n) int64, n below the vocabulary.

    Returns (positions, n + 1) float32.
    """
    rest = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    chosen = torch.cat([logits.gather(-1, tokens), rest], -1)
    return chosen - logits.logsumexp(-1, keepdim=True)


def loss(logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Returns KL(float || model) of each position, over the outcomes that were kept, in nats.

    logits: (positions, vocabulary) float32, of the quantized model.
    target: what `most_likely` returned for the float model.
    """
    tokens, expected = target
    return kl_divergence(expected, outcomes(logits, tokens))
