"""Number, length and choice of calibration windows, and their cache."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import TEXT, draw, ids, make_tokenizer
from transformers import PreTrainedTokenizerFast

from lowbit.calibration.windows import Calibration, split_windows


@pytest.mark.parametrize(
    ("sources", "samples", "counts"),
    [
        (["a.txt", "b.txt"], 7, [4, 3]),
        (["a.txt=2", "b.txt"], 7, [5, 2]),
        (["a.txt=0.1", "b.txt=0.2"], 3, [1, 2]),
        (["a.txt=1", "b.txt=1", "c=3.txt=1"], 128, [43, 43, 42]),
        (["c=3.txt", "a.txt=3"], 8, [2, 6]),
        (["a.txt=100", "b.txt=1"], 4, [4, 0]),
        (["mix", "a.txt"], 7, [1, 1, 1, 4]),
        (["mix=3", "c4"], 8, [2, 2, 2, 2]),
    ],
)
def test_windows_are_split_by_weight(
    sources: list[str],
    samples: int,
    counts: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c=3.txt"):
        Path(name).write_text("text")
    assert [windows for _, windows in split_windows(sources, samples)] == counts


@given(st.integers(1, 300), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_no_window_is_lost(samples: int, weights: list[int]) -> None:
    counts = [n for _, n in split_windows([f"c4={weight}" for weight in weights], samples)]
    assert sum(counts) == samples
    exact = [samples * weight / sum(weights) for weight in weights]
    assert all(abs(n - quota) < 1 for n, quota in zip(counts, exact, strict=True))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "wikitxt2",
            "'wikitxt2' is not a .*no such file.*did you mean 'wikitext2'.* c4, mix, pile, ptb",
        ),
        ("c4=x", "'x' is not a weight for 'c4': a weight is a positive number"),
        ("c4=0", "'0' is not a weight"),
        ("c4=-1", "'-1' is not a weight"),
        ("c4=", "'' is not a weight"),
        ("missing.txt=2", "'missing.txt' is not a calibration data set"),
        ("/", "'/' is not a calibration data set, and it is a folder"),
    ],
)
def test_sources_that_do_not_exist(source: str, message: str, tokenizer: object) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tokenizer, source)


def test_too_short_a_text(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("story.txt", "x" * 1233)
    with pytest.raises(ValueError) as caught:
        draw(tokenizer, path, samples=16, seqlen=256)
    assert str(caught.value).removeprefix(path) == (
        " has 1,234 tokens: 16 samples of 256 tokens need at least 4,096; use fewer samples, a"
        " smaller seqlen or more text"
    )
    assert draw(tokenizer, path, samples=2, seqlen=617).tokens.shape == (2, 617)
    with pytest.raises(ValueError, match="2 samples of 618 tokens need at least 1,236"):
        draw(tokenizer, path, samples=2, seqlen=618)


def test_every_start_is_possible_and_the_last_one_too(write: Callable[..., str]) -> None:
    tokenizer = make_tokenizer(bos=False)
    path = write("a.txt", "0123456789")
    starts = {
        int(draw(tokenizer, path, samples=1, seqlen=8, seed=seed).tokens[0, 0])
        for seed in range(40)
    }
    assert starts == set(ids(tokenizer, "012"))
    whole = draw(tokenizer, path, samples=1, seqlen=10)
    assert whole.tokens[0].tolist() == ids(tokenizer, "0123456789")


@pytest.mark.parametrize(
    ("seqlen", "context", "expected"),
    [(None, None, 2048), (None, 4096, 2048), (None, 512, 512), (16, 16, 16), (2, None, 2)],
)
def test_window_length(
    seqlen: int | None, context: int | None, expected: int, write: Callable[..., str]
) -> None:
    path = write("a.txt", "x" * 2100)
    windows = draw(make_tokenizer(), path, samples=1, seqlen=seqlen, context=context)
    assert windows.seqlen == expected and windows.tokens.shape == (1, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 1}, "greater than or equal to 2"),
        ({"seqlen": 17, "context": 16}, "seqlen is 17 tokens.* at most 16, the model's context"),
        ({"seqlen": None, "context": 1}, "seqlen is 1 tokens: it must be at least 2"),
        ({"samples": 0}, "greater than or equal to 1"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"sample": 3}, "did you mean 'samples'"),
    ],
)
def test_settings_that_cannot_be(
    options: dict, message: str, write: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tokenizer, write("a.txt", "x" * 100), **options)


def test_the_seed_decides(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.txt", "the quick brown fox jumps over the lazy dog " * 20)
    random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state()
    first, again, other = (draw(tokenizer, path, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens) and first.digest == again.digest
    assert not torch.equal(first.tokens, other.tokens)
    assert states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state())


class Refusing:
    """A tokenizer that can be hashed but not used."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend_tokenizer = tokenizer.backend_tokenizer
        self.special_tokens_map = tokenizer.special_tokens_map


