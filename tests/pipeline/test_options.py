"""Options that are wrong before anything is read."""

import pytest

from lowbit.pipeline.options import choose_device

DEVICES = {
    "gpu": "'gpu' is not known: use cpu, cuda:N or auto",
    "meta": "'meta' is not known",
    "cuda:99": "'cuda:99' was asked for, but torch finds [0-9]+ CUDA devices",
}


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=DEVICES[name]):
        choose_device(name)
