"""A file of torch.save that is damaged, or holds more than tensors, is refused in one sentence."""

import io
import pickle
import random
from pathlib import Path

import pytest
import torch

from lowbit.checkpoint.pickled import read_pickled


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
    with pytest.raises(ValueError, match=r"state\.bin holds more than tensors, or is damaged: ."):
        read_pickled(path)


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
