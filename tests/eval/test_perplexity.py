"""Compares perplexity with a direct computation, on a model whose logits are known."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit.eval import perplexity, perplexity_per_document

VOCABULARY = 11


class Bigram(nn.Module):
    """A language model of one table: the next token's logits depend on the last token alone."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(scale * torch.randn(VOCABULARY, VOCABULARY, generator=draw))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> "Bigram":
        assert not use_cache
        self.logits = self.table[input_ids]
        return self

    def loss(self, row: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.table[row[:-1]], row[1:], reduction="none")


def stream(count: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "count, seqlen, limit, windows", [(64, 16, None, 4), (79, 16, 3, 3), (16, 16, 9, 1)]
)
def test_windows(count: int, seqlen: int, limit: int | None, windows: int) -> None:
    model, tokens = Bigram(), stream(count)
    seen: list[tuple[int, int]] = []
    found = perplexity(model, tokens, seqlen, limit, lambda done, of: seen.append((done, of)))
    means = [
        model.loss(tokens[i * seqlen : (i + 1) * seqlen]).mean().item() for i in range(windows)
    ]
    assert found.value == pytest.approx(math.exp(sum(means) / windows), rel=1e-6)
    assert (found.windows, found.seqlen, found.predicted) == (
        windows,
        seqlen,
        windows * (seqlen - 1),
    )
    assert seen == [(i + 1, windows) for i in range(windows)]


def test_too_short_a_text_says_the_numbers() -> None:
    with pytest.raises(ValueError, match="15 tokens, less than one window of 16"):
        perplexity(Bigram(), stream(15), 16)


def test_documents_are_weighed_by_their_tokens_and_cut() -> None:
    model = Bigram()
    documents = [stream(5), stream(30)]
    found = perplexity_per_document(model, documents, seqlen=20)
    losses = torch.cat([model.loss(documents[0]), model.loss(documents[1][:20])])
    assert found.value == pytest.approx(losses.mean().exp().item(), rel=1e-6)
    assert (found.windows, found.predicted) == (2, 4 + 19)


def test_a_broken_model_has_an_infinite_perplexity() -> None:
    assert perplexity(Bigram(scale=1e5), stream(32), 16).value == math.inf
