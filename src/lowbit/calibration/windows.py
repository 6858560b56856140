"""Draw windows of tokens from the calibration sources, and keep them on disk."""

import math
import os
import random
import re
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import torch
from pydantic import Field
from torch import Tensor

from lowbit.calibration.sources import HUB_SOURCES, Corpus, calibration_corpus, check_name
from lowbit.calibration.tokens import (
    Tokenizer,
    documents_digest,
    encode,
    encode_corpus,
    json_digest,
    tokenizer_digest,
)
from lowbit.config import Config

MIX = ("wikitext2", "ptb", "c4")
LONGEST_DEFAULT = 2048  # tokens; what the papers calibrate with
DRAWING = 1  # raised when the same settings draw other windows: older caches then no longer match


class Calibration(Config):
    """The text that a method learns from: what it is drawn from, and how much."""

    sources: tuple[str, ...] = Field(
        ("wikitext2",),
        min_length=1,
        description="Names of data sets (wikitext2, c4, ptb, pile, or mix for three of them) or "
        'text files; each may have a weight: "a.txt=2".',
    )
    samples: int = Field(128, ge=1, description="Windows of text in all.")
    seqlen: int | None = Field(
        None,
        ge=2,
        description="Tokens in a window; None: 2,048, or the model's context if that is shorter.",
    )
    seed: int = Field(
        0, ge=0, description="Seed of the choice of windows, and of all that a method draws."
    )


@dataclass(frozen=True)
class TokenWindows:
    """tokens: (samples, seqlen) int64, source after source.

    digest: sha256, in hex, of everything that shaped them. sources: name, windows, and the tokens
    and documents that these were drawn from, per source.
    """

    tokens: Tensor
    digest: str
    seqlen: int
    sources: list[dict[str, Any]]


@dataclass(frozen=True)
class _Drawn:
    """tokens: (windows, seqlen) int64. sizes: (sources, 2) int64, tokens and documents."""

    tokens: Tensor
    sizes: Tensor


def token_windows(
    calibration: Calibration, tokenizer: Tokenizer, context: int | None, cache: Path | None = None
) -> TokenWindows:
    """The calibration windows: random ones, which may overlap, the same for the same seed.

    context: the longest input that the model takes, if there is such a limit.
    cache: a folder that keeps the windows under their digest, to save tokenising them again; one
    that cannot be written is passed over.
    Raises ValueError for sources that cannot be had or hold too little, and for a bad seqlen.
    """
    seqlen = _window_length(calibration.seqlen, context)
    plan = split_windows(calibration.sources, calibration.samples)
    corpora = [(calibration_corpus(name), windows) for name, windows in plan if windows]
    texts = [
        [documents_digest(corpus.documents), corpus.separator, corpus.windows_in_rows, windows]
        for corpus, windows in corpora
    ]
    settings = [DRAWING, calibration.samples, seqlen, calibration.seed]
    digest = json_digest([settings, tokenizer_digest(tokenizer), texts])
    file = None if cache is None else cache / f"{digest}.npz"
    drawn = None if file is None else _load(file, (calibration.samples, seqlen), len(corpora))
    if drawn is None:
        drawn = _draw(corpora, seqlen, tokenizer, random.Random(calibration.seed))
        if file is not None:
            with suppress(OSError):  # a full or foreign disk: the run does without a cache
                _save(file, drawn)
    sizes = iter(drawn.sizes.tolist())
    sources = []
    for name, windows in plan:
        tokens, documents = next(sizes) if windows else (0, 0)
        source = {"name": name, "windows": windows, "tokens": tokens, "documents": documents}
        sources.append(source)
    return TokenWindows(drawn.tokens, digest, seqlen, sources)


