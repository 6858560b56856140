"""Several models, one table: perplexity, bits and bytes of each."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from lowbit.calibration import evaluation_documents, evaluation_text
from lowbit.checkpoint.output import size_of
from lowbit.config import Config
from lowbit.eval.perplexity import Perplexity, perplexity, perplexity_per_document
from lowbit.load import load, locate

LONGEST_DEFAULT = 2048  # tokens; the papers' context

Progress = Callable[[str, int, int], None]  # model, windows done, windows of


class EvalOptions(Config):
    """texts: wikitext2, c4, ptb or files. seqlen: tokens in a window; None: the smaller of 2,048
    and the model's context. per_document: every document from its BOS. limit: windows per text.
    """

    texts: tuple[str, ...] = Field(default=("wikitext2",), min_length=1)
    seqlen: int | None = Field(default=None, ge=2)
    per_document: bool = False
    limit: int | None = Field(default=None, ge=1)
    device_map: Any = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Evaluation:
    """One model's row. perplexity and windows: by text. bits_per_weight: linears and model.

    A perplexity may be infinite or not a number: then the model is broken, which is worth a row.
    """

    model: str
    method: str
    perplexity: dict[str, float]
    bits_per_weight: dict[str, float]
    size_bytes: int
    seqlen: int
    windows: dict[str, int]
    per_document: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    models: Sequence[str | Path],
    options: EvalOptions,
    on_progress: Progress = lambda model, done, of: None,
) -> list[Evaluation]:
    """Evaluates float and quantized models one after another; at most one is in memory.

    Raises ValueError for a model or text that cannot be had, and for models whose default contexts
    differ (never compare across: say --seqlen).
    """
    rows: list[Evaluation] = []
    for name in models:
        rows.append(_evaluate_one(str(name), options, on_progress))
        if rows[-1].seqlen != rows[0].seqlen:
            raise ValueError(
                f"{name} would be measured with {rows[-1].seqlen} tokens of context, "
                f"{rows[0].model} with {rows[0].seqlen}: name one --seqlen for all"
            )
        gc.collect()
    return rows


def _evaluate_one(name: str, options: EvalOptions, on_progress: Progress) -> Evaluation:
    started = time.perf_counter()
    folder = locate(name, options.trust_remote_code)
    model, tokenizer = load(
        folder, device_map=options.device_map, trust_remote_code=options.trust_remote_code
    )
    context = getattr(model.config, "max_position_embeddings", None)
    seqlen = options.seqlen or min(LONGEST_DEFAULT, context or LONGEST_DEFAULT)
    if context is not None and seqlen > context:
        raise ValueError(f"{name} has a context of {context} tokens; --seqlen {seqlen} is longer")

    def measure(text: str) -> Perplexity:
        def progress(done: int, of: int) -> None:
            on_progress(name, done, of)

        if options.per_document:
            documents = evaluation_documents(text, tokenizer)
            return perplexity_per_document(model, documents, seqlen, options.limit, progress)
        tokens = evaluation_text(text, tokenizer, seqlen)
        return perplexity(model, tokens, seqlen, options.limit, progress)

    found = {text: measure(text) for text in options.texts}
    size = size_of(folder)
    return Evaluation(
        model=name,
        method=_method(model),
        perplexity={text: p.value for text, p in found.items()},
        bits_per_weight={"linears": size.linears, "model": size.model},
        size_bytes=size.bytes,
        seqlen=seqlen,
        windows={text: p.windows for text, p in found.items()},
        per_document=options.per_document,
        seconds=round(time.perf_counter() - started, 3),
    )


def _method(model: torch.nn.Module) -> str:
    """The recipe or method that made a quantized model; "float" for others."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return "float"
    made_by = config.to_dict().get("made_by") or {}
    return made_by.get("recipe") or (made_by.get("method") or {}).get("name", "quantized")
