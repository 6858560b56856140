"""The guard of the fuzzer sees what it is for; `make fuzz` runs the targets themselves."""

import pytest
from fuzz import guard
from fuzz.guard import Hang, guarded


def test_reading_outside_is_seen() -> None:
    with pytest.raises(AssertionError, match="outside the folders"), guarded() as (_, outside):
        (outside / "config.json").read_text()


def test_a_copy_from_outside_is_seen() -> None:
    with pytest.raises(AssertionError, match="has a file from outside"), guarded() as (inside, _):
        (inside / "x").write_text(guard.MARK)


@pytest.mark.slow
def test_a_hang_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SECONDS", 1)
    with pytest.raises(Hang), guarded():
        while True:
            pass
