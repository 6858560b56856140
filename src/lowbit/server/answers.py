"""The JSON objects that clients get: whole answers, the events of a stream, and errors."""

import json
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar
from uuid import uuid4

from lowbit.server.requests import RequestError


class Answer(ABC):
    """One answer, to a chat or a completion.

    model: the name of the model.
    """

    prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    part_kind: ClassVar[str]

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = f"{self.prefix}-{uuid4().hex}"
        self.created = int(time.time())

    @abstractmethod
    def choice(self, text: str, end: str) -> dict[str, Any]:
        """Returns the only choice of a whole answer. end: "stop" or "length" """

    @abstractmethod
    def part(self, text: str | None, end: str | None) -> dict[str, Any]:
        """Returns the only choice of one event. text: None in the first event and the last"""

    def whole(self, text: str, end: str, usage: dict[str, int]) -> dict[str, Any]:
        """Returns the answer as one object."""
        return self._object(self.whole_kind, [self.choice(text, end)]) | {"usage": usage}

    def event(self, text: str | None, end: str | None = None) -> str:
        """Returns an event of a stream."""
        return event(self._object(self.part_kind, [self.part(text, end)]))

    def usage_event(self, usage: dict[str, int]) -> str:
        """Returns the event that says how many tokens there were."""
        return event(self._object(self.part_kind, []) | {"usage": usage})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class ChatAnswer(Answer):
    """An answer to /v1/chat/completions."""

    prefix, whole_kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, end: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": end}

    def part(self, text: str | None, end: str | None) -> dict[str, Any]:
        first = {"role": "assistant", "content": ""}
        delta = {"content": text} if text is not None else {} if end else first
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": end}


class CompletionAnswer(Answer):
    """An answer to /v1/completions."""

    prefix, whole_kind, part_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str, end: str) -> dict[str, Any]:
        return self.part(text, end)

    def part(self, text: str | None, end: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": end}


def usage_of(prompt: int, generated: int) -> dict[str, int]:
    """Returns the object that says how many tokens there were."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


def event(value: Any) -> str:
    """Returns a JSON value as an event of a stream."""
    return f"data: {json.dumps(value)}\n\n"


DONE = "data: [DONE]\n\n"


def error_body(error: Exception) -> dict[str, Any]:
    """Returns the object that tells a client of an error."""
    known = isinstance(error, RequestError)
    return {
        "error": {
            "message": str(error) if known else f"the model failed: {error}",
            "type": "invalid_request_error" if known else "server_error",
            "param": error.param if isinstance(error, RequestError) else None,
            "code": error.code if isinstance(error, RequestError) else None,
        }
    }
