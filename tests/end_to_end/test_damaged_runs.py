"""Every damage to OUT is named, and made good by the same call, or refused; never passed over.

Each test damages a copy of a run, finished or not, runs the same call again, and compares all bytes
with those of the run that nothing happened to.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
from commands import call as lowbit
from safetensors.torch import load_file, save_file

from lowbit import load
from lowbit.checkpoint.records import sealed
from lowbit.events import Event, Warned

pytestmark = pytest.mark.slow

METHOD = "omniquant"  # which learns, so that OUT has all kinds of files
OUTSIDE, FIRST, LAST = (f"model-0000{i}-of-00003" for i in (1, 2, 3))
FILES = {
    "shard outside the blocks": f"{OUTSIDE}.safetensors",
    "shard of a block": f"{FIRST}.safetensors",
    "learned": f"learned/{FIRST}.safetensors",
    "index": "model.safetensors.index.json",
    "tokenizer": "tokenizer.json",
    "tokenizer's config": "tokenizer_config.json",
    "generation": "generation_config.json",
    "report": "report.json",
    "config": "config.json",
    "record": f"run/{FIRST}.json",
    "signature": "run/signature.json",
}
NO_HASH = ("record", "signature")  # which loading does not read
RECORDS = (OUTSIDE, FIRST, LAST)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


ACCIDENTS: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "delete": Path.unlink}
BOTH = pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    return quantized.contents(quantized.folder(method=METHOD))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized.folder(method=METHOD), tmp_path / "out"))


def interrupt(out: Path) -> None:
    """Leaves what a run leaves that is stopped in its last block."""
    for name in ("config.json", f"{LAST}.safetensors", f"learned/{LAST}.safetensors"):
        (out / name).unlink()
    (out / "run" / f"{LAST}.json").unlink()


def again(out: Path) -> list[str]:
    """Runs the same call; returns its warnings, in which no path of OUT stands."""
    seen: list[Event] = []
    quantized.quantize(quantized.source(), out, METHOD, on_event=seen.append)
    warnings = [event.text for event in seen if isinstance(event, Warned) and event.block is None]
    assert not [text for text in warnings if str(out) in text]
    return warnings


def same(out: Path, whole: dict[str, bytes]) -> None:
    found = quantized.contents(out)
    kept = {name for name in found if name.endswith(".changed")}  # what a user may have edited
    assert found.keys() - kept == whole.keys()
    assert [name for name in whole if found[name] != whole[name]] == []


@BOTH
@pytest.mark.parametrize("accident", ACCIDENTS)
@pytest.mark.parametrize("file", FILES)
def test_the_same_call_makes_good(
    file: str, accident: str, finished: bool, out: Path, whole: dict[str, bytes]
) -> None:
    name = FILES[file]
    if not finished:
        interrupt(out)
    if not (out / name).exists():
        return  # config.json of an unfinished run
    ACCIDENTS[accident](out / name)
    try:
        warnings = again(out)
    except ValueError as error:
        assert file == "signature" and str(out) in str(error)  # nobody knows which run that was
        return
    if finished and file == "record":  # nothing reads it again unless its shard is damaged too
        assert warnings == []
        flip(out / FILES["shard of a block"])
        assert again(out)
    same(out, whole)
    hashed = file not in NO_HASH if finished else file.startswith(("shard", "learned", "record"))
    gone = accident == "delete" and (file in ("config", "record"))
    if hashed and not gone:
        assert [text for text in warnings if text.startswith(name)], warnings
        assert again(out) == []


@pytest.mark.parametrize("accident", ACCIDENTS)
@pytest.mark.parametrize("file", FILES)
def test_load_and_inspect(file: str, accident: str, out: Path) -> None:
    name = FILES[file]
    ACCIDENTS[accident](out / name)
    unread = file in (*NO_HASH, "report", "learned")
    if unread:
        load(out)
    else:
        with pytest.raises(ValueError, match=str(out)) as refusal:
            load(out)
        what = (name, "shard model-", "unfinished", "no weights")  # the index names a shard
        assert any(word in str(refusal.value) for word in what)
    if file in NO_HASH:
        lowbit("inspect", out, "--verify")
    else:
        shown = lowbit("inspect", out, "--verify", code=1)
        assert name in shown.output or "is unfinished" in shown.output


@BOTH
def test_swapped_shards(finished: bool, out: Path, whole: dict[str, bytes]) -> None:
    a, b, other = out / f"{OUTSIDE}.safetensors", out / f"{FIRST}.safetensors", out / "other"
    if not finished:
        interrupt(out)
    a.rename(other), b.rename(a), other.rename(b)
    assert len([text for text in again(out) if "it is made again" in text]) == 2
    same(out, whole)


VALUES: list[Any] = [None, [], {}, "", 0, -1, "../outside/shard.safetensors", ["a"], {"a": 1}]


@pytest.mark.exhaustive
@pytest.mark.parametrize("forged", [False, True], ids=["accident", "forged"])
@pytest.mark.parametrize("record", RECORDS)
def test_every_field_of_a_record(
    record: str, forged: bool, out: Path, whole: dict[str, bytes]
) -> None:
    """A forged record has the right digest, and is found because it does not fit its shard."""
    path = out / "run" / f"{record}.json"
    content = json.loads(path.read_text())
    outside = out.parent / "outside"
    outside.mkdir()
    shutil.copy(out / f"{FIRST}.safetensors", outside / "shard.safetensors")
    for field in [*content, None]:
        for value in VALUES if field == "file" or field is None else VALUES[:3]:
            (out / "config.json").unlink(missing_ok=True)
            edited = value if field is None else {**content, field: value}
            if forged and isinstance(edited, dict):
                edited = sealed({k: v for k, v in edited.items() if k != "digest"})
            if edited == content:
                continue
            path.write_text(json.dumps(edited))
            warnings = again(out)
            assert warnings and path.name.removesuffix(".json") in warnings[0], (field, value)
            same(out, whole)
            path.write_text(json.dumps(content))


@pytest.mark.parametrize("value", ["{}", "[]", "null", "{", '{"quantization_config": {}}'])
def test_an_unfinished_run_with_a_config(value: str, out: Path, whole: dict[str, bytes]) -> None:
    interrupt(out)
    (out / "config.json").write_text(value)
    assert again(out)[0].startswith("config.json is not the config.json of a quantized folder")
    same(out, whole)


def test_the_config_of_another_run(out: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """A folder that fits together, but not to the run whose signature it has."""
    other = quantized.folder(method="rtn")
    for path in other.glob("*.*"):
        shutil.copy(path, out / path.name)
    warnings = again(out)
    assert warnings[0].startswith("config.json describes another run")
    same(out, whole)


def test_a_signature_that_was_edited_to_match(out: Path) -> None:
    """Records say to which run they belong, so that no folder is made of two."""
    interrupt(out)
    wanted = quantized.folder(method="rtn")
    shutil.copy(wanted / "run" / "signature.json", out / "run" / "signature.json")
    quantized.quantize(quantized.source(), out, "rtn")
    found, all_bytes = quantized.contents(out), quantized.contents(wanted)
    assert [name for name in all_bytes if found[name] != all_bytes[name]] == []


@pytest.mark.parametrize("value", ["[]", "null", "{", "7"])
def test_a_signature_that_says_nothing(value: str, out: Path) -> None:
    (out / "run" / "signature.json").write_text(value)
    before = quantized.contents(out)
    with pytest.raises(ValueError, match=r"signature.json is damaged.*--restart"):
        again(out)
    assert quantized.contents(out) == before


def swap_words(out: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        words = tokenizer["model"]["vocab"]
        words["A"], words["B"] = words["B"], words["A"]

    quantized.edit_json(out / "tokenizer.json", swap)


def test_swapped_words_are_refused_and_may_be_accepted(out: Path) -> None:
    swap_words(out)
    with pytest.raises(ValueError, match=r"has .*: restore it.*--accept tokenizer.json"):
        load(out)
    lowbit("inspect", out, "--accept", "tokenizer.json")
    load(out)
    lowbit("inspect", out, "--verify")
    assert again(out) == []
    error = lowbit("inspect", out, "--accept", f"{FIRST}.safetensors", code=1).stderr
    assert "has no hash in" in error and "tokenizer.json" in error


def test_an_edit_is_kept_where_the_same_call_undoes_it(out: Path, whole: dict[str, bytes]) -> None:
    edited = out / "generation_config.json"
    edited.write_text('{"temperature": 0.5}')
    assert len(again(out)) == 1
    same(out, whole)
    assert "0.5" in (out / "generation_config.json.changed").read_text()


def test_what_was_added_is_kept_aside(out: Path, whole: dict[str, bytes]) -> None:
    (out / "chat_template.jinja").write_text("mine")
    kept = "chat_template.jinja.changed"
    assert [text for text in again(out) if text.endswith(f"; it is now {kept}")]
    assert (out / kept).read_text() == "mine"
    (out / kept).unlink()
    same(out, whole)


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "report.html"])
def test_what_users_add_is_theirs(name: str, out: Path, whole: dict[str, bytes]) -> None:
    (out / name).write_text("mine")
    load(out)
    assert again(out) == []
    assert (out / name).read_text() == "mine"


def test_folders_without_these_hashes_load(out: Path) -> None:
    """As lowbit wrote them before other files than shards had hashes."""

    def forget(config: dict[str, Any]) -> None:
        del config["quantization_config"]["other_files"]

    quantized.edit_json(out / "config.json", forget)
    quantized.seal(out)
    swap_words(out)
    load(out)
    lowbit("inspect", out, "--verify")
    assert again(out) == []


def test_a_run_that_cannot_be_trusted_at_its_end(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that keeps other bytes than it was given is noticed before "done" is said."""
    from lowbit.pipeline import run

    interrupt(out)
    copied = run.copy_companions

    def damaging(*arguments: Any) -> Any:
        shard = out / f"{FIRST}.safetensors"
        tensors = load_file(shard)
        next(tensor for tensor in tensors.values() if tensor.is_floating_point()).flatten()[0] += 1
        save_file(tensors, shard, metadata={"format": "pt"})
        return copied(*arguments)

    monkeypatch.setattr(run, "copy_companions", damaging)
    with pytest.raises(ValueError, match=f"{FIRST}.safetensors is damaged.*just been written"):
        again(out)
    assert not (out / "config.json").exists()


