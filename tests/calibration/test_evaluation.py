"""The text that perplexity is measured on."""

import random
from collections.abc import Callable

import pytest
import torch
from texts import BOS, C4, PTB, WIKITEXT, ids
from transformers import PreTrainedTokenizerFast

from lowbit.calibration import (
    evaluation_documents,
    evaluation_text,
)


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
