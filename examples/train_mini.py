"""Trains a small language model on stories, to have real weights to quantize without a download.

    python examples/train_mini.py llama|opt OUT --stories FILE --books FILE [--tokenizer DIR]

The stories are the TinyStories sample, whose documents are separated by <|endoftext|>. The last
15 % are held back and never trained on. Children's classics are mixed in, with a share that falls
linearly from 45 % to zero. The optimizer is AdamW with warm-up and a cosine schedule. The result is
a float16 Hugging Face folder. The two models in examples/models took about an hour each on one CPU
core; a GPU needs minutes.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PIECES = 2048  # vocabulary; a larger one would take most of the 5 M parameters
CONTEXT = 512
TOKENS_PER_STEP = 2048
PEAK_RATE = 2e-3
WARM_UP_STEPS = 100
BOOK_SHARE = 0.45  # of the windows, at the first step
SPECIAL = {"vocab_size": PIECES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}


def build_model(kind: str) -> PreTrainedModel:
    """Returns a randomly initialized model of 5 to 6 M parameters with tied embeddings."""
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                intermediate_size=704,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                **SHAPE,
                **SPECIAL,
            )
        )
    return OPTForCausalLM(
        OPTConfig(
            ffn_dim=1024,
            word_embed_proj_dim=256,
            activation_function="relu",
            dropout=0.05,
            **SHAPE,
            **SPECIAL,
        )
    )


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; encodings start with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str], mark: bool) -> Tensor:
    """Returns all documents as one row of token ids. mark: put each between <s> and </s>."""
    ids: list[int] = []
    for document in documents:
        body = tokenizer(document, add_special_tokens=False).input_ids
        ids += [1, *body, 2] if mark else body
    return torch.tensor(ids)


def perplexity(model: PreTrainedModel, ids: Tensor, window: int, limit: int | None = None) -> float:
    """Computes exp(mean cross-entropy) over non-overlapping windows of `ids`."""
    model.eval()
    windows = ids[: len(ids) // window * window].view(-1, window)[:limit].to(model.device)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    model.train()
    return math.exp(sum(losses) / len(losses))


def rate_at(step: int, steps: int) -> float:
    """Returns the learning rate at a step."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_RATE * min(1, (step + 1) / WARM_UP_STEPS) * (0.97 * cosine + 0.03)


def draw_batch(
    stories: Tensor, books: Tensor, book_share: float, window: int, generator: torch.Generator
) -> Tensor:
    """Draws random windows: (TOKENS_PER_STEP / window, window)."""
    rows = []
    for _ in range(TOKENS_PER_STEP // window):
        from_books = torch.rand((), generator=generator).item() < book_share
        source = books if from_books else stories
        start = int(torch.randint(len(source) - window, (), generator=generator))
        rows.append(source[start : start + window])
    return torch.stack(rows)


def train(
    model: PreTrainedModel, stories: Tensor, books: Tensor, held: Tensor, steps: int, window: int
) -> None:
    """Trains the model in place. held: the held-back text, whose perplexity is printed."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        share = BOOK_SHARE * (1 - step / steps)
        batch = draw_batch(stories, books, share, window, generator).to(model.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 200 == 0:
            seconds = time.perf_counter() - started
            held_back = perplexity(model, held, window, limit=30)
            print(
                f"step {step + 1} of {steps}, {seconds:.0f} s, "
                f"loss {loss.item():.3f}, held-back perplexity {held_back:.1f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=["llama", "opt"], help="architecture")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--stories", required=True, type=Path, help="file of stories")
    parser.add_argument("--books", required=True, type=Path, help="file of books")
    parser.add_argument("--tokenizer", help="folder; default: train one on the text")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the optimizer")
    parser.add_argument("--window", type=int, default=CONTEXT, help="tokens in a window")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    documents = [d.strip() for d in args.stories.read_text().split("<|endoftext|>")]
    documents = [d for d in documents if d][:-1]  # the sample cuts its last story
    kept = int(len(documents) * 0.85)
    books = args.books.read_text()
    pages = [books[i : i + 100_000] for i in range(0, len(books), 100_000)]
    if args.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    else:
        tokenizer = train_tokenizer(documents[:kept] + pages[:15])
    held = encode(tokenizer, documents[kept:], mark=True)
    model = build_model(args.kind).to(args.device)
    train(
        model,
        encode(tokenizer, documents[:kept], mark=True),
        encode(tokenizer, pages, mark=False),
        held,
        args.steps,
        args.window,
    )
    tokens = args.steps * TOKENS_PER_STEP / 1e6
    print(f"held-back perplexity {perplexity(model, held, 256):.2f} after {tokens:.1f} M tokens")
    if hasattr(model.config, "dropout"):
        model.config.dropout = 0.0
    model.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
