"""lowbit verify MODEL, and lowbit inspect --verify, which is the same."""

import json
import shutil

import pytest
from quantized import edit_json, seal

pytestmark = pytest.mark.slow

SHARD = "model-00003-of-00007.safetensors"


@pytest.fixture
def copy(rtn, tmp_path):
    return shutil.copytree(rtn, tmp_path / "copy")


@pytest.mark.parametrize("command", [["verify"], ["inspect", "--verify"]])
def test_every_file_is_named(command, lowbit, rtn):
    *lines, last = lowbit(*command, rtn).stdout.splitlines()
    names = ["config.json", *sorted(path.name for path in rtn.glob("*.safetensors"))]
    section = json.loads((rtn / "config.json").read_text())["quantization_config"]
    assert "tokenizer.json" in section["other_files"]
    names += sorted(section["other_files"])
    assert [line.split() for line in lines] == [[name, "ok"] for name in names]
    assert last.startswith(f"{rtn} is complete: 42 quantized linears, ")


def flip(folder):
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)


def cut(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-7])


def edit(folder):
    edit_json(folder / "config.json", lambda config: config.update(hidden_size=1))


def undigested(folder):
    edit_json(folder / "config.json", lambda c: c["quantization_config"].pop("digest") and None)


def escape(folder):
    """A malicious file name leads out of the folder."""

    def rename(config):
        files = config["quantization_config"]["files"]
        files[f"../{folder.name}/{SHARD}"] = files.pop(SHARD)

    edit_json(folder / "config.json", rename)


DAMAGE = {
    "is damaged: its sha256 differs": flip,
    "bytes, not": cut,
    "is missing": lambda folder: (folder / SHARD).unlink(),
    "was edited after quantization": edit,
    "has no digest": undigested,
    "is not listed in config.json": lambda folder: shutil.copy(
        folder / SHARD, folder / "x.safetensors"
    ),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_file_is_reported_and_the_rest_is_checked(problem, lowbit, copy):
    DAMAGE[problem](copy)
    result = lowbit("inspect", copy, "--verify", code=1)
    wrong = [line for line in result.stdout.splitlines() if not line.endswith("  ok")]
    assert len(wrong) == 1 and problem in wrong[0]
    assert "files that differ from what lowbit wrote: 1;" in result.stderr


def test_names_that_lead_elsewhere(lowbit, copy):
    escape(copy)
    seal(copy)
    problem = lowbit("inspect", copy, "--verify", code=1).stdout
    assert f"../copy/{SHARD}  is missing" in problem and f"{SHARD}  is not listed" in problem


def test_files_that_do_not_fit_together(lowbit, copy):
    """Files that match their hashes, but do not fit together."""

    def drop(config):
        modules = config["quantization_config"]["modules"]
        modules["model.layers.{0-5}.mlp.up_proj"]["bits"] = 3

    edit_json(copy / "config.json", drop)
    seal(copy)
    result = lowbit("inspect", copy, "--verify", code=1)
    assert "up_proj" in result.stderr and "is complete" not in result.stdout


def test_folders_without_hashes(lowbit, rtn, copy):
    config = json.loads((rtn / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    assert (
        "has no quantization_config: restore config.json"
        in lowbit("inspect", copy, "--verify", code=1).stderr
    )


@pytest.mark.parametrize(("files", "came"), [(None, "missing"), ({}, "empty"), ([1], "not an obj")])
def test_a_config_that_lists_no_files(files, came, lowbit, copy):
    def change(config):
        section = config["quantization_config"]
        del section["files"]
        if files is not None:
            section["files"] = files

    edit_json(copy / "config.json", change)
    error = lowbit("inspect", copy, "--verify", code=1).stderr
    assert f"quantization_config.files is {came}" in error and "Copy config.json from" in error
