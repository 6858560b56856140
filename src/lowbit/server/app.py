"""The addresses of the server, and errors as JSON."""

import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lowbit.config import LARGEST_SEED
from lowbit.models.generation import Sampling, chat_tokens, has_chat_template, prompt_tokens
from lowbit.parsing import decode, parse_json, shorten
from lowbit.server.answers import (
    DONE,
    Answer,
    ChatAnswer,
    CompletionAnswer,
    error_body,
    event,
    usage_of,
)
from lowbit.server.requests import Asked, AskedChat, AskedCompletion, RequestError, parse
from lowbit.server.worker import Job, Prompt, Worker

LARGEST_BODY = 16_000_000  # bytes; far more than any context holds
ADDRESSES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
logger = logging.getLogger(__name__)
Endpoint = Callable[[Request], Awaitable[Response]]


class Service:
    """Answers requests with one model.

    worker: generates the text.
    name: of the model, by which clients call it.
    loopback: whether only this machine can reach the server. Requests for other hosts are then
        refused, so that no web page that a browser shows can use the model.
    """

    def __init__(self, worker: Worker, name: str, loopback: bool = True) -> None:
        self.worker = worker
        self.name = name
        self.loopback = loopback
        self.created = int(time.time())
        config = getattr(worker.model, "generation_config", None)
        draws = bool(getattr(config, "do_sample", False))
        self.temperature = _positive(getattr(config, "temperature", None) if draws else None)
        self.top_p = _positive(getattr(config, "top_p", None) if draws else None)

    def app(self) -> Starlette:
        """Returns the application that a web server runs."""
        routes = [
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self.complete), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.model)),
            Route("/health", self._guarded(self.health)),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _not_found})

    async def chat(self, request: Request) -> Response:
        """Answers /v1/chat/completions."""
        asked: AskedChat = parse(AskedChat, await _body(request))
        if not has_chat_template(self.worker.tokenizer):
            raise RequestError(
                f"{self.name} has no chat template, as models that were not trained to chat: use "
                "/v1/completions"
            )
        messages = [message.plain() for message in asked.messages]
        answer = ChatAnswer(self.name)
        return await self._answer(request, asked, lambda t: chat_tokens(t, messages), answer)

    async def complete(self, request: Request) -> Response:
        """Answers /v1/completions."""
        asked: AskedCompletion = parse(AskedCompletion, await _body(request))
        prompt = asked.prompt

        def tokens(tokenizer: Any) -> list[int]:
            if isinstance(prompt, str):
                return prompt_tokens(tokenizer, prompt, chat=False)
            return [int(token) for token in prompt]

        return await self._answer(request, asked, tokens, CompletionAnswer(self.name))

    async def models(self, request: Request) -> Response:
        """Answers /v1/models."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        """Answers /v1/models/NAME."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._described())

    async def health(self, request: Request) -> Response:
        """Answers /health."""
        return JSONResponse({"status": "ok"})

    async def _answer(
        self, request: Request, asked: AskedChat | AskedCompletion, prompt: Prompt, answer: Answer
    ) -> Response:
        self._check_name(asked.model)
        job = self.worker.submit(prompt, self._sampling(asked, asked.most_tokens))
        try:
            length = await job.prompt_length()
            if asked.stream:
                events = _events(job, answer, length, asked.with_usage)
                return StreamingResponse(events, media_type="text/event-stream")
            return await _whole(request, job, answer, length)
        except BaseException:
            job.cancel()
            raise

    def _sampling(self, asked: Asked, most_tokens: int | None) -> Sampling:
        temperature = self.temperature if asked.temperature is None else asked.temperature
        top_p = self.top_p if asked.top_p is None else asked.top_p
        seed = secrets.randbelow(LARGEST_SEED) if asked.seed is None else asked.seed
        return Sampling(most_tokens, temperature, top_p, seed, asked.stops)

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise RequestError(
                f"there is no model {shorten(name)!r} here: the model of this server is "
                f"{self.name!r}",
                "model",
                404,
                "model_not_found",
            )

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "lowbit"}

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        """Returns an endpoint that answers errors as JSON."""

        @wraps(endpoint)
        async def guarded(request: Request) -> Response:
            try:
                host = request.headers.get("host", "").rpartition(":")
                asked = host[0] if host[2].isdigit() else "".join(host)
                if self.loopback and asked not in LOOPBACK:
                    raise RequestError(f"this server answers only {LOOPBACK[0]}", status=403)
                return await endpoint(request)
            except RequestError as error:
                return JSONResponse(error_body(error), error.status)
            except Exception as error:
                logger.error("a request failed: %s: %s", type(error).__name__, error)
                return JSONResponse(error_body(error), 500)

        return guarded


async def _body(request: Request) -> Any:
    """Returns the JSON value of a request's body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # the only kind that a web page cannot send everywhere
        raise RequestError(
            f"the header Content-Type is {shorten(kind)!r}: it must be application/json", status=415
        )
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise RequestError(f"the body has more than {LARGEST_BODY:,} bytes", status=413)
    try:
        return parse_json(decode(bytes(body), "the body"), "the body")
    except ValueError as error:
        raise RequestError(str(error)) from None


async def _whole(request: Request, job: Job, answer: Answer, length: int) -> Response:
    texts: list[str] = []
    for count in range(1, 1 << 62):
        piece = await job.piece()
        texts.append(piece.text)
        if piece.end is not None:
            usage = usage_of(length, count)
            return JSONResponse(answer.whole("".join(texts), piece.end, usage))
        if await request.is_disconnected():
            break
    job.cancel()
    return Response(status_code=499)  # nobody reads it


async def _events(job: Job, answer: Answer, length: int, with_usage: bool) -> AsyncIterator[str]:
    count, end = 0, None
    try:
        yield answer.event(None)
        while end is None:
            piece = await job.piece()
            count, end = count + 1, piece.end
            if piece.text:
                yield answer.event(piece.text)
        yield answer.event(None, end)
        if with_usage:
            yield answer.usage_event(usage_of(length, count))
        yield DONE
    except Exception as error:
        logger.error("a stream failed: %s: %s", type(error).__name__, error)
        yield event(error_body(error))
    finally:
        job.cancel()


async def _not_found(request: Request, error: Exception) -> Response:
    """Answers for an address or method that does not exist."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    message = f"{asked}: there is no such address; allowed are {', '.join(ADDRESSES)}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # Starlette lists them in the order of a set, which is another one in every process.
        usable = sorted((error.headers or {}).get("Allow", "another method").split(", "))
        message = f"{asked}: use {' or '.join(usable)} instead"
    return JSONResponse(error_body(RequestError(message)), error.status_code)


def _positive(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and value > 0 else 1.0
