"""What is fuzzed: each target damages an input, and lowbit refuses it in a sentence or is right.

An input may be refused by a ValueError or an OSError. Every other error, a hang, another model than
the one that was written, and access outside the folders are failures. See run.py for long runs.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import quantized
import torch
from damage import BYTES, EDITS, change_json, damage
from fuzz.guard import guarded
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from killing import Disk, Killed, watched
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import lowbit
from lowbit.calibration import Calibration, token_windows
from lowbit.checkpoint.reader import INDEX
from lowbit.cli.options import JobOptions, method_of
from lowbit.formats.widths import choose_widths
from lowbit.methods import RTN
from lowbit.pipeline.allocation import with_plan
from lowbit.pipeline.job import Job
from lowbit.pipeline.options import RunOptions
from lowbit.recipes import load_recipe

REFUSED = (ValueError, OSError)
_KEPT = TemporaryDirectory(prefix="lowbit-fuzz-kept-", ignore_cleanup_errors=True)
ROOT = Path(_KEPT.name)

RECIPE = """
description: A recipe.
method: omniquant
fields: {bits: 4, group_size: 64, overrides: {"*.q_proj": {bits: 8}}}
calibration: {sources: [text.txt], samples: 4, seqlen: 16}
families: {opt: {let: true}}
"""
PLAN = "model.layers.0.mlp.down_proj: 8\nmodel.layers.0.self_attn.q_proj: 4\n"
METHOD_PLAN = """
method: rtn
fields: {group_size: 16, symmetric: true}
overrides: {model.layers.0.mlp.down_proj: {bits: 8}, "*.q_proj": {bits: 3}}
recipe: rtn-w4a16
calibration: {sources: [c4], samples: 128}
budget: '4.5'
linears: 4.4
bytes: 1000
predicted: 0.1
measured:
  {model: llama, sha256: ab12, text: [{name: c4}], samples: 4, seqlen: 16, seed: 0, device: cpu,
   seconds: 1.5, units: [{linears: [a.b], width: 8, losses: {2: 0.5, 4: 0.1}, bytes: {2: 9}}]}
"""
ROWS = '{"text": "aaaa bbbb"}\n{"text": "cccc"}\n' * 20
# Pieces that parsers are known to stumble over.
PIECES = [b"[" * 3000, b"{" * 3000, b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"\0", b"9" * 5000]
PIECES += [b"2024-99-99", b"1: 2\n", b"!!python/object:os.system ", b"&a [*a]", b"NaN", b"1e999"]
PIECES += [b"<95>", b'"', b"\n", b"- ", b": ", b"null", b"-1", b"../../x", b"[]", b"{}", b"\r"]
# (place in the file, number of bytes that are replaced, what replaces them)
TEXT_EDITS = st.lists(
    st.tuples(
        st.integers(0, 400),
        st.integers(0, 30),
        st.one_of(st.sampled_from(PIECES), st.binary(max_size=4)),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, new in edits:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + length :]
    return data


@cache
def float_folder() -> Path:
    """A float model in two shards with an index."""
    folder = Path(shutil.copytree(quantized.source(), ROOT / "float"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = dict(list(tensors.items())[number - 1 :: 2])
        save_file(part, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def change_shard(path: Path, changes: list[tuple[Any, ...]]) -> None:
    data = path.read_bytes()
    for change in changes:
        if len(data) > 8 + int.from_bytes(data[:8], "little"):
            data = damage(data, *change)
    path.write_bytes(data)


def change_header(path: Path, edits: list[tuple[Any, ...]]) -> None:
    """Edits the JSON of a shard's header, which random bytes seldom leave valid."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = path.with_suffix(".header")
    header.write_bytes(data[8:size])
    change_json(header, edits)
    text = header.read_bytes()
    header.unlink()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[size:])


def link(path: Path, outside: Path) -> None:
    """Replaces a file by a link out of the folder."""
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "config.json")


COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
EDIT_LIST = st.lists(EDITS, min_size=1, max_size=3)
BYTE_LIST = st.lists(BYTES, min_size=1, max_size=2)
# What is done to a folder: (kind, number of the file among those that the kind can change, edits)
FOLDER = st.one_of(
    st.tuples(st.sampled_from(["config.json", INDEX, "header"]), st.integers(0, 9), EDIT_LIST),
    st.tuples(st.sampled_from(COMPANIONS), st.integers(0, 9), EDIT_LIST),
    st.tuples(st.just("bytes"), st.integers(0, 9), BYTE_LIST),
    st.tuples(st.just("link"), st.integers(0, 9), st.none()),
    st.tuples(st.just("escape"), st.integers(0, 9), st.none()),
)


def change_folder(folder: Path, outside: Path, what: tuple[str, int, Any]) -> None:
    kind, number, edits = what
    shards = sorted(folder.glob("*.safetensors"))
    shard = shards[number % len(shards)]
    if kind == "header":
        change_header(shard, edits)
    elif kind == "bytes":
        change_shard(shard, edits)
    elif kind == "link":
        files = sorted(p for p in folder.iterdir() if p.is_file())
        link([*files, folder / "tokenizer_extra.json"][number % (len(files) + 1)], outside)
    elif kind == "escape":
        index = json.loads((folder / INDEX).read_text())
        names = list(index["weight_map"])
        target = ("../outside/model.safetensors", str(outside / "model.safetensors"))[number % 2]
        index["weight_map"][names[number % len(names)]] = target
        (folder / INDEX).write_text(json.dumps(index))
    else:
        change_json(folder / kind, edits)


def float_model(what: tuple[str, int, Any]) -> None:
    """A damaged float model is refused, or quantized into a folder that loads."""
    with guarded() as (inside, outside):
        folder = Path(shutil.copytree(float_folder(), inside / "model"))
        change_folder(folder, outside, what)
        try:
            quantized.quantize(folder, inside / "out", "rtn")
        except REFUSED:
            return
        lowbit.load(inside / "out")


def quantized_model(what: tuple[str, int, Any], forged: bool) -> None:
    """A damaged quantized model is refused, or is the same model; with forged hashes, any model."""
    with guarded() as (inside, outside):
        folder = Path(shutil.copytree(quantized.folder(), inside / "out"))
        change_folder(folder, outside, what)
        if forged and what[0] in ("header", "bytes", *COMPANIONS):
            quantized.seal(folder)
        try:
            model, _ = lowbit.load(folder)
        except REFUSED:
            return
        logits = quantized.logits(model)
        assert forged or torch.equal(logits, wanted()), "another model than was written"


@cache
def wanted() -> torch.Tensor:
    return quantized.logits(lowbit.load(quantized.folder())[0])


@cache
def whole() -> dict[str, bytes]:
    return quantized.contents(quantized.folder())


@cache
def unfinished(last: int) -> Path:
    """An OUT whose run was killed before one of its changes to the disk."""
    out = ROOT / f"unfinished-{last}"
    try:
        with watched(Disk(out, last)):
            quantized.quantize(quantized.source(), out, "rtn")
    except Killed:
        pass
    return out


def run_state(last: int, number: int, what: tuple[str, Any]) -> None:
    """A run continues to the bytes of a run that was not interrupted, or refuses."""
    kind, edits = what
    with guarded() as (inside, outside):
        out = Path(shutil.copytree(unfinished(last), inside / "out", symlinks=True))
        files = sorted(p for p in out.rglob("*") if p.is_file())
        if not files:
            return
        path = files[number % len(files)]
        if kind == "link":
            link(path, outside)
        elif kind == "text":
            path.write_bytes(edited(path.read_bytes(), edits))
        elif path.suffix == ".json":
            change_json(path, edits)
        try:
            quantized.quantize(quantized.source(), out, "rtn")
        except REFUSED:
            return
        found = quantized.contents(out)
        for name, content in whole().items():
            if name.startswith("run/") and name.endswith(".json"):  # kept if it says the same
                assert json.loads(found[name]) == json.loads(content), f"{name} says another thing"
            elif name not in ("report.html", "report.json"):
                assert found.get(name) == content, f"{name} is not what was to be written"


