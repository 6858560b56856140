"""Processors for models of `image_text_zoo`: one token for each character, and those of images.

The processors of Qwen need torchvision, which the tests do without: `INPUTS` makes their arguments.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_text_zoo
import torch
import zoo
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

SIDE = 28  # of an image, in pixels
# By family, the names of special tokens by id, and the placeholder of an image in a text.
TOKENS: dict[str, tuple[dict[int, str], str]] = {
    "gemma3": ({97: "<soft>", 98: "<start>", 99: "<end>"}, "<start>"),
    "llava": ({97: "<image>"}, "<image>"),
}
QWEN = ("qwen2_5_vl", "qwen3_vl")
IMAGE = 97  # the token of a part of an image, in `image_text_zoo`
CHAT = (
    "{% for m in messages %}{{ m.role }}:{% for c in m.content %}"
    "{% if c.type == 'image' %}PLACEHOLDER{% else %}{{ c.text }}{% endif %}"
    "{% endfor %};{% endfor %}"
)


def _gemma3(tokenizer: Any, chat: str) -> Any:
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return Gemma3Processor(images, tokenizer, chat_template=chat, image_seq_length=4)


def _llava(tokenizer: Any, chat: str) -> Any:
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=chat,
        num_additional_image_tokens=1,
    )


PROCESSORS: dict[str, Callable[[Any, str], Any]] = {
    "gemma3": _gemma3,
    "llava": _llava,
}


def make_folder(name: str, folder: Path) -> Path:
    """A small random model that reads images, with its processor."""
    image_text_zoo.make(name).save_pretrained(folder)
    names, placeholder = TOKENS[name]
    words = {chr(33 + i): i for i in range(94)}
    words |= {names.get(i, f"<{i}>"): i for i in range(94, zoo.VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<94>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<94>",
        bos_token="<95>",
        pad_token="<96>",
        extra_special_tokens=dict(
            zip(("image_token", "boi_token", "eoi_token"), names.values(), strict=False)
        ),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    chat = CHAT.replace("PLACEHOLDER", placeholder)
    PROCESSORS[name](tokenizer, chat).save_pretrained(folder)
    return folder


def write_rows(folder: Path, placeholder: str, count: int = 3) -> Path:
    """A file of rows, each a text with one image or two, and the images beside it."""
    draw, rows = random.Random(0), []
    for number in range(count):
        images = [f"images/{number}-{i}.png" for i in range(1 + number % 2)]
        for name in images:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (SIDE, SIDE), draw.randbytes(3 * SIDE**2)).save(path)
        words = "".join(chr(draw.randrange(33, 127)) for _ in range(9))
        rows.append({"text": words + placeholder * len(images) + words, "images": images})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def qwen_inputs(count: int = 3) -> list[dict[str, Tensor]]:
    """The arguments of Qwen's models for rows with one image or two."""
    size = {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=size)
    draw, rows = random.Random(0), []
    for number in range(count):
        pictures = [
            Image.frombytes("RGB", (SIDE, SIDE), draw.randbytes(3 * SIDE**2))
            for _ in range(1 + number % 2)
        ]
        made = processor(pictures, return_tensors="pt")
        ids = [draw.randrange(90) for _ in range(9)]
        for grid in made["image_grid_thw"]:
            ids += [99, *[IMAGE] * (int(grid.prod()) // 4), 100, 5, 6]
        tokens = torch.tensor([ids])
        kinds = (tokens == IMAGE).int()
        rows.append({"input_ids": tokens, "mm_token_type_ids": kinds, **made})
    return rows
