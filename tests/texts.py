"""Tokenizers and calibration texts for tests, without a network."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowbit.calibration import (
    Calibration,
    TokenWindows,
    token_windows,
)

WIKITEXT, PTB, C4 = "Salesforce/wikitext", "ptb-text-only/ptb_text_only", "allenai/c4"


PILE = "mit-han-lab/pile-val-backup"


WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"


C4_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"


BOS = 1


TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}:{{ message['content'] }}{% endfor %}"
)


CHATS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
    [{"role": "user", "content": "and again"}],
]


def make_tokenizer(
    bos: bool = True, template: str | None = None, alphabet: str = ""
) -> PreTrainedTokenizerFast:
    """One token per character: ids show where a window begins."""
    characters = alphabet or "".join(map(chr, [10, 13, *range(32, 127)]))
    vocabulary = {"<unk>": 0, "<s>": BOS} | {c: i for i, c in enumerate(characters, start=2)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", model_max_length=16
    )
    tokenizer.chat_template = template
    return tokenizer


def draw(tokenizer: object, *sources: str, **options) -> TokenWindows:
    cache = options.pop("cache", None)
    context = options.pop("context", None)
    options = {"samples": 4, "seqlen": 8} | options
    return token_windows(Calibration(sources=sources, **options), tokenizer, context, cache)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def contains(whole: list[int], window: torch.Tensor) -> bool:
    part = window.tolist()
    return any(whole[i : i + len(part)] == part for i in range(len(whole)))


ROWS = [{"text": "first document"}, {"text": ""}, {"text": "the \u2028 second one"}]


JOINED = "first document\n\n\n\nthe \u2028 second one"


TEXT = "the quick brown fox jumps over the lazy dog. " * 10
