"""Write a folder in one go: shards one after another, then the index, then config.json."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint.reader import INDEX
from lowbit.checkpoint.writer import explained, save_tensors, write_json

ConfigJson = dict[str, Any] | Callable[[Path], dict[str, Any]]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
# What says what is in a folder, and would say it wrongly of another; so does every *.index.json.
OURS = ("config.json", "report.json", "report.html", "events.jsonl")


def write_folder(
    out: Path,
    shards: Iterable[Mapping[str, Tensor]],
    count: int,
    config: ConfigJson,
    companions: Path,
) -> None:
    """shards: `count` dictionaries of tensors by name on disk, made one at a time.

    config: config.json, or what makes it from the folder in which the shards then lie.
    companions: a folder whose other files (tokenizer, licences) are copied. Raises ValueError when
    `out` is there already, or the disk is full; then nothing of `out` remains.
    """
    with written_aside(out) as aside:
        aside.mkdir(parents=True)
        _write(aside, shards, count, config)
        for path in companions_of(companions):
            shutil.copyfile(path, aside / path.name)


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """The folder to make, which becomes `out` when all went well; else nothing of it remains.

    Raises ValueError when `out` is there already, or the disk is full.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: choose another folder, or remove it")
    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with explained(out):
            yield aside
            aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def companions_of(folder: Path) -> list[Path]:
    """Files that go with a folder's weights into another: tokenizer, licences and the like."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    kept = [path for path in files if path.suffix not in WEIGHTS and path.name not in OURS]
    return [path for path in kept if not path.name.endswith(".index.json")]


def _write(
    folder: Path, shards: Iterable[Mapping[str, Tensor]], count: int, config: ConfigJson
) -> None:
    placed: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_tensors(folder / name, dict(tensors))
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    write_json(folder / INDEX, index)
    write_json(folder / "config.json", config(folder) if callable(config) else config)
