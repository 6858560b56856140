"""The text that perplexity is measured on.

Joined, drawn and tokenised as in the code of GPTQ and OmniQuant, whose tables the numbers stand in.
"""

import random
import re
from pathlib import Path

import torch
from torch import Tensor

from lowbit.calibration.sources import (
    HUB_SOURCES,
    Corpus,
    Document,
    evaluation_corpus,
    is_text_file,
)
from lowbit.calibration.tokens import Tokenizer, encode, encode_corpus

# Between the documents of a text file: a line of its own, or the special tokens themselves.
SEPARATOR = re.compile(r"^[ \t]*<\|endoftext\|>[ \t\r]*$|</s>(?:<s>)?", re.MULTILINE)
C4_WINDOWS = 256
C4_SEED = 0


def evaluation_text(name_or_path: str, tokenizer: Tokenizer, seqlen: int) -> Tensor:
    """The tokens to be cut into windows of seqlen: (tokens,) int64.

    wikitext2: the test rows, joined by blank lines; ptb: the test rows, joined by spaces; a file:
    as it is, rows joined by blank lines. Each is tokenised once and seqlen does not matter.
    c4: one random window of each of 256 random documents of the validation shard that have seqlen
    tokens: 256 * seqlen tokens. Raises ValueError for a source that cannot be had or holds nothing.
    """
    corpus = evaluation_corpus(name_or_path)
    if corpus.windows_in_rows:
        return _random_windows(corpus, tokenizer, seqlen)
    tokens = encode_corpus(tokenizer, corpus)
    if len(tokens) < 2:
        raise ValueError(f"{name_or_path} has {len(tokens)} tokens: there is nothing to predict")
    return tokens


def evaluation_documents(name_or_path: str, tokenizer: Tokenizer) -> list[Tensor]:
    """Every document by itself, from its BOS where the tokenizer adds one: (tokens,) int64 each.

    A text file is cut at lines that are "<|endoftext|>" and at "</s><s>"; otherwise a row is a
    document. c4 gives its first 256. Documents of less than 2 tokens are dropped: nothing in them
    is predicted. Raises ValueError for wikitext2 and ptb, whose rows are parts of documents, for a
    source that cannot be had, and when no document is left.
    """
    source = HUB_SOURCES.get(name_or_path)
    if source is not None and source.evaluation and not source.windows_in_rows:
        raise ValueError(
            f"the rows of {name_or_path} are lines, not documents: measure it as one text, or name"
            " c4 or a file of documents"
        )
    corpus = evaluation_corpus(name_or_path)
    documents = corpus.documents if source is None else corpus.documents[:C4_WINDOWS]
    if source is None and is_text_file(Path(name_or_path)):
        documents = _split(str(documents[0]))
    rows = [encode(tokenizer, document, name_or_path) for document in documents]
    rows = [row for row in rows if len(row) >= 2]
    if not rows:
        raise ValueError(f"{name_or_path} has no document of 2 tokens or more")
    return rows


def _split(text: str) -> list[Document]:
    """The documents between separators, without the blank space around them."""
    return [document.strip() for document in SEPARATOR.split(text)]


def _random_windows(corpus: Corpus, tokenizer: Tokenizer, seqlen: int) -> Tensor:
    """256 windows from random documents, one after the other: (256 * seqlen,) int64.

    The same random numbers as in the reference, in the same order, hence the same windows: its
    range leaves out the last possible start, which the calibration windows do not.
    """
    rng = random.Random(C4_SEED)
    too_short: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < C4_WINDOWS:
        i = rng.randint(0, len(corpus.documents) - 1)
        row = encode(tokenizer, corpus.documents[i], corpus.name)
        if len(row) < seqlen:
            too_short.add(i)
            if len(too_short) == len(corpus.documents):
                raise ValueError(f"{corpus.name} has no document of {seqlen:,} tokens or more")
            continue
        start = rng.randint(0, max(0, len(row) - seqlen - 1))
        windows.append(row[start : start + seqlen])
    return torch.cat(windows)
