"""Text for training: packed into windows of equal length, none of which has a token of another."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.calibration.sources import Corpus, calibration_corpus
from lowbit.calibration.tokens import Tokenizer, encode, encode_corpus
from lowbit.calibration.windows import split_windows


def packed_windows(
    sources: Sequence[str], count: int, seqlen: int, tokenizer: Tokenizer, seed: int
) -> Tensor:
    """`count` windows in random order: (count, seqlen) int64.

    Of a data set of whole documents (c4), these stand in random order, an EOS behind each; other
    texts are one row. Raises ValueError for sources that cannot be had or hold too little.
    """
    rng = random.Random(seed)
    windows: list[Tensor] = []
    for name, wanted in split_windows(sources, count):
        if wanted:
            row = _row(calibration_corpus(name), wanted * seqlen, tokenizer, rng)
            if len(row) < wanted * seqlen:
                raise ValueError(
                    f"{name} has {len(row):,} tokens: {wanted:,} windows of {seqlen:,}, none of "
                    f"them twice, need {wanted * seqlen:,}; use fewer steps or more text"
                )
            cut = row[: len(row) // seqlen * seqlen].view(-1, seqlen)
            windows += [cut[i] for i in rng.sample(range(len(cut)), wanted)]
    rng.shuffle(windows)
    return torch.stack(windows)


def _row(corpus: Corpus, least: int, tokenizer: Tokenizer, rng: random.Random) -> Tensor:
    """(tokens,) int64; of whole documents no more than it takes for `least` tokens."""
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