def in_the_way(name: str) -> Callable[[Path], Any]:
    """Puts a folder where lowbit writes a file."""

    def put(out: Path) -> None:
        (out / name).unlink()
        (out / name).mkdir()

    return put


def swap_records(out: Path) -> None:
    a, b, other = out / "run" / f"{FIRST}.json", out / "run" / f"{LAST}.json", out / "other"
    a.rename(other), b.rename(a), other.rename(b)
    (out / "config.json").unlink()


def empty_records(out: Path) -> None:
    for record in RECORDS:
        (out / "run" / f"{record}.json").write_text("null")
    (out / "config.json").unlink()


def half(name: str) -> Callable[[Path], Any]:
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:300])


def as_utf_16(name: str) -> Callable[[Path], Any]:
    return lambda out: (out / name).write_text((out / name).read_text(), encoding="utf-16")


def stating(**fields: Any) -> Callable[[Path], Any]:
    def edit(config: dict[str, Any]) -> None:
        config["quantization_config"].update(fields)

    return lambda out: quantized.edit_json(out / "config.json", edit)


# What is done to a finished OUT, and what the same call says: a warning, after which all is as it
# was, or (with !) why it refuses.
OTHER: dict[str, tuple[Callable[[Path], Any], str]] = {
    "events a folder": (in_the_way("events.jsonl"), "!events.jsonl cannot be written .*: remove"),
    "lock a folder": (in_the_way("run/lock"), "!run/lock cannot be written .*: remove what is"),
    "shard a folder": (in_the_way(f"{FIRST}.safetensors"), "!cannot be written .*: remove what is"),
    "config a folder": (in_the_way("config.json"), "!config.json cannot be written .*: remove"),
    "index a folder": (in_the_way(FILES["index"]), "!index.json cannot be written .*: remove"),
    "run a file": (
        lambda out: (shutil.rmtree(out / "run"), (out / "run").write_text("")),
        "!holds no record of a run",
    ),
    "run gone": (lambda out: shutil.rmtree(out / "run"), "!holds no record of a run"),
    "a single file beside": (
        lambda out: shutil.copy(quantized.source() / "model.safetensors", out),
        "!model.safetensors was not written by lowbit, .*: remove it",
    ),
    "learned gone": (lambda out: shutil.rmtree(out / "learned"), "learned/.* is missing"),
    "records null": (empty_records, "is no record of a shard"),
    "records swapped": (swap_records, "belongs to another run or shard"),
    "config half": (half("config.json"), "is not the config.json of a quantized folder"),
    "config UTF-16": (as_utf_16("config.json"), "is not the config.json of a quantized folder"),
    "version": (stating(version=99), "is not the config.json of a quantized folder"),
    "no digest": (stating(digest=None), "config.json was edited after quantization"),
    "no files": (stating(files={}), "config.json was edited after quantization"),
    "report a list": (
        lambda out: (out / "report.json").write_text("[]"),
        "report.json has 2 bytes",
    ),
    "bytes behind": (
        lambda out: (out / f"{FIRST}.safetensors").open("ab").write(b"xx"),
        f"{FIRST}.safetensors has .* bytes, not",
    ),
    "signature half written": (lambda out: (out / "run/signature.json.part").touch(), ""),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_damages(name: str, out: Path, whole: dict[str, bytes]) -> None:
    damage, says = OTHER[name]
    damage(out)
    if says.startswith("!"):
        with pytest.raises(ValueError, match=says[1:]) as refusal:
            again(out)
        assert str(out) in str(refusal.value) and "Errno" not in str(refusal.value)
        return
    warnings = again(out)
    assert any(re.search(says, text) for text in warnings) or not says, warnings
    (out / "run/signature.json.part").unlink(missing_ok=True)
    same(out, whole)
    load(out)
