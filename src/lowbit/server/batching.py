"""Generates text for all clients in one batch, with the continuous batching of transformers.

Every request has its own temperature, top_p, seed and stop strings. Its text does not depend on the
others, up to rounding: sums over a batch of another size may end in other bits.
"""

import logging
from typing import Any
from uuid import uuid4

from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from lowbit.models.generation import Piece, Sampling, ends_of, greedy
from lowbit.models.sizes import context_of
from lowbit.models.text_stream import TextStream
from lowbit.server.draws import Draws
from lowbit.server.worker import Job, Prompt, Worker

PAGE = 256  # tokens of a page of the key-value cache
PAGES_ON_CPU = 64  # beyond those of one whole context; a GPU gets as many as fit
TRIED = 8  # tokens that are generated as a test before clients may connect
LONGEST_TEST = 120  # seconds; on a CPU the first batch of a large model takes long
WITHOUT = "serve it without --continuous-batching"
LOGGER = "ContinuousBatchingLogger"  # of transformers
NO_END = -1  # for a model without a token that ends a text


class BatchWorker(Worker):
    """Computes the next tokens of all requests in one batch.

    Entering its context raises ValueError if transformers cannot batch the model.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self._ends = ends_of(model, tokenizer)
        self._manager: Any = None

    def __enter__(self) -> "BatchWorker":
        model: Any = self.model
        logging.getLogger(LOGGER).setLevel(logging.CRITICAL)  # clients are told of each error
        test = [token % model.config.get_text_config().vocab_size for token in range(3, 19)]
        expected = greedy(model, test, TRIED)
        try:
            self._manager = _manager(model)
            self._manager.start()
            found = self._tried(test)
        except Exception as error:
            self._stop()
            raise ValueError(f"transformers cannot batch this model ({error}): {WITHOUT}") from None
        if found != expected:
            self._stop()
            raise ValueError(f"transformers computes other tokens in a batch: {WITHOUT}")
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def submit(self, prompt: Prompt, sampling: Sampling) -> Job:
        job = Job(prompt, sampling)
        found = self.prepared(job)
        if found is not None:
            self._begin(job, *found)
        return job

    def _begin(self, job: Job, prompt: list[int], room: int) -> None:
        name, sampling = uuid4().hex, job.sampling
        answer = _Answer(job, TextStream(self.tokenizer, prompt, sampling.stop), self._ends, room)
        job.on_cancel = lambda: self._manager.cancel_request(name)
        self._manager.register_result_handler(name, answer.take)
        draws = sampling.temperature > 0
        how = {"temperature": float(sampling.temperature), "seed": sampling.seed} if draws else {}
        accepted = self._manager.add_request(
            prompt,
            request_id=name,
            max_new_tokens=room,
            streaming=True,
            eos_token_id=sorted(self._ends) or NO_END,
            top_p=float(sampling.top_p) if draws else 1.0,
            **how,
        )
        if accepted is None:
            job.put(RuntimeError("the batch has stopped: start the server again"))

    def _tried(self, prompt: list[int]) -> list[int]:
        self._manager.add_request(prompt, "test", max_new_tokens=TRIED, eos_token_id=NO_END)
        result = self._manager.get_result("test", timeout=LONGEST_TEST)
        if result is None or result.error is not None:
            raise RuntimeError("no answer" if result is None else result.error)
        tokens: list[int] = result.generated_tokens
        return tokens

    def _stop(self) -> None:
        if self._manager is not None and self._manager.is_running():
            self._manager.stop(block=True, timeout=10, hard_stop=True)


class _Answer:
    """Makes pieces of the tokens of one request, on the event loop."""

    def __init__(self, job: Job, stream: TextStream, ends: set[int], room: int) -> None:
        self.job = job
        self.stream = stream
        self.ends = ends
        self.room = room
        self.count = 0
        self.ended = False

    def take(self, output: Any) -> None:
        """Takes a result of transformers, which holds all tokens of the request until now."""
        for token in output.generated_tokens[self.count :]:
            if not self.ended:
                self._token(token)
        if output.error is not None and not self.ended:
            self._put(RuntimeError(output.error))
        elif output.is_finished() and not self.ended:
            self._put(Piece(self.stream.rest(), "stop"))

    def _token(self, token: int) -> None:
        self.count += 1
        if token in self.ends:
            self._put(Piece(self.stream.rest(), "stop"))
            return
        text = self.stream.add(token)
        if self.stream.stopped:
            self._put(Piece(text, "stop"))
            self.job.cancel()
        elif self.count == self.room:
            self._put(Piece(text + self.stream.rest(), "length"))
        else:
            self.job.put(Piece(text))

    def _put(self, last: Piece | Exception) -> None:
        self.ended = True
        self.job.put(last)


def _manager(model: Any) -> Any:
    """Returns a manager of transformers in which each request chooses its tokens in its own way."""
    # Asynchronous batches would prepare a token before the one before it is known, and a seed's
    # random numbers depend on how many there were.
    options: dict[str, Any] = {"page_size": PAGE, "use_async_batching": False}
    if model.device.type == "cpu":
        context = context_of(model.config) or PAGE
        options["num_blocks"] = -(-context // PAGE) + PAGES_ON_CPU
        options["max_batch_tokens"] = 512
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=TRIED),
        continuous_batching_config=ContinuousBatchingConfig(**options),
    )
    steps = [
        ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
        ContinuousBatchingTopPLogitsWarper(TopPLogitsWarper(1.0)),
        Draws(),
    ]
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(steps))
    manager.logit_processor.tensors_required = len(steps)
    return manager
