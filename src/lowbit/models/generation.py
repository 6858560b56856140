"""Continues a prompt token by token.

It does not use transformers' generate(), which draws from torch's global random generator.
"""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.models.sizes import context_of
from lowbit.parsing import check_unicode, shorten, single_bos

LEAST_TEMPERATURE = 1e-6  # a lower one gives the same tokens, but infinite logits
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoded from a character whose last bytes are missing


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Returns the token ids of a prompt.

    chat: whether the prompt is put into the tokenizer's chat template, as a message of the user.

    Raises ValueError for an empty prompt, one with half of a character (a lone surrogate), and one
    that the chat template refuses.
    """
    check_unicode(prompt, "the prompt")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        try:
            prompt = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise any error
            raise ValueError(
                f"the tokenizer's chat template refuses the prompt ({shorten(error)}): use --raw "
                "to continue it as it is"
            ) from None
    ids: list[int] = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    ids = single_bos(ids, getattr(tokenizer, "bos_token_id", None))
    if not ids:
        raise ValueError("the prompt is empty: there is nothing to continue")
    return ids


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the text that follows the prompt, piece by piece.

    It ends with a token that ends the text, after `max_new_tokens`, or when the context is full.

    prompt: token ids, from `prompt_tokens`.
    temperature: the temperature of sampling; 0: always the most probable token.
    seed: the seed of the random numbers for sampling.

    Raises ValueError if the prompt leaves no room in the context for another token, for a token
    that the model does not have, and if the model computes logits that are not finite.
    """
    context = context_of(model.config)
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))
    if room <= 0 < max_new_tokens:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, the model's context is {context}: "
            "use a shorter prompt"
        )
    rows = _rows(model)
    if rows is not None and max(prompt) >= rows:
        raise ValueError(
            f"the prompt has token {max(prompt)}, but the model has {rows} tokens: use the "
            "tokenizer of this model, or leave out special tokens that were added to it"
        )
    draw = torch.Generator().manual_seed(seed)
    ends = _ends(model, tokenizer)
    ids, shown = list(prompt), len(_text(tokenizer, prompt))
    for token in _continue(model, prompt, room, temperature, draw):
        if token in ends:
            break
        ids.append(token)
        text = _text(tokenizer, ids)
        if not text.endswith(UNFINISHED):
            yield text[shown:]
            shown = len(text)
    yield _text(tokenizer, ids)[shown:]


def _rows(model: nn.Module) -> int | None:
    """Returns the number of tokens that have an embedding; None for a model that does not say."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _continue(
    model: nn.Module, prompt: list[int], count: int, temperature: float, draw: torch.Generator
) -> Iterator[int]:
    device = next(model.parameters()).device
    if device.type == "meta":  # offloaded: accelerate moves the inputs to the right device
        device = torch.device("cpu")
    # Only the last logits are needed; those of all tokens of a long prompt would take gigabytes.
    parameters = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    # A model that keeps another kind of state (Mamba) reads the whole text for every token.
    cached = "past_key_values" in parameters
    cache, ids, new = None, list(prompt), prompt
    for _ in range(count):
        state = {"past_key_values": cache, "use_cache": True} if cached else {"use_cache": False}
        read = torch.tensor([new if cache is not None else ids], device=device)
        with torch.no_grad():
            try:
                out = model(input_ids=read, **state, **last)
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                if not cached:
                    raise
                # It needs more than its cache to continue (CPM-Ant, BLT).
                cached, whole = False, torch.tensor([ids], device=device)
                out = model(input_ids=whole, use_cache=False, **last)
        cache = getattr(out, "past_key_values", None) if cached else None
        new = [_choose(out.logits[0, -1], temperature, draw)]
        ids += new
        yield new[0]


def _choose(logits: Tensor, temperature: float, draw: torch.Generator) -> int:
    """Returns the next token. It is drawn on the CPU, so that it does not depend on the device.

    logits: (vocabulary,)
    """
    if bool(logits.isnan().any()) or not math.isfinite(float(logits.max())):
        raise ValueError(
            "the model computes logits that are not finite (NaN or infinity), so it cannot choose "
            "a token: its weights are damaged, or too large for this dtype; try float32"
        )
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.float().cpu() / max(temperature, LEAST_TEMPERATURE)
    probabilities = torch.softmax(scaled, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=draw))


def _text(tokenizer: Any, ids: list[int]) -> str:
    # All tokens at once, because many tokenizers drop the space before the first decoded word.
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """Returns the tokens that end a text; chat models often have several."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id} - {None}
