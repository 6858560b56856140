"""Packs training text into windows of equal length that do not overlap."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.calibration.sources import Corpus, calibration_corpus
from lowbit.calibration.tokens import Tokenizer, encode, encode_corpus
from lowbit.calibration.windows import split_windows


def packed_windows(
    sources: Sequence[str],
    count: int,
    seqlen: int,
    tokenizer: Tokenizer,
    seed: int,
    count_is: str = "steps",
) -> Tensor:
    """Cuts sources into windows that do not overlap, and draws some of them.

    Documents of a data set of whole documents (c4) are joined in random order, with an EOS after
    each. Other sources are one text.

    sources: data sets or files, as for calibration.
    count: number of windows.
    seqlen: tokens in a window.
    tokenizer: tokenizes the text.
    seed: seed of the order of documents, and of the choice and order of windows.
    count_is: which option the number of windows comes from, for the message.

    Returns (count, seqlen) int64.
    Raises ValueError for sources that cannot be loaded or are too short.
    """
    rng = random.Random(seed)
    windows: list[Tensor] = []
    for name, wanted in split_windows(sources, count):
        if wanted:
            row = _row(calibration_corpus(name), wanted * seqlen, tokenizer, rng)
            if len(row) < wanted * seqlen:
                raise ValueError(
                    f"{name} has {len(row):,} tokens: {wanted:,} different windows of {seqlen:,} "
                    f"need {wanted * seqlen:,}; use fewer {count_is} or more text"
                )
            cut = row[: len(row) // seqlen * seqlen].view(-1, seqlen)
            windows += [cut[i] for i in rng.sample(range(len(cut)), wanted)]
    rng.shuffle(windows)
    return torch.stack(windows)


def _row(corpus: Corpus, least: int, tokenizer: Tokenizer, rng: random.Random) -> Tensor:
    """Returns a source as (tokens,) int64; of whole documents as many as give `least` tokens."""
    if not corpus.windows_in_rows:
        return encode_corpus(tokenizer, corpus)
    end = getattr(tokenizer, "eos_token_id", None)
    order = list(range(len(corpus.documents)))
    rng.shuffle(order)
    rows, tokens = [torch.empty(0, dtype=torch.int64)], 0
    for i in order:
        row = encode(tokenizer, corpus.documents[i], corpus.name)
        if end is not None and (not len(row) or int(row[-1]) != end):
            row = torch.cat([row, torch.tensor([end])])
        rows.append(row)
        tokens += len(row)
        if tokens >= least:
            break
    return torch.cat(rows)
