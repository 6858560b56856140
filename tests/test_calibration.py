"""Calibration and evaluation text, without a network: the tests write their own rows."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowbit.calibration import (
    Calibration,
    TokenWindows,
    evaluation_documents,
    evaluation_text,
    token_windows,
)
from lowbit.calibration.tokens import tokenizer_digest
from lowbit.calibration.windows import split_windows

WIKITEXT, PTB, C4 = "Salesforce/wikitext", "ptb-text-only/ptb_text_only", "allenai/c4"
PILE = "mit-han-lab/pile-val-backup"
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
C4_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
BOS = 1
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}:{{ message['content'] }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
    [{"role": "user", "content": "and again"}],
]


def make_tokenizer(
    bos: bool = True, template: str | None = None, alphabet: str = ""
) -> PreTrainedTokenizerFast:
    """One token per character: ids show where a window begins."""
    characters = alphabet or "".join(map(chr, [10, 13, *range(32, 127)]))
    vocabulary = {"<unk>": 0, "<s>": BOS} | {c: i for i, c in enumerate(characters, start=2)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", model_max_length=16
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a file, bytes or text or rows, and returns its path."""

    def write_file(name: str, content: bytes | str | list) -> str:
        path = tmp_path / name
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(content).to_parquet(path)
        elif isinstance(content, list):
            path.write_text("\n".join(map(json.dumps, content)) + "\n")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The hub: "rows" by data set id, and the "calls" that were made."""
    state: dict = {"rows": {}, "calls": []}

    def load_dataset(path: str, name: str | None = None, **options) -> datasets.Dataset:
        state["calls"].append((path, name, options))
        rows = state["rows"][path]
        if isinstance(rows, Exception):
            raise rows
        column = "sentence" if path == PTB else "text"
        return datasets.Dataset.from_dict({"id": range(len(rows)), column: rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    state["rows"] = {
        WIKITEXT: ["", " = Title = ", "some words of an article"] * 20,
        PTB: ["a sentence of a newspaper", "another one"] * 30,
        C4: [letter * length for letter in "abcdef" for length in (3, 31, 40)],
        PILE: ["a page of the pile"] * 1200,
    }
    return state


def draw(tokenizer: object, *sources: str, **options) -> TokenWindows:
    cache = options.pop("cache", None)
    context = options.pop("context", None)
    options = {"samples": 4, "seqlen": 8} | options
    return token_windows(Calibration(sources=sources, **options), tokenizer, context, cache)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def contains(whole: list[int], window: torch.Tensor) -> bool:
    part = window.tolist()
    return any(whole[i : i + len(part)] == part for i in range(len(whole)))


# ---- named data sets ---------------------------------------------------------------------------


CALIBRATION_CALLS = {
    "wikitext2": (
        WIKITEXT,
        "wikitext-2-raw-v1",
        {"data_files": None, "split": "train", "revision": WIKITEXT_REVISION},
    ),
    "ptb": (
        PTB,
        None,
        {
            "data_files": {"train": "penn_treebank/train/0000.parquet"},
            "split": "train",
            "revision": "refs/convert/parquet",
        },
    ),
    "c4": (
        C4,
        None,
        {
            "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
            "split": "train",
            "revision": C4_REVISION,
        },
    ),
    "pile": (
        PILE,
        None,
        {
            "data_files": {"validation": "val.jsonl.zst"},
            "split": "validation",
            "revision": "2f5e46ae6a69cf0dce4b12f78241c408936ca0e4",
        },
    ),
}


@pytest.mark.parametrize("name", CALIBRATION_CALLS)
def test_calibration_loads_exactly(
    name: str, hub: dict, tokenizer: PreTrainedTokenizerFast
) -> None:
    windows = draw(tokenizer, name)
    assert hub["calls"] == [CALIBRATION_CALLS[name]]
    assert windows.tokens.shape == (4, 8) and windows.tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        (
            "wikitext2",
            "wikitext-2-raw-v1",
            {"data_files": None, "split": "test", "revision": WIKITEXT_REVISION},
        ),
        (
            "ptb",
            None,
            {
                "data_files": {"test": "penn_treebank/test/0000.parquet"},
                "split": "test",
                "revision": "refs/convert/parquet",
            },
        ),
        (
            "c4",
            None,
            {
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                "split": "validation",
                "revision": C4_REVISION,
            },
        ),
    ],
)
def test_evaluation_loads_exactly(
    name: str, config: str | None, options: dict, hub: dict, tokenizer: PreTrainedTokenizerFast
) -> None:
    evaluation_text(name, tokenizer, 8)
    assert hub["calls"] == [(CALIBRATION_CALLS[name][0], config, options)]


@pytest.mark.parametrize(
    ("name", "rows"), [("wikitext2", slice(None)), ("ptb", slice(None)), ("pile", slice(1000))]
)
def test_joined_sources(
    name: str, rows: slice, hub: dict, tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = hub["rows"][CALIBRATION_CALLS[name][0]][rows]
    whole = ids(tokenizer, "\n\n".join(documents))
    windows = draw(tokenizer, name)
    assert all(contains(whole, window) for window in windows.tokens)
    source = {"name": name, "windows": 4, "tokens": len(whole), "documents": len(documents)}
    assert windows.sources == [source]


def test_c4_windows_lie_inside_a_document(hub: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    windows = draw(tokenizer, "c4", samples=12, seqlen=32)
    long_enough = [ids(tokenizer, row) for row in hub["rows"][C4] if len(row) >= 31]
    found = [
        next(i for i, row in enumerate(long_enough) if contains(row, w)) for w in windows.tokens
    ]
    # "a" * 31 and its BOS are exactly seqlen tokens: good for one window, which is all of it.
    assert (
        sum(window[0] == BOS and len(set(window.tolist())) == 2 for window in windows.tokens) >= 6
    )
    assert len(found) == 12
    assert windows.sources[0]["documents"] == 12
    with pytest.raises(ValueError, match="c4 has 12 documents of 32 tokens or more: 13 samples"):
        draw(tokenizer, "c4", samples=13, seqlen=32)


def test_c4_tokenises_only_what_it_draws(hub: dict) -> None:
    tokenizer = make_tokenizer()
    hub["rows"][C4] = ["abcdefghij" * 5] * 5000
    calls = []

    class Counting:
        special_tokens_map = tokenizer.special_tokens_map
        backend_tokenizer = tokenizer.backend_tokenizer

        def __call__(self, text: str, **options) -> dict:
            calls.append(text)
            return tokenizer(text, **options)

    draw(Counting(), "c4", samples=5)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("samples", "windows"), [(128, [43, 43, 42]), (3, [1, 1, 1]), (2, [1, 1, 0]), (1, [1, 0, 0])]
)
def test_mix_gives_exactly_what_is_asked(
    samples: int, windows: list[int], hub: dict, tokenizer: PreTrainedTokenizerFast
) -> None:
    hub["rows"] |= {name: hub["rows"][name] * 10 for name in (WIKITEXT, PTB, C4)}
    drawn = draw(tokenizer, "mix", samples=samples)
    assert drawn.tokens.shape == (samples, 8)
    assert [(s["name"], s["windows"]) for s in drawn.sources] == list(
        zip(("wikitext2", "ptb", "c4"), windows, strict=True)
    )
    # A source without a window is not downloaded.
    assert len(hub["calls"]) == sum(map(bool, windows))


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ConnectionError("Couldn't reach it\nsecond line"), "ConnectionError: Couldn't reach it;"),
        (datasets.exceptions.DatasetNotFoundError("no such set"), "no such set"),
        (datasets.exceptions.NonMatchingSplitsSizesError("sizes"), "sizes"),
        (ValueError("BuilderConfig not found"), "BuilderConfig not found"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer"),
        (ImportError("Please pip install zstandard"), "Please pip install zstandard"),
    ],
)
def test_a_data_set_that_cannot_be_had(
    failure: Exception, reason: str, hub: dict, tokenizer: PreTrainedTokenizerFast
) -> None:
    hub["rows"][WIKITEXT] = failure
    with pytest.raises(ValueError) as caught:
        draw(tokenizer, "wikitext2")
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert message.startswith("the data set wikitext2 (Salesforce/wikitext) cannot be had: ")
    assert message.endswith("use a local file: --calibration FILE")
    with pytest.raises(ValueError, match="name a local file in its place"):
        evaluation_text("wikitext2", tokenizer, 8)


def test_a_data_set_that_does_not_parse(hub: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    failure = datasets.exceptions.DatasetGenerationError("An error occurred")
    failure.__cause__ = ImportError("Please pip install zstandard")
    hub["rows"][PILE] = failure
    with pytest.raises(ValueError, match="had: ImportError: Please pip install zstandard;"):
        draw(tokenizer, "pile")


# ---- local files -------------------------------------------------------------------------------


ROWS = [{"text": "first document"}, {"text": ""}, {"text": "the \u2028 second one"}]
JOINED = "first document\n\n\n\nthe \u2028 second one"


@pytest.mark.parametrize(
    ("name", "content", "whole"),
    [
        ("a.txt", "as it is\r\n\n<|endoftext|>\n kept", "as it is\r\n\n<|endoftext|>\n kept"),
        ("a.utf8", "some text of a file", "some text of a file"),
        ("a.raw", "some text of a file", "some text of a file"),
        ("a", "some text of a file", "some text of a file"),
        ("a.jsonl", ROWS, JOINED),
        ("a.JSONL", json.dumps(ROWS[0]) + "\r\n\n" + json.dumps(ROWS[2]), None),
        ("a.json", json.dumps(ROWS, ensure_ascii=False, indent=1), JOINED),
        ("a.parquet", ROWS, JOINED),
        ("unescaped.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS), JOINED),
    ],
)
def test_files_are_tokenised_once(
    name: str, content: str | list, whole: str | None, write: Callable[..., str], tokenizer: object
) -> None:
    path = write(name, content)
    whole = whole or "first document\n\nthe \u2028 second one"
    assert evaluation_text(path, tokenizer, 8).tolist() == ids(tokenizer, whole)
    windows = draw(tokenizer, path, samples=2)
    assert all(contains(ids(tokenizer, whole), window) for window in windows.tokens)


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
def test_chats(name: str, write: Callable[..., str]) -> None:
    path = write(name, [{"messages": chat, "source": "test"} for chat in CHATS])
    tokenizer = make_tokenizer(template=TEMPLATE)
    rendered = ["<s>user:hello<s>assistant:good day", "<s>user:and again"]
    # The template writes its own BOS: the tokenizer adds no second one.
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    assert [row.count(BOS) for row in expected] == [2, 1]
    documents = evaluation_documents(path, tokenizer)
    assert [document.tolist() for document in documents] == expected
    whole = expected[0] + expected[1]
    assert evaluation_text(path, tokenizer, 8).tolist() == whole
    windows = draw(tokenizer, path)
    assert all(contains(whole, window) for window in windows.tokens)
    assert windows.sources[0]["tokens"] == len(whole) and windows.sources[0]["documents"] == 2
    with pytest.raises(ValueError, match=f"{name} holds chats .* no chat template"):
        draw(make_tokenizer(), path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n\n{"text"}\n', r"a.jsonl, line 3 is not JSON: "),
        ("a.jsonl", [{"text": "fine"}, {"messages": CHATS[0]}], "row 2 has no text, but messages"),
        (
            "a.jsonl",
            [{"prompt": "x", "answer": "y"}],
            "row 1 has no text or messages, but prompt, a",
        ),
        ("a.jsonl", [{"text": None}], "row 1: text is a NoneType, no string"),
        ("a.jsonl", [["text"]], "row 1 is a str, not an object"),
        ("a.jsonl", [{"messages": ["hello"]}], "row 1: messages must be a list, each with a role"),
        ("a.jsonl", [{"messages": []}], "row 1: messages must be a list, each with a role"),
        ("a.parquet", [{"prompt": "x"}], "row 1 has no text or messages, but prompt"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_read(
    name: str,
    content: bytes | str | list,
    message: str,
    write: Callable[..., str],
    tokenizer: object,
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tokenizer, write(name, content))


def test_a_parquet_file_that_is_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.parquet").write_bytes(b"text")
    with pytest.raises(ValueError, match="a.parquet is not a parquet file: ArrowInvalid"):
        draw(tokenizer, str(tmp_path / "a.parquet"))


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
            "'wikitxt2' is no .*no such file.*did you mean 'wikitext2'.* c4, mix, pile, ptb",
        ),
        ("c4=x", "'x' no weight for 'c4': a weight is a positive number"),
        ("c4=0", "'0' no weight"),
        ("c4=-1", "'-1' no weight"),
        ("c4=", "'' no weight"),
        ("missing.txt=2", "'missing.txt' is no calibration data set"),
        ("/", "'/' is no calibration data set, and it is a folder"),
    ],
)
def test_sources_that_are_none(source: str, message: str, tokenizer: object) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tokenizer, source)


# ---- windows -----------------------------------------------------------------------------------


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
        ({"seqlen": 17, "context": 16}, "seqlen is 17 tokens.* 16 at most, the model's context"),
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


def test_bos_stands_at_the_start_only(write: Callable[..., str]) -> None:
    path = write("a.jsonl", [{"text": "abcd"}, {"text": "efgh"}])
    for bos, expected in ((True, [0]), (False, [])):
        tokens = evaluation_text(path, make_tokenizer(bos=bos), 8)
        assert (tokens == BOS).nonzero().flatten().tolist() == expected


def test_no_warning_of_a_long_text(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "disabled", False)
    for name in ("transformers", *logger.manager.loggerDict):  # the command line makes it quiet
        if name.startswith("transformers"):
            monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.manager._clear_cache()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        draw(make_tokenizer(), write("a.txt", "x" * 100))
        ids = make_tokenizer()("x" * 100)["input_ids"]
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    # The second call is this test's own, and shows that the warning would have been heard.
    assert len(ids) == 101 and len(messages) == 1 and "longer than" in messages[0]


# ---- digest and cache --------------------------------------------------------------------------


TEXT = "the quick brown fox jumps over the lazy dog. " * 10


@pytest.mark.parametrize(
    ("what", "options", "text", "tokenizer_options"),
    [
        ("seed", {"seed": 1}, TEXT, {}),
        ("seqlen", {"seqlen": 9}, TEXT, {}),
        ("samples", {"samples": 5}, TEXT, {}),
        ("text", {}, TEXT + ".", {}),
        ("bos", {}, TEXT, {"bos": False}),
        ("template", {}, TEXT, {"template": TEMPLATE}),
        ("vocabulary", {}, TEXT, {"alphabet": "zyxwvutsrqponmlkjihgfedcba. "}),
    ],
)
def test_whatever_shapes_the_windows_changes_the_digest(
    what: str, options: dict, text: str, tokenizer_options: dict, write: Callable[..., str]
) -> None:
    first = draw(make_tokenizer(), write("a.txt", TEXT))
    second = draw(make_tokenizer(**tokenizer_options), write("a.txt", text), **options)
    assert first.digest != second.digest, what
    assert len(first.digest) == 64


def test_weights_and_the_cut_into_documents_change_the_digest(write: Callable[..., str]) -> None:
    tokenizer = make_tokenizer()
    a, b = write("a.txt", TEXT), write("b.txt", TEXT.upper())
    digests = {
        draw(tokenizer, *sources).digest for sources in [(a, b), (f"{a}=3", b), (b, a), (a,)]
    }
    assert len(digests) == 4
    rows = [[{"text": TEXT}], [{"text": TEXT[:50]}, {"text": TEXT[50:]}]]
    digests = {draw(tokenizer, write("c.jsonl", content)).digest for content in rows}
    assert len(digests) == 2


def test_the_digest_is_of_content_not_of_names(write: Callable[..., str]) -> None:
    tokenizer = make_tokenizer()
    first = draw(tokenizer, write("a.txt", TEXT))
    tokenizer("truncated before", truncation=True, max_length=3)
    assert draw(tokenizer, write("b.txt", TEXT)).digest == first.digest


def test_a_tokenizer_without_a_backend() -> None:
    class Slow:
        special_tokens_map = {"bos_token": "<s>"}
        add_bos_token = True

        def __init__(self, vocabulary: dict[str, int]) -> None:
            self.get_vocab = vocabulary.copy

    first, same = Slow({"a": 0, "b": 1}), Slow({"b": 1, "a": 0})
    assert tokenizer_digest(first) == tokenizer_digest(same)
    same.add_bos_token = False
    assert tokenizer_digest(first) != tokenizer_digest(same)
    assert tokenizer_digest(first) != tokenizer_digest(Slow({"a": 0, "b": 2}))


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


# ---- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dataset", "glue"), [("wikitext2", WIKITEXT, "\n\n"), ("ptb", PTB, " ")]
)
def test_joined_evaluation_text(
    name: str, dataset: str, glue: str, hub: dict, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = evaluation_text(name, tokenizer, 8)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == ids(tokenizer, glue.join(hub["rows"][dataset]))


def test_c4_evaluation_text_is_that_of_the_papers(
    hub: dict, tokenizer: PreTrainedTokenizerFast
) -> None:
    hub["rows"][C4] = ["abcdefghijklmnopqrstuvwxyz"[i:] * (i % 3) for i in range(26)]
    tokens = evaluation_text("c4", tokenizer, 12)
    rng = random.Random(0)
    expected: list[int] = []
    while len(expected) < 256 * 12:
        row = ids(tokenizer, hub["rows"][C4][rng.randint(0, 25)])
        if len(row) >= 12:
            start = rng.randint(0, len(row) - 12 - 1) if len(row) > 12 else rng.randint(0, 0)
            expected += row[start : start + 12]
    assert tokens.tolist() == expected and len(tokens) == 256 * 12
    with pytest.raises(ValueError, match="c4 has no document of 60 tokens or more"):
        evaluation_text("c4", tokenizer, 60)


def test_c4_evaluation_takes_documents_of_exactly_seqlen_tokens(
    hub: dict, tokenizer: PreTrainedTokenizerFast
) -> None:
    hub["rows"][C4] = ["abcdefg"]
    assert evaluation_text("c4", tokenizer, 8).tolist() == ids(tokenizer, "abcdefg") * 256


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        (
            "a.txt",
            "one\n\n two \n <|endoftext|>\r\n\nthree\n<|endoftext|>\n",
            ["one\n\n two", "three"],
        ),
        ("b.txt", "one <|endoftext|> two\n", ["one <|endoftext|> two"]),
        ("c.jsonl", [{"text": "one\n<|endoftext|>\ntwo"}, {"text": ""}, {"text": "3"}], None),
        ("d.parquet", [{"text": "one"}, {"text": ""}, {"text": "three"}], ["one", "three"]),
    ],
)
def test_evaluation_documents(
    name: str,
    content: str | list,
    documents: list[str] | None,
    write: Callable[..., str],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    documents = documents or ["one\n<|endoftext|>\ntwo", "3"]
    found = evaluation_documents(write(name, content), tokenizer)
    # An empty row is its BOS alone: nothing in it is predicted.
    assert [row.tolist() for row in found] == [ids(tokenizer, text) for text in documents]
    assert all(row[0] == BOS and row.dtype == torch.int64 for row in found)


def test_evaluation_documents_of_named_sets(hub: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    hub["rows"][C4] = [f"document {i}" for i in range(300)]
    found = evaluation_documents("c4", tokenizer)
    assert len(found) == 256 and found[-1].tolist() == ids(tokenizer, "document 255")
    with pytest.raises(ValueError, match="the rows of wikitext2 are lines, not documents"):
        evaluation_documents("wikitext2", tokenizer)


@pytest.mark.parametrize("name", ["pile", "mix", "wikitex2"])
def test_evaluation_of_what_is_not_held_out(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    message = "held-out split.*allowed are c4, ptb, wikitext2"
    with pytest.raises(ValueError, match=message):
        evaluation_text(name, tokenizer, 8)
    with pytest.raises(ValueError, match=message):
        evaluation_documents(name, tokenizer)


def test_nothing_to_evaluate(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("empty.txt", "")
    with pytest.raises(ValueError, match="has 1 tokens: there is nothing to predict"):
        evaluation_text(path, tokenizer, 8)
    with pytest.raises(ValueError, match="no document of 2 tokens or more"):
        evaluation_documents(path, tokenizer)