def recipe(edits: list[tuple[int, int, bytes]]) -> None:
    """A recipe file is refused, or gives a method or its refusal."""
    with guarded() as (inside, _):
        path = inside / "recipe.yaml"
        path.write_bytes(edited(RECIPE.encode(), edits))
        try:
            read = load_recipe(str(path))
            method_of(read.method, read, "llama", {})
        except REFUSED as error:
            assert str(error)


def plan(edits: list[tuple[int, int, bytes]]) -> None:
    """A plan of widths is refused, or gives a width to every layer."""
    layers = {"model.layers.0.mlp.down_proj": 8, "model.layers.0.self_attn.q_proj": 8}
    with guarded() as (inside, _):
        path = inside / "plan.yaml"
        path.write_bytes(edited(PLAN.encode(), edits))
        try:
            widths = choose_widths(layers, path)
        except REFUSED as error:
            assert str(error)
            return
        assert widths.keys() == layers.keys()
        assert all(type(width) is int and 2 <= width <= 8 for width in widths.values())


def method_plan(edits: list[tuple[int, int, bytes]]) -> None:
    """A plan of a method is refused, or gives a method that has the fields of the plan."""
    with guarded() as (inside, _):
        path = inside / "plan.yaml"
        path.write_bytes(edited(METHOD_PLAN.encode(), edits))
        job = Job(quantized.source(), RTN(), None, RunOptions(device="cpu"))
        try:
            planned = with_plan(job, path)
            chosen = JobOptions(plan=path).chosen(quantized.source())
        except REFUSED as error:
            assert str(error)
            return
        assert chosen.method.name == planned.method.name == "rtn"
        assert planned.allocation is not None
        for linear in job.selection.linears:
            assert 2 <= planned.method.at(linear).weight_bytes(8, 8)


def calibration(suffix: str, edits: list[tuple[int, int, bytes]]) -> None:
    """A calibration file is refused, or gives windows of tokens that the model has."""
    with guarded() as (inside, _):
        path = inside / f"text{suffix}"
        path.write_bytes(edited(ROWS.encode(), edits))
        options = Calibration(sources=(str(path),), samples=2, seqlen=16)
        try:
            windows = token_windows(options, tokenizer(), 64, inside / "cache")
        except REFUSED as error:
            assert str(error)
            return
        assert windows.tokens.shape == (2, 16)
        assert 0 <= int(windows.tokens.min()) and int(windows.tokens.max()) < 101


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(quantized.source())


RUN_CHANGES = st.one_of(
    st.tuples(st.just("json"), EDIT_LIST),
    st.tuples(st.just("text"), TEXT_EDITS),
    st.tuples(st.just("link"), st.none()),
)
# Each target with the strategies of its arguments.
TARGETS: dict[str, tuple[Callable[..., None], dict[str, SearchStrategy[Any]]]] = {
    "float_model": (float_model, {"what": FOLDER}),
    "quantized_model": (quantized_model, {"what": FOLDER, "forged": st.booleans()}),
    "run_state": (
        run_state,
        {"last": st.integers(3, 34), "number": st.integers(0, 40), "what": RUN_CHANGES},
    ),
    "recipe": (recipe, {"edits": TEXT_EDITS}),
    "plan": (plan, {"edits": TEXT_EDITS}),
    "method_plan": (method_plan, {"edits": TEXT_EDITS}),
    "calibration": (
        calibration,
        {"suffix": st.sampled_from([".jsonl", ".txt", ".json", ".parquet"]), "edits": TEXT_EDITS},
    ),
}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
