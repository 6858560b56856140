"""Compares the divergence with a direct computation, with both models whole in memory."""

import math
from pathlib import Path

import pytest
import quantized
import torch
import zoo
from torch.nn import functional

from lowbit.eval import divergence as module
from lowbit.eval.divergence import StreamedLogits, divergence, kl_divergence
from lowbit.load import load_model

ROWS = [zoo.tokens(0, rows=1, length=n)[0] for n in (17, 17, 9)]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_as_computed_from_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", 5 * zoo.VOCABULARY)  # windows come in pieces
    reference, small = quantized.source(name), quantized.folder(name)
    found, losses = divergence(
        StreamedLogits(reference, ROWS), StreamedLogits(small, ROWS), range(len(ROWS))
    )
    whole, packed = load_model(reference), load_model(small)
    kl, same = [], []
    for row, loss in zip(ROWS, losses, strict=True):
        p = whole(row[None]).logits[0, :-1].double()
        q = packed(row[None]).logits[0, :-1].double()
        kl += [(p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)]
        same += [(p.argmax(-1) == q.argmax(-1)).double()]
        wanted = functional.cross_entropy(q, row[1:], reduction="none")
        assert torch.allclose(loss.double(), wanted, atol=1e-5)
    assert found.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4) and found.kl > 1e-4
    assert found.agreement == pytest.approx(torch.cat(same).mean().item())
    assert 0 < found.agreement < 1 and found.tokens == 16 + 16 + 8


def test_a_model_has_no_divergence_from_itself() -> None:
    folder = quantized.folder("opt")
    model, again = StreamedLogits(folder, ROWS), StreamedLogits(folder, ROWS)
    found, _ = divergence(model, again, range(1, 3))
    assert (found.kl, found.agreement, found.tokens) == (0.0, 1.0, 24)


def test_hidden_states_that_are_large_go_to_disk_and_leave_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "MOST_OF_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    on_disk = StreamedLogits(quantized.source("llama"), ROWS)
    assert len(list(tmp_path.rglob("*.f32"))) == len(ROWS)
    monkeypatch.setattr(module, "MOST_OF_MEMORY", 1)
    in_memory = StreamedLogits(quantized.source("llama"), ROWS)
    assert torch.equal(on_disk(2, slice(0, 9)), in_memory(2, slice(0, 9)))
    del on_disk
    assert not list(tmp_path.iterdir())


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    options = zoo.ZOO["llama"].options | {"vocab_size": 105}
    other = zoo.write(zoo.Line("llama", options), tmp_path)
    with pytest.raises(ValueError, match="predicts 101 tokens, .* 105: a divergence needs models"):
        divergence(
            StreamedLogits(quantized.source("llama"), ROWS), StreamedLogits(other, ROWS), range(1)
        )


def test_tokens_that_are_impossible_or_broken() -> None:
    none = -math.inf
    expected = torch.tensor([[0.0, none], [0.5, 0.5], [math.nan, 0.0]]).log_softmax(-1)
    found = torch.tensor([[0.0, none], [0.0, none], [0.0, 0.0]]).log_softmax(-1)
    kl = kl_divergence(expected, found)
    assert kl[0] == 0 and kl[1] == math.inf and kl[2].isnan()
