"""Generates text for all clients: a thread computes one token for each in turn.

All work with model and tokenizer happens on this thread: neither may be used by two threads at
once. Each request has a key-value cache and a generator of random numbers of its own, so its text
does not depend on the others.
"""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from torch import nn

from lowbit.models.generation import ContextFull, Piece, Sampling, pieces, room_for
from lowbit.server.requests import RequestError

MOST_AT_ONCE = 16  # requests; each has its own key-value cache in memory, others wait
Prompt = Callable[[Any], list[int]]  # a function of the tokenizer that returns token ids


class Job:
    """A request that a worker answers.

    prompt: makes the token ids of the prompt.
    sampling: how tokens are chosen.
    """

    def __init__(self, prompt: Prompt, sampling: Sampling) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.cancelled = False
        self.on_cancel: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[int | Piece | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        """Tells the worker that nobody waits for the answer any more."""
        self.cancelled = True
        self.on_cancel()

    def put(self, result: int | Piece | Exception) -> None:
        """Called by the worker: hands a result over to the event loop."""
        try:
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)
        except RuntimeError:  # the event loop was closed, because the server stops
            self.cancelled = True

    async def prompt_length(self) -> int:
        """Returns the number of tokens of the prompt; comes before all pieces.

        Raises RequestError for a prompt that cannot be continued.
        """
        result = await self._next()
        assert isinstance(result, int)
        return result

    async def piece(self) -> Piece:
        """Returns the next piece. Raises what the worker raised."""
        result = await self._next()
        assert isinstance(result, Piece)
        return result

    async def _next(self) -> int | Piece:
        result = await self._results.get()
        if isinstance(result, Exception):
            raise result
        return result


class Worker(ABC):
    """Generates text with one model. It is a context manager.

    model: from `lowbit.load`.
    tokenizer: of the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @abstractmethod
    def __enter__(self) -> "Worker": ...

    @abstractmethod
    def __exit__(self, *error: object) -> None: ...

    @abstractmethod
    def submit(self, prompt: Prompt, sampling: Sampling) -> Job:
        """Hands a request over to the worker. Called on the event loop."""

    def prepared(self, job: Job) -> tuple[list[int], int] | None:
        """Returns the tokens of a request and how many may follow; None if it is refused."""
        try:
            prompt = job.prompt(self.tokenizer)
            room = room_for(self.model, prompt, job.sampling.max_new_tokens)
        except ContextFull as error:
            job.put(RequestError(str(error), code="context_length_exceeded"))
        except ValueError as error:
            job.put(RequestError(str(error)))
        except Exception as error:
            job.put(error)
        else:
            job.put(len(prompt))
            return prompt, room
        return None


class TurnWorker(Worker):
    """Computes one token for each request in turn. The end of the context stops its thread."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self._arriving: SimpleQueue[Job | None] = SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lowbit-worker", daemon=True)

    def __enter__(self) -> "TurnWorker":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._arriving.put(None)
        self._thread.join(timeout=10)  # at most until the present token is computed

    def submit(self, prompt: Prompt, sampling: Sampling) -> Job:
        job = Job(prompt, sampling)
        self._arriving.put(job)
        return job

    def _run(self) -> None:
        active: deque[tuple[Job, Iterator[Piece]]] = deque()
        while not self._stopping.is_set():
            if not active or (len(active) < MOST_AT_ONCE and not self._arriving.empty()):
                job = self._arriving.get()
                begun = None if job is None or job.cancelled else self._begin(job)
                if job is not None and begun is not None:
                    active.append((job, begun))
                continue
            job, rest = active.popleft()
            if not job.cancelled and self._goes_on(job, rest):
                active.append((job, rest))

    def _begin(self, job: Job) -> Iterator[Piece] | None:
        """Returns the pieces of a request; None if it cannot be answered."""
        found = self.prepared(job)
        if found is None:
            return None
        return pieces(self.model, self.tokenizer, found[0], job.sampling)

    def _goes_on(self, job: Job, rest: Iterator[Piece]) -> bool:
        """Computes one token of a request; returns whether there are more."""
        try:
            piece = next(rest)
        except Exception as error:  # of the model, such as too little memory on the GPU
            job.put(error)
            return False
        job.put(piece)
        return piece.end is None
