"""The random numbers of a batch: they depend on the seed of a request and on nothing else.

A token is drawn with the Gumbel-max trick: the largest of logit + noise is distributed as a draw
from softmax(logits), if the noise of each token is -log(-log(u)) with u uniform. u is a hash of
request, position and token, so that it needs no generator, runs on every device, and does not
depend on the other requests of the batch.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

NONE = 0  # the key of a request that takes the most probable token
STEPS = 2**23  # values of u: as many as float32 can tell apart just below 1
WORD = 0xFFFFFFFF


def key_of(seed: int, position: int) -> int:
    """Returns the key of the noise of one token: 31 bits, not NONE.

    seed: of the request.
    position: number of tokens that were generated before.
    """
    digest = hashlib.sha256(f"{seed} {position}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1 or 1


def noise(keys: Tensor, count: int) -> Tensor:
    """Returns Gumbel noise, and zeros where the key is NONE.

    keys: (requests,) int32
    count: number of tokens of the vocabulary.

    Returns (requests, count) float32.
    """
    words = torch.arange(count, device=keys.device, dtype=torch.int64) * 0x9E3779B1
    mixed = (words[None] ^ keys[:, None].long() * 0x85EBCA77) & WORD
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 0x27D4EB2F)):
        mixed = (mixed ^ (mixed >> shift)) * factor & WORD  # below 2^64: the product wraps, & cuts
    uniform = ((mixed >> 9).float() + 0.5) / STEPS
    return torch.where(keys[:, None] == NONE, 0.0, -torch.log(-torch.log(uniform)))


class Draws(ContinuousBatchingLogitsProcessor):
    """Adds noise to the scores of the requests that draw their tokens.

    A request states its seed as `seed`; without one it takes the most probable token.
    """

    supported_kwargs: dict[str, type] = {"seed": int}
    ignored_kwargs: tuple[str, ...] = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(NONE)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        states = [request.state for request in requests_with_new_token]
        keys = [self._key(state) for state in states]
        return torch.tensor(keys, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        return scores + noise(tensor_arg[: len(scores)], scores.shape[-1])

    def _key(self, state: Any) -> int:
        seed = state.logit_processor_kwargs.get("seed")
        return NONE if seed is None else key_of(seed, len(state.generated_tokens))
