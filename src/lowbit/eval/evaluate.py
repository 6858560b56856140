"""Several models, one table: perplexity, divergence, tasks, bits and bytes of each."""

import gc
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.calibration import evaluation_documents, evaluation_text
from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.checkpoint.slices import has_masters, size_of_slice, trained_share, widths_of
from lowbit.checkpoint.verify import read_config
from lowbit.eval.divergence import Divergence, StreamedLogits, divergence
from lowbit.eval.options import EvalOptions
from lowbit.eval.perplexity import (
    Perplexity,
    beginnings_of,
    losses_of,
    over_documents,
    over_windows,
    windows_of,
)
from lowbit.eval.scores import TaskOptions, TaskScore
from lowbit.load import load_config, load_model, locate, need_tokenizer, set_widths

if TYPE_CHECKING:
    from lowbit.eval.tasks import Tasks

LONGEST_DEFAULT = 2048  # tokens; the papers' context
AFTER_LORA = " after LoRA"  # ends the method of a model that was trained by lowbit preprocess

Progress = Callable[[str, int, int], None]  # what is measured, steps done, steps of


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model, at one width.

    perplexity: by text; infinite or not a number for a model that is broken.
    bits_per_weight: real bits, scales included, of the "linears" and of the whole "model".
    size_bytes: of all weight files.
    seqlen: tokens in a window. windows: by text, how many of them, or of documents.
    seconds: that it took.
    reference: the float model that divergence is measured from; None: it was not.
    divergence: by text; then the text was streamed through the model in float32.
    tasks: by name; those of a folder are called local_NAME.
    bits: the width at which it ran, or the path of a file of widths; None: it ran as it is.
    trained: share of the nested weights that were made for that width; the others are
        interpolated.
    tokens: by text, a hash of its tokens; where those of two models differ, so do their
        tokenizers, and their perplexities cannot be compared.
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
    reference: str | None = None
    divergence: dict[str, Divergence] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    bits: int | str | None = None
    trained: float | None = None
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Tells apart the rows of one call."""
        return labelled(self.model, self.bits)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def labelled(model: str, bits: int | str | None) -> str:
    """A model, and the width at which it runs: "models/nested at 4 bits"."""
    if bits is None:
        return model
    return f"{model} at {bits} bits" if isinstance(bits, int) else f"{model} by {bits}"


def evaluate(  # noqa: PLR0913 (the fields of EvalOptions)
    models: Sequence[str | Path],
    *,
    texts: Sequence[str | Path] = ("wikitext2",),
    seqlen: int | None = None,
    per_document: bool = False,
    limit: int | None = None,
    reference: str | Path | None = None,
    tasks: TaskOptions | None = None,
    bits: Sequence[int | str | Path] = (),
    device_map: Any = None,
    trust_remote_code: bool = False,
    on_progress: Progress = lambda what, done, of: None,
) -> list[Evaluation]:
    """Measures perplexity, divergence, tasks and real bits per weight of models, a row for each.

    At most one model is in memory at a time; with a reference and without tasks none is, they are
    streamed block by block.

    models: folders or hub ids, float or quantized; a folder of MatQuant has a row for each of bits.
    on_progress: called with what is measured, the steps done and the steps of it in all.
    All others are the fields of `lowbit.EvalOptions`, which says what each of them means.

    Raises ValueError for a model, text or task that is not there, and for models whose default
    windows differ in length: their perplexities cannot be compared, so name one seqlen for all.
    """
    options = EvalOptions.of(locals())
    session, names = _Session(options, on_progress), [str(name) for name in models]
    session.check(names)
    rows: list[Evaluation] = []
    for name in names:
        rows += session.rows(name)
        gc.collect()
    return rows


@dataclass(frozen=True)
class _Subject:
    """A model that is measured. texts: of each the windows, or documents. loaded: it and its
    tokenizer; None: it is streamed.
    """

    name: str
    folder: Path
    seqlen: int
    texts: dict[str, list[Tensor]]
    loaded: tuple[Any, Any] | None


class _Session:
    """What the models of one call share: the tasks' rows, the reference's predictions."""

    def __init__(self, options: EvalOptions, on_progress: Progress) -> None:
        self.options = options
        self.on_progress = on_progress
        self.tasks = None if options.tasks is None else _open_tasks(options.tasks)
        self.reference: StreamedLogits | None = None
        self.reference_folder: Path | None = None
        if options.reference is not None:
            self.reference_folder = locate(options.reference, options.trust_remote_code)

    def check(self, names: Sequence[str]) -> None:
        """Raises ValueError for models that cannot stand in one table, before any is measured."""
        if self.options.bits and not any([self.widths(name) != (None,) for name in names]):
            raise ValueError(
                "bits is for 8-bit masters, as matquant makes them: none of these models is one"
            )
        for name in names:
            self._tokenizer(name)
        seqlens = {name: self._seqlen(name) for name in names}
        for name, seqlen in seqlens.items():
            if self.options.texts and seqlen != seqlens[names[0]]:
                raise ValueError(
                    f"{name} would be measured with {seqlen} tokens of context, "
                    f"{names[0]} with {seqlens[names[0]]}: name one --seqlen for all"
                )

    def widths(self, name: str) -> tuple[int | str | None, ...]:
        """What a model is to be run at, checked; None: as it is."""
        folder = locate(name, self.options.trust_remote_code)
        if not self.options.bits or not has_masters(folder):
            return (None,)
        for bits in self.options.bits:
            widths_of(QuantizedFolder(folder), bits)
        return self.options.bits

    def rows(self, name: str) -> list[Evaluation]:
        """A row for each width; the model is loaded once for all."""
        options = self.options
        folder = locate(name, options.trust_remote_code)
        seqlen = self._seqlen(name)
        tokenizer = self._tokenizer(name)
        texts = self._rows(tokenizer, seqlen)
        loaded = None
        if self.tasks is not None or (options.texts and self.reference_folder is None):
            model = load_model(
                folder, options.device_map, trust_remote_code=options.trust_remote_code
            )
            loaded = model, tokenizer
        subject = _Subject(name, folder, seqlen, texts, loaded)
        return [self._row(subject, bits) for bits in self.widths(name)]

    def _row(self, subject: "_Subject", bits: int | str | None) -> Evaluation:
        started = time.perf_counter()
        folder, label = subject.folder, labelled(subject.name, bits)
        found: dict[str, Perplexity] = {}
        distance: dict[str, Divergence] = {}
        scores: dict[str, TaskScore] = {}
        if self.reference_folder is not None:
            found, distance = self._stream(subject, bits)
        if subject.loaded is not None:
            model, tokenizer = subject.loaded
            if bits is not None:
                set_widths(model, folder, bits)
            if self.reference_folder is None:
                for text, rows in subject.texts.items():
                    losses = losses_of(model, rows, self._progress(label))
                    found[text] = self._perplexity(losses, subject.seqlen)
            if self.tasks is not None:
                scores = self.tasks.score(model, tokenizer, self._progress(f"{label}: tasks"))
        size = size_of(folder) if bits is None else size_of_slice(folder, bits)
        return Evaluation(
            model=subject.name,
            method=_method(folder),
            perplexity={text: p.value for text, p in found.items()},
            bits_per_weight={"linears": size.linears, "model": size.model},
            size_bytes=size.bytes,
            seqlen=subject.seqlen,
            windows={text: p.windows for text, p in found.items()},
            per_document=self.options.per_document,
            seconds=round(time.perf_counter() - started, 3),
            reference=self.options.reference,
            divergence=distance,
            tasks=scores,
            bits=bits,
            trained=None if bits is None else _trained(folder, bits),
            tokens={text: _digest(rows) for text, rows in subject.texts.items()},
        )

    def _tokenizer(self, name: str) -> Any:
        trusted = self.options.trust_remote_code
        return need_tokenizer(locate(name, trusted), trusted)

    def _seqlen(self, name: str) -> int:
        folder = locate(name, self.options.trust_remote_code)
        config = load_config(folder, self.options.trust_remote_code)
        context = getattr(config, "max_position_embeddings", None)
        asked = self.options.seqlen
        if context is not None and asked is not None and asked > context:
            raise ValueError(
                f"{name} has a context of {context} tokens; --seqlen {asked} is longer"
            )
        return asked or min(LONGEST_DEFAULT, context or LONGEST_DEFAULT)

    def _rows(self, tokenizer: Any, seqlen: int) -> dict[str, list[Tensor]]:
        """Of every text the windows, or the documents: (tokens,) int64 each."""
        limit = self.options.limit
        if self.options.per_document:
            return {
                text: beginnings_of(evaluation_documents(text, tokenizer), seqlen, limit)
                for text in self.options.texts
            }
        return {
            text: windows_of(evaluation_text(text, tokenizer, seqlen), seqlen, limit)
            for text in self.options.texts
        }

    def _perplexity(self, losses: list[Tensor], seqlen: int) -> Perplexity:
        over = over_documents if self.options.per_document else over_windows
        return over(losses, seqlen)

    def _stream(
        self, subject: "_Subject", bits: int | str | None
    ) -> tuple[dict[str, Perplexity], dict[str, Divergence]]:
        """Perplexity and divergence by text, from one pass over the blocks."""
        name, folder, rows = labelled(subject.name, bits), subject.folder, subject.texts
        reference = self._reference(subject.name, rows, subject.seqlen)
        same = folder.samefile(reference.folder)
        model = reference if same else self._logits(folder, rows, bits)
        found: dict[str, Perplexity] = {}
        distance: dict[str, Divergence] = {}
        first = 0
        for text, of_text in rows.items():
            span = range(first, first + len(of_text))
            distance[text], losses = divergence(reference, model, span, self._progress(name))
            found[text] = self._perplexity(losses, subject.seqlen)
            first += len(of_text)
        return found, distance

    def _reference(self, name: str, rows: dict[str, list[Tensor]], seqlen: int) -> StreamedLogits:
        """The reference on its own tokens, which must be those of every model."""
        folder, asked = self.reference_folder, str(self.options.reference)
        assert folder is not None
        if self.reference is None:
            if "quantization_config" in read_config(folder):
                raise ValueError(f"--reference {asked} is quantized; name the float model")
            self._seqlen(asked)
            self.reference = self._logits(folder, self._rows(self._tokenizer(asked), seqlen))
        mine = [row for of_text in rows.values() for row in of_text]
        theirs = self.reference.rows
        if len(mine) != len(theirs) or not all(map(torch.equal, mine, theirs)):
            raise ValueError(
                f"{name} and {asked} read the text as different tokens: only models of one "
                "tokenizer and one context have a divergence"
            )
        return self.reference

    def _logits(
        self, folder: Path, rows: dict[str, list[Tensor]], bits: int | str | None = None
    ) -> StreamedLogits:
        return StreamedLogits(
            folder,
            [row for of_text in rows.values() for row in of_text],
            _one_device(self.options.device_map),
            self.options.trust_remote_code,
            self.on_progress,
            bits,
        )

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, of: self.on_progress(what, done, of)


def _open_tasks(options: TaskOptions) -> "Tasks":
    try:
        from lowbit.eval.tasks import Tasks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ValueError(
            "tasks are scored by lm-eval, which is not installed: pip install 'lowbit[eval]'"
        ) from None
    return Tasks(options)


def _one_device(device_map: Any) -> torch.device | str:
    """Where blocks are run, one at a time."""
    if device_map is None or device_map == "auto":
        return "cuda:0" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    if isinstance(device_map, dict):
        raise ValueError("a model is compared with a reference on one device: name that one")
    return torch.device(device_map)


def _digest(rows: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(len(row).to_bytes(8, "little") + row.numpy().tobytes())
    return found.hexdigest()[:16]


def _trained(folder: Path, bits: int | str) -> float:
    quantized = QuantizedFolder(folder)
    return trained_share(quantized, widths_of(quantized, bits))


def _method(folder: Path) -> str:
    """The recipe or method that made a quantized model; "float" for others.

    What was trained before says so: that is more than calibration.
    """
    config = read_config(folder)
    section = config.get("quantization_config")
    trained = AFTER_LORA if "lowbit_preprocess" in config else ""
    if section is None:
        return f"float{trained}"
    made_by = section.get("made_by") or {}
    name: str = made_by.get("recipe") or (made_by.get("method") or {}).get("name", "quantized")
    return f"{name}{trained}"
