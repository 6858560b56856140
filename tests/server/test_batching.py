"""Continuous batching: every request as if it were alone."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import quantized
import torch

import lowbit
from lowbit.models.generation import Piece, Sampling, pieces, prompt_tokens
from lowbit.server.batching import BatchWorker
from lowbit.server.draws import NONE, STEPS, Draws, key_of, noise
from lowbit.server.requests import RequestError
from lowbit.server.worker import Job, TurnWorker, Worker

pytestmark = pytest.mark.slow

PROMPT = "Once upon"
WORKERS = {"turn": TurnWorker, "batch": BatchWorker}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return lowbit.load(quantized.folder())


# One event loop, as a server has: the batch still delivers tokens of an answer that ended early.
RUNNER = asyncio.Runner()


def tokens(text: str) -> Any:
    return lambda tokenizer: prompt_tokens(tokenizer, text, chat=False)


async def answer(job: Job) -> tuple[str, str | None, int]:
    """Text, end and number of tokens of an answer."""
    await job.prompt_length()
    found: list[Piece] = []
    while not found or found[-1].end is None:
        found.append(await job.piece())
    return "".join(piece.text for piece in found), found[-1].end, len(found)


def answers(worker: Worker, *asked: tuple[str, Sampling]) -> list[Any]:
    """The answers to requests that come at once."""

    async def all_of_them() -> list[Any]:
        jobs = [worker.submit(tokens(prompt), sampling) for prompt, sampling in asked]
        return await asyncio.gather(*map(answer, jobs), return_exceptions=True)

    return RUNNER.run(asyncio.wait_for(all_of_them(), 60))


@pytest.fixture(scope="module", params=WORKERS)
def worker(request: pytest.FixtureRequest, loaded: Any) -> Any:
    with WORKERS[request.param](*loaded) as running:
        yield running


def test_greedy_text_is_that_of_a_request_alone(worker: Worker, loaded: Any) -> None:
    model, tokenizer = loaded
    ids = prompt_tokens(tokenizer, PROMPT, chat=False)
    alone = list(pieces(model, tokenizer, ids, Sampling(12)))
    expected = "".join(piece.text for piece in alone), "length", 12
    hot = Sampling(12, 2.0, seed=3)
    found = answers(worker, (PROMPT, Sampling(12)), (PROMPT, hot), (PROMPT, Sampling(12)))
    assert found[0] == found[2] == expected and found[1][0] != expected[0]


def test_a_seed_decides_alone(worker: Worker) -> None:
    hot = [Sampling(10, 1.5, seed=seed) for seed in (1, 2, 1)]
    together = answers(worker, *((PROMPT, one) for one in hot), ("Other", Sampling(5, 1.0)))
    assert together[0] == together[2] != together[1]
    assert answers(worker, (PROMPT, hot[1])) == [together[1]]
    narrow = Sampling(10, 1.5, top_p=1e-6, seed=9)
    assert answers(worker, (PROMPT, narrow)) == answers(worker, (PROMPT, Sampling(10)))


def test_stop_strings(worker: Worker) -> None:
    ((text, _, _),) = answers(worker, (PROMPT, Sampling(12)))
    stop = text[4:6]
    ((cut, end, _),) = answers(worker, (PROMPT, Sampling(12, stop=(stop,))))
    assert (cut, end) == (text[: text.index(stop)], "stop")


def test_the_end_of_the_context(worker: Worker, loaded: Any) -> None:
    context = loaded[0].config.max_position_embeddings
    prompt = "a" * (context - 3)
    ((_, end, count), error) = answers(
        worker, (prompt, Sampling(None)), ("a" * context, Sampling(1))
    )
    assert (end, count) == ("length", 3)
    assert isinstance(error, RequestError) and error.code == "context_length_exceeded"


def test_a_client_that_leaves_is_not_answered_any_more(worker: Worker) -> None:
    async def leave() -> int:
        job = worker.submit(tokens(PROMPT), Sampling(50))
        results, put = [], job.put
        job.put = lambda result: (results.append(result), put(result))[1]  # type: ignore[method-assign]
        await job.prompt_length()
        await job.piece()
        job.cancel()
        assert (await answer(worker.submit(tokens(PROMPT), Sampling(2))))[2] == 2
        await asyncio.sleep(0.5)  # long enough for all 50 tokens
        return len(results)

    assert RUNNER.run(asyncio.wait_for(leave(), 60)) < 40


def test_a_family_that_transformers_cannot_batch(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="cannot batch this model .*: serve it without"):
        BatchWorker(*lowbit.load(quantized.folder("falcon 7b"))).__enter__()
    assert "Traceback" not in capfd.readouterr().err


def test_a_family_that_transformers_batches_wrongly(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.server.batching.greedy", lambda *arguments: [0] * 8)
    with pytest.raises(ValueError, match="computes other tokens in a batch: serve it without"):
        BatchWorker(*loaded).__enter__()


def test_the_noise_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    keys = torch.tensor([key_of(5, position) for position in range(20_000)], dtype=torch.int32)
    drawn = (logits + noise(keys, 4)).argmax(dim=-1)
    shares = torch.bincount(drawn, minlength=4) / len(keys)
    expected = logits.softmax(dim=0)
    error = 4 * (expected * (1 - expected) / len(keys)).sqrt()  # four standard deviations
    assert bool(((shares - expected).abs() < error).all())


def test_noise_is_finite_and_absent_without_a_key() -> None:
    keys = torch.tensor([NONE, 1, 2**31 - 1, 1], dtype=torch.int32)
    found = noise(keys, 200_000)
    assert bool(found.isfinite().all()) and not found[0].any() and torch.equal(found[1], found[3])
    assert abs(float(found[1].mean()) - 0.5772) < 0.02  # the mean of the Gumbel distribution
    assert float(torch.corrcoef(found[1:3])[0, 1].abs()) < 0.02
    assert -torch.log(-torch.log(torch.tensor((STEPS - 0.5) / STEPS))) < float("inf")
    assert len({key_of(seed, position) for seed in range(50) for position in range(50)}) == 2500


def test_every_token_of_a_request_has_its_own_noise() -> None:
    def request(seed: int | None, generated: int) -> Any:
        kwargs = {} if seed is None else {"seed": seed}
        state = SimpleNamespace(logit_processor_kwargs=kwargs, generated_tokens=[0] * generated)
        return SimpleNamespace(state=state)

    asked = [(1, 0), (1, 1), (2, 0), (None, 0), (1, 1)]
    keys = Draws().prepare_tensor_args([request(*one) for one in asked]).tolist()
    assert keys == [key_of(1, 0), key_of(1, 1), key_of(2, 0), NONE, key_of(1, 1)]
    assert len(set(keys)) == 4
