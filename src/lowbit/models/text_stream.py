"""Turns tokens into text while they are generated, and ends the text at a stop string."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoded from a character whose last bytes are missing


class TextStream:
    """Decodes the tokens that follow a prompt, one at a time.

    Each token is decoded together with the last ones before it, because many tokenizers drop the
    space before the first decoded word. Text that may be the beginning of a stop string is held
    back.

    tokenizer: of transformers.
    prompt: token ids.
    stop: the text ends before the first of these strings.

    stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._ids = list(prompt)
        self._start = 0  # of the tokens that are decoded
        self._shown = self._decoded()  # of these, the text that was taken already
        self._read = len(self._ids)  # tokens whose text was taken
        self._held = ""

    def add(self, token: int) -> str:
        """Returns the text that a token makes certain; often the text of earlier ones too."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._until_stop(self._new_text(), final=False)

    def rest(self) -> str:
        """Returns the text that was held back, once the last token has been added."""
        if self.stopped:
            return ""
        return self._until_stop(self._decoded()[len(self._shown) :], final=True)

    def _new_text(self) -> str:
        text = self._decoded()
        if text.endswith(UNFINISHED):
            return ""
        new = text[len(self._shown) :]
        if new:  # from now on, only the tokens of this piece and later ones are decoded
            self._start, self._read = self._read, len(self._ids)
            self._shown = self._decoded()
        return new

    def _until_stop(self, new: str, final: bool) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decoded(self) -> str:
        ids = self._ids[self._start :]
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
