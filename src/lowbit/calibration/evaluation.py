"""Prepares the text that perplexity is measured on.

Rows are joined, drawn and tokenized as in the code of GPTQ and OmniQuant, so that perplexities can
be compared with the tables of those papers.
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
from lowbit.calibration.tokens import Tokenizer, encode, encode_corpus, note_unknown

# What separates the documents of a text file: a line "<|endoftext|>", or "</s>" or "</s><s>".
SEPARATOR = re.compile(r"^[ \t]*<\|endoftext\|>[ \t\r]*$|</s>(?:<s>)?", re.MULTILINE)
C4_WINDOWS = 256
C4_SEED = 0


def evaluation_text(name_or_path: str, tokenizer: Tokenizer, seqlen: int) -> Tensor:
    """Returns the tokens of a text, to be cut into windows: (tokens,) int64.

    name_or_path:
        wikitext2: the test rows, joined by blank lines.
        ptb: the test rows, joined by spaces.
        c4: one random window of each of 256 random documents of the validation shard that have at
            least seqlen tokens, hence 256 * seqlen tokens.
        a file: its text, or its rows joined by blank lines.
    tokenizer: called once for the whole text; for c4, once for each document.
    seqlen: tokens in a window, which matters for c4 only.

    Raises ValueError for a source that cannot be loaded, or that has fewer than 2 tokens.
    """
    corpus = evaluation_corpus(name_or_path)
    if corpus.windows_in_rows:
        tokens = _random_windows(corpus, tokenizer, seqlen)
    else:
        tokens = encode_corpus(tokenizer, corpus)
    if len(tokens) < 2:
        raise ValueError(f"{name_or_path} has {len(tokens)} tokens: there is nothing to predict")
    note_unknown(tokenizer, tokens, [name_or_path])
    return tokens


def evaluation_documents(name_or_path: str, tokenizer: Tokenizer) -> list[Tensor]:
    """Returns the tokens of each document: (tokens,) int64 each, with a BOS if one is added.

    Documents with fewer than 2 tokens are left out, since nothing in them is predicted.

    name_or_path: c4, of which the first 256 documents are taken, or a file. A text file is cut at
        lines "<|endoftext|>" and at "</s><s>"; in other files, each row is a document.
    tokenizer: called once for each document.

    Raises ValueError for wikitext2 and ptb, whose rows are lines and not documents, for a source
    that cannot be loaded, and if no document is left.
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
    note_unknown(tokenizer, torch.cat(rows), [name_or_path])
    return rows


def _split(text: str) -> list[Document]:
    """Splits a text at its separators, and strips the documents."""
    return [document.strip() for document in SEPARATOR.split(text)]


def _random_windows(corpus: Corpus, tokenizer: Tokenizer, seqlen: int) -> Tensor:
    """Draws 256 windows from random documents: (256 * seqlen,) int64, one after the other.

    It draws the same random numbers in the same order as GPTQ's code, and so gets the same windows.
    That is why the last possible start of a window is never drawn, unlike for calibration.
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
