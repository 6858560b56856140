"""How many values are worked on at once, and less of them for miniatures."""

import pytest

from lowbit.kernels.at_once import at_once, less_at_once


def test_a_run_takes_all_and_a_miniature_less() -> None:
    assert at_once(100) == 100
    with less_at_once(16):
        assert at_once(100) == 6 and at_once(3) == 1
    assert at_once(100) == 100


def test_an_error_ends_it() -> None:
    with pytest.raises(RuntimeError), less_at_once(4):
        raise RuntimeError
    assert at_once(8) == 8
