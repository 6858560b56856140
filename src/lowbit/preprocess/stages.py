"""Folder to folder: quantize, dequantize, train, merge. Stopped anywhere, the same call goes on."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.calibration import Calibration
from lowbit.checkpoint import CheckpointReader, CheckpointWriter
from lowbit.checkpoint.folder import write_folder
from lowbit.checkpoint.reader import read_json
from lowbit.convert import dequantize
from lowbit.events import OnEvent, RunFinished, TrainingStarted
from lowbit.load import load_model
from lowbit.methods import Method
from lowbit.models.locate import locate
from lowbit.models.skeleton import memory_names, unfuse_experts
from lowbit.models.source import SourceModel
from lowbit.models.tokenizer import need_tokenizer
from lowbit.pipeline import RunOptions, quantize
from lowbit.pipeline.options import Place, choose_device
from lowbit.preprocess.options import LoRA
from lowbit.preprocess.packing import packed_windows
from lowbit.version import __version__

LONGEST_DEFAULT = 2048  # tokens; what the paper trains with
MARK = "lowbit_preprocess"  # the key of config.json under which OUT says how it was made


def preprocess(  # noqa: PLR0913 (the options of a run)
    model: str | Path,
    out: str | Path,
    first_pass: Method,
    lora: LoRA | None = None,
    calibration: Calibration | None = None,
    *,
    device: str = "auto",
    restart: bool = False,
    streams: Place = "auto",
    allow_float: Sequence[str] = (),
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    lm_head_bits: int | None = None,
    start_from: str | Path | None = None,
    dry_run_block: bool | None = None,
    trust_remote_code: bool = False,
    cache: str | Path | None = None,
    recipe: str | None = None,
    on_event: OnEvent = lambda event: None,
) -> Path:
    """Trains a model so that it loses less when it is quantized, and returns the float folder.

    The model is quantized, low-rank adapters are trained on what that left, and both are merged
    into a float model, which `quantize` takes. This is training, not calibration: it needs the
    whole model in memory, and results that used it should say so. Needs peft: pip install
    'lowbit[train]'. If it is interrupted, the same call continues it from `OUT.work`.

    model: a folder or a hub id.
    out: the folder to write, which must not exist; its config.json says what was done.
    first_pass: the method that quantizes the model before it is trained.
    lora: the adapters and their training; None: the defaults of `LoRA`.
    calibration: the text of the first pass, and the seed of everything; None: the defaults.
    on_event: called with each `Event` of the run.
    All others are the fields of `lowbit.RunOptions`, which says what each of them means.

    Raises ValueError for what the caller can mend.
    """
    chosen = RunOptions.of(locals())
    lora, calibration = lora or LoRA(), calibration or Calibration()
    train = _training()
    trained_on = choose_device(chosen.device)
    if trained_on.index:  # Trainer knows no other than the first
        raise ValueError(
            f"device {chosen.device!r}: training runs on the first GPU; to make this one it, set "
            f"CUDA_VISIBLE_DEVICES={trained_on.index}, and name cuda:0"
        )
    folder, out = locate(model, chosen.trust_remote_code), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already: choose another folder, or remove it")
    source = SourceModel(folder, chosen.allow_float, chosen.trust_remote_code)
    windows = _windows(source, lora, calibration.seed, chosen)
    made_by = {
        "model": source.reader.digest(),
        "first_pass": first_pass.signature(),
        "calibration": calibration.model_dump(mode="json"),
        "lora": lora.model_dump(mode="json"),
        "text": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "device": trained_on.type,
        "versions": {"lowbit": __version__, "torch": torch.__version__},
    }
    work = out.with_name(f"{out.name}.work")
    with CheckpointWriter(work, made_by, 1, chosen.restart):
        first, dense = work / "first", work / "dense"
        stage = chosen.model_copy(update={"restart": False})
        quantize(model, first, first_pass, calibration, **dict(stage), on_event=on_event)
        if not dense.exists():
            dequantize(first, dense, verify=False, trust_remote_code=chosen.trust_remote_code)
        restored = _float_model(dense, chosen)
        linears = [
            f"{block}.{linear}"
            for block in source.block_names
            for group in source.groups(block)
            for linear in group.linears
        ]
        training, held_out = windows[: lora.windows], windows[lora.windows :]
        on_event(TrainingStarted(steps=lora.steps, tokens=training.numel()))
        state, seed = work / "trainer", calibration.seed
        report = train(restored, linears, training, held_out, lora, state, seed, on_event)
        config = {**read_json(dense / "config.json"), MARK: {**made_by, "training": report}}
        reader = CheckpointReader(dense)
        shards, code = _shards(restored, reader), chosen.trust_remote_code
        write_folder(out, shards, len(reader.files), config, folder, code)
    shutil.rmtree(work, ignore_errors=True)
    on_event(RunFinished(out=str(out)))
    return out


def _training() -> Callable[..., dict[str, Any]]:
    """`lora.train`, which needs peft; it is imported before any work is done."""
    try:
        from lowbit.preprocess.lora import train
    except ImportError as error:
        raise ValueError(f"{error}; it is installed with: pip install 'lowbit[train]'") from error
    return train


def _windows(source: SourceModel, lora: LoRA, seed: int, options: RunOptions) -> Tensor:
    """Those that are trained on, and then those held out: (windows, seqlen) int64"""
    context = getattr(source.config, "max_position_embeddings", None)
    seqlen = lora.seqlen or min(LONGEST_DEFAULT, context or LONGEST_DEFAULT)
    if context and seqlen > context:
        raise ValueError(f"lora.seqlen is {seqlen:,} tokens: the model's context is {context:,}")
    tokenizer = need_tokenizer(source.folder, options.trust_remote_code)
    count = lora.windows + lora.held_out
    try:
        return packed_windows(lora.sources, count, seqlen, tokenizer, seed)
    except ValueError as error:
        raise ValueError(f"the text to train on, lora.sources: {error}") from error


def _float_model(dense: Path, options: RunOptions) -> PreTrainedModel:
    """Whole, in float32, one linear per matrix."""
    model = load_model(dense, dtype=torch.float32, trust_remote_code=options.trust_remote_code)
    unfuse_experts(model)
    model.config.use_cache = False
    return model.to(choose_device(options.device))  # type: ignore[arg-type]


def _shards(model: PreTrainedModel, reader: CheckpointReader) -> Iterator[dict[str, Tensor]]:
    """The model's tensors by their stock names, in the shards and dtypes of the dense folder."""
    tensors = model.state_dict()
    names = memory_names(model, reader.tensors)
    for file in reader.files:
        stored = {disk: info for disk, info in reader.tensors.items() if info.file == file}
        yield {disk: tensors[names[disk]].to(info.dtype) for disk, info in stored.items()}
