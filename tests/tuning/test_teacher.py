"""The kept predictions give the divergence over the kept outcomes, and survive only if whole."""

import math
from pathlib import Path

import pytest
import quantized
import torch
import zoo

from lowbit.eval.divergence import StreamedLogits, kl_divergence
from lowbit.tuning import teacher as module
from lowbit.tuning.teacher import TOP, Teacher, loss, most_likely, outcomes


def logits(seed: int, vocabulary: int = 300) -> torch.Tensor:
    return 3 * torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_probabilities_of_the_outcomes() -> None:
    tokens, kept = most_likely(logits(0))
    assert tokens.shape == (7, TOP) and kept.shape == (7, TOP + 1)
    probabilities = logits(0).softmax(-1)
    assert torch.allclose(kept[:, :-1].exp(), probabilities.gather(-1, tokens), atol=1e-6)
    rest = 1 - probabilities.gather(-1, tokens).sum(-1)
    assert torch.allclose(kept[:, -1].exp(), rest, atol=1e-6)
    assert torch.allclose(kept.exp().sum(-1), torch.ones(7), atol=1e-5)


@pytest.mark.parametrize("vocabulary", [2, 10, TOP, TOP + 1, 300])
def test_the_loss_is_a_lower_bound_and_exact_for_few_tokens(vocabulary: int) -> None:
    ours, theirs = logits(1, vocabulary), logits(0, vocabulary)
    found = loss(ours, most_likely(theirs))
    whole = kl_divergence(theirs.log_softmax(-1), ours.log_softmax(-1))
    assert (found <= whole + 1e-5).all() and (found >= -1e-6).all()
    if vocabulary <= TOP + 1:
        assert torch.allclose(found, whole, atol=1e-5)
    assert torch.allclose(loss(theirs, most_likely(theirs)), torch.zeros(7), atol=1e-6)


def test_gradients_are_finite_where_the_rest_has_no_probability() -> None:
    theirs = torch.full((1, 300), -1e4)
    theirs[0, :3] = torch.tensor([1.0, 0.0, -math.inf])
    ours = logits(1)[:1].requires_grad_()
    loss(ours, most_likely(theirs)).sum().backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None and ours.grad.isfinite().all()


def test_windows_are_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", 5 * zoo.VOCABULARY)  # positions come in pieces
    rows = [zoo.tokens(i, rows=1, length=17)[0] for i in range(2)]
    model, steps = StreamedLogits(quantized.source(), rows), []
    teacher = Teacher(tmp_path / "teacher")
    assert not teacher.is_complete
    teacher.write(model, lambda done, of: steps.append((done, of)))
    assert teacher.is_complete and steps == [(1, 2), (2, 2)]
    tokens, kept = teacher[1]
    assert tokens.shape == (16, TOP)
    assert torch.allclose(kept, outcomes(model(1, slice(0, 16)), tokens), atol=1e-5)
    next(teacher.folder.glob("*.safetensors")).write_bytes(b"")
    assert not teacher.is_complete
