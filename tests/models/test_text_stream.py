"""Text while it is generated: whole characters, no lost spaces, stop strings."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.models.text_stream import TextStream


class Bytes:
    """A tokenizer of bytes; a character may have several of them."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")


class Words:
    """A tokenizer that drops the space before the first word, as SentencePiece does."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(f"w{i}" for i in ids)


def text_of(stream: TextStream, tokens: Any) -> str:
    return "".join([stream.add(token) for token in tokens]) + stream.rest()


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_pieces_are_the_text(prompt: str, text: str) -> None:
    prompt, text = prompt.replace("\ufffd", ""), text.replace("\ufffd", "")
    assert text_of(TextStream(Bytes(), prompt.encode()), text.encode()) == text


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_it_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(Bytes(), b"", stops)
    found = text_of(stream, text.encode())
    # The first moment at which any of them is complete decides, as for a reader of the stream.
    ends = [n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)]
    if not ends:
        assert found == text and not stream.stopped
    else:
        seen = text[: ends[0]]
        assert found == seen[: min(seen.index(stop) for stop in stops if stop in seen)]
        assert stream.stopped


def test_spaces_between_words_stay() -> None:
    assert text_of(TextStream(Words(), [1, 2]), [3, 4, 5]) == " w3 w4 w5"


def test_a_character_is_shown_when_it_is_whole() -> None:
    stream = TextStream(Bytes(), b"")
    shown = [stream.add(byte) for byte in "é€".encode()]
    assert shown == ["", "é", "", "", "€"]
    cut = TextStream(Bytes(), b"")
    assert [cut.add("€".encode()[0]), cut.rest()] == ["", "\ufffd"]


@pytest.mark.parametrize("length", [10, 2000])
def test_few_tokens_are_decoded_at_a_time(length: int) -> None:
    """Otherwise a long text would take time quadratic in its length."""
    sizes: list[int] = []

    class Counting(Bytes):
        def decode(self, ids: list[int], **options: Any) -> str:
            sizes.append(len(ids))
            return super().decode(ids)

    text_of(TextStream(Counting(), b"prompt"), b"x" * length)
    assert max(sizes[2:]) <= len("prompt") + 1