def test_a_cache_hit_equals_a_miss(write: Callable[..., str], tmp_path: Path, hub: dict) -> None:
    tokenizer = make_tokenizer()
    cache = tmp_path / "deep" / "cache"
    sources = (write("a.txt", TEXT) + "=2", "c4", "ptb")
    plain = draw(tokenizer, *sources)
    miss = draw(tokenizer, *sources, cache=cache)
    hit = draw(Refusing(tokenizer), *sources, cache=cache)
    assert [file.name for file in cache.iterdir()] == [f"{plain.digest}.npz"]
    for windows in (miss, hit):
        assert torch.equal(windows.tokens, plain.tokens) and windows.tokens.dtype == torch.int64
        assert windows.digest == plain.digest and windows.sources == plain.sources
        assert windows.seqlen == plain.seqlen
    hit.tokens[0, 0] = 0  # writable, like freshly drawn ones


def test_a_cache_that_cannot_be_written_is_passed_over(
    write: Callable[..., str], tmp_path: Path
) -> None:
    tokenizer, path = make_tokenizer(), write("a.txt", TEXT)
    file = tmp_path / "file"
    file.touch()
    plain = draw(tokenizer, path)
    assert torch.equal(draw(tokenizer, path, cache=file / "inside").tokens, plain.tokens)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "shape", "dtype", "folderless npy"])
def test_a_damaged_cache_is_written_again(
    damage: str, write: Callable[..., str], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    path = write("a.txt", TEXT)
    plain = draw(tokenizer, path, cache=tmp_path)
    file = tmp_path / f"{plain.digest}.npz"
    good = file.read_bytes()
    sizes = numpy.zeros((1, 2), dtype=numpy.int64)
    tokens = plain.tokens.numpy()
    if damage == "shape":
        numpy.savez(file, tokens=tokens[:, 1:], sizes=sizes)
    elif damage == "dtype":
        numpy.savez(file, tokens=tokens.astype(numpy.int32), sizes=sizes)
    elif damage == "folderless npy":
        with file.open("wb") as stream:
            numpy.save(stream, tokens)
    else:
        file.write_bytes({"empty": b"", "cut": good[: len(good) // 2], "text": b"tokens"}[damage])
    again = draw(tokenizer, path, cache=tmp_path)
    assert torch.equal(again.tokens, plain.tokens) and again.sources == plain.sources
    assert torch.equal(draw(Refusing(tokenizer), path, cache=tmp_path).tokens, plain.tokens)


def test_a_flipped_bit_in_the_cache_is_never_believed(
    write: Callable[..., str], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    path = write("a.txt", TEXT)
    plain = draw(tokenizer, path, cache=tmp_path)
    file = tmp_path / f"{plain.digest}.npz"
    good = file.read_bytes()
    for position in range(0, len(good), 7):
        file.write_bytes(
            good[:position] + bytes([good[position] ^ (1 << position % 8)]) + good[position + 1 :]
        )
        again = draw(tokenizer, path, cache=tmp_path)
        assert torch.equal(again.tokens, plain.tokens) and again.sources == plain.sources


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_a_seed_that_torch_cannot_take_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        Calibration(seed=seed)


LONG = {"name": "a" * 5000, "weight": f"wikitext2={'x' * 5000}", "file": f"{'a' * 5000}.txt=2"}


@pytest.mark.parametrize("source", LONG.values(), ids=list(LONG))
def test_a_long_source_is_refused_with_a_short_message(source: str) -> None:
    with pytest.raises(ValueError, match=r"\.\.\.") as error:
        split_windows([source], 4)
    assert len(str(error.value)) < 500