def split_windows(sources: Sequence[str], samples: int) -> list[tuple[str, int]]:
    """How many windows each source gives: by weight, `samples` in all (largest remainder).

    `mix` becomes its three. Raises ValueError for an unknown source and for a bad weight.
    """
    weights: list[tuple[str, Fraction]] = []
    for spec in sources:
        name, weight = _parse(spec)
        parts = MIX if name == "mix" else (name,)
        weights += [(part, weight / len(parts)) for part in parts]
    whole = sum(weight for _, weight in weights)
    quotas = [samples * weight / whole for _, weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    return [(name, count) for (name, _), count in zip(weights, counts, strict=True)]


def _parse(spec: str) -> tuple[str, Fraction]:
    """A source "NAME_OR_FILE[=WEIGHT]"; a file that is called so as a whole has weight 1."""
    name, weight = spec, "1"
    if "=" in spec and not Path(spec).is_file():
        name, _, weight = spec.rpartition("=")
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or Fraction(weight) == 0:
        raise ValueError(
            f"{spec!r} is no file, and {weight!r} no weight for {name!r}: a weight is a positive"
            " number such as 2 or 0.5"
        )
    check_name(name, [*HUB_SOURCES, "mix"], "calibration data set")
    return name, Fraction(weight)


def _window_length(seqlen: int | None, context: int | None) -> int:
    if seqlen is None:
        seqlen = LONGEST_DEFAULT if context is None else min(LONGEST_DEFAULT, context)
    if seqlen < 2 or (context is not None and seqlen > context):
        most = "" if context is None else f", and {context:,} at most, the model's context"
        raise ValueError(f"seqlen is {seqlen:,} tokens: it must be at least 2{most}")
    return seqlen


def _draw(
    corpora: Sequence[tuple[Corpus, int]], seqlen: int, tokenizer: Tokenizer, rng: random.Random
) -> _Drawn:
    windows: list[Tensor] = []
    sizes = []
    for corpus, count in corpora:
        if corpus.windows_in_rows:
            rows = _long_rows(corpus, count, seqlen, tokenizer, rng)
            windows += [_random_window(row, seqlen, rng) for row in rows]
        else:
            rows = [encode_corpus(tokenizer, corpus)]
            _check_length(corpus.name, len(rows[0]), count, seqlen)
            windows += [_random_window(rows[0], seqlen, rng) for _ in range(count)]
        documents = len(rows if corpus.windows_in_rows else corpus.documents)
        sizes.append([sum(len(row) for row in rows), documents])
    return _Drawn(torch.stack(windows), torch.tensor(sizes))


def _random_window(row: Tensor, seqlen: int, rng: random.Random) -> Tensor:
    start = rng.randint(0, len(row) - seqlen)  # both ends are possible
    return row[start : start + seqlen]


def _long_rows(
    corpus: Corpus, count: int, seqlen: int, tokenizer: Tokenizer, rng: random.Random
) -> list[Tensor]:
    """`count` random documents of at least seqlen tokens, as tokens; no document twice.

    A shard of C4 has 356,317 documents: only those drawn are tokenised.
    """
    order = list(range(len(corpus.documents)))
    rng.shuffle(order)
    rows: list[Tensor] = []
    for i in order:
        row = encode(tokenizer, corpus.documents[i], corpus.name)
        if len(row) >= seqlen:
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ValueError(
        f"{corpus.name} has {len(rows):,} documents of {seqlen:,} tokens or more: {count:,} samples"
        " need as many; use fewer samples, a smaller seqlen or more text"
    )


def _check_length(name: str, tokens: int, count: int, seqlen: int) -> None:
    if tokens < count * seqlen:
        raise ValueError(
            f"{name} has {tokens:,} tokens: {count:,} samples of {seqlen:,} tokens need at least"
            f" {count * seqlen:,}; use fewer samples, a smaller seqlen or more text"
        )


def _load(file: Path, shape: tuple[int, int], sources: int) -> _Drawn | None:
    """Cached windows; None when there are none, or not in one piece (npz carries checksums)."""
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as members:
            arrays = [_load_array(members, name) for name in ("tokens.npy", "sizes.npy")]
    # What reading a damaged zip file or array header raises; RuntimeError: its encryption flag.
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    wanted = [shape, (sources, 2)]
    if [a.shape for a in arrays] != wanted or any(a.dtype != numpy.int64 for a in arrays):
        return None
    return _Drawn(*(torch.from_numpy(array) for array in arrays))


def _load_array(members: zipfile.ZipFile, name: str) -> numpy.ndarray:
    with members.open(name) as stream:
        return numpy.lib.format.read_array(stream, allow_pickle=False)


def _save(file: Path, drawn: _Drawn) -> None:
    """Written aside and renamed, so that a run which dies leaves nothing half-written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            numpy.savez(stream, tokens=drawn.tokens.numpy(), sizes=drawn.sizes.numpy())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
