"""A file of torch.save that is damaged, or holds more than tensors, is refused in one sentence."""

import io
import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from lowbit.checkpoint.pickled import read_pickled, read_state


class Anything:
    """What a file of torch.save may not hold."""


def saved(thing: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


STATE = {"weight": torch.arange(6.0).view(2, 3), "names": ["a", 1]}
BAD = {
    "nothing": b"",
    "a text": b"hello, this is no file of torch",
    "a pickle of an object": pickle.dumps(Anything),
    "a number": pickle.dumps(3),
    "an object": saved(Anything),
    "a cut file": saved(STATE)[:-200],
    "a file cut in its directory": saved(STATE)[:-20],
    "a cut old file": saved(STATE, zipped=False)[:-40],
    "only the first bytes of a zip": b"PK\x03\x04" + bytes(100),
    "an opcode with nothing on the stack": b"\x80\x02.",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_was_saved_is_read(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(saved(STATE, zipped))
    found = read_pickled(path)
    assert torch.equal(found["weight"], STATE["weight"]) and found["names"] == STATE["names"]


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_bad_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"state\.bin holds more than tensors, or is dam"
    ) as caught:
        read_pickled(path)
    message = str(caught.value)
    assert "save model.state_dict()" in message and message.isprintable()
    assert "weights_only" not in message and "allowlist" not in message


def test_code_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.bin").write_bytes(BAD["an object"])
    with pytest.raises(ValueError, match=r"it names \S*Anything, which is no tensor"):
        read_pickled(tmp_path / "state.bin")


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.bin")
    with pytest.raises(ValueError, match=r"state\.bin is a named pipe, but must be a file"):
        read_pickled(tmp_path / "state.bin")


# What is no state_dict, and what is said of it.
NO_STATES = {
    "a list": ([torch.ones(2)], "holds a list, not a dictionary of tensors"),
    "nothing": ({}, "holds nothing, not a dictionary"),
    "one level deeper": (
        {"state_dict": STATE},
        "'state_dict' is a dictionary, but must be a tensor",
    ),
    "a counter": ({"step": 5}, "'step' is a whole number, but must be"),
    "numbers as names": ({1: torch.ones(1)}, "1 is no text"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, r"cannot hold \(float32, sparse_coo\)"),
    "no values": ({"a": torch.ones(3, device="meta")}, "without values"),
    "complex": ({"a": torch.ones(3, dtype=torch.complex64)}, r"cannot hold \(complex64, strided"),
}


@pytest.mark.parametrize("name", NO_STATES)
def test_what_is_no_state(name: str, tmp_path: Path) -> None:
    held, says = NO_STATES[name]
    path = tmp_path / "state.bin"
    path.write_bytes(saved(held))
    with pytest.raises(ValueError, match=rf"state\.bin:? .*{says}.*save model\.state_dict\(\)"):
        read_state(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes(zipped: bool, tmp_path: Path) -> None:
    """Either the file is read all the same, or the refusal is a ValueError."""
    path, whole, dice = tmp_path / "state.bin", saved(STATE, zipped), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            read_pickled(path)
        except ValueError as error:
            assert "state.bin" in str(error)
