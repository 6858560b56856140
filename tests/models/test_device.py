"""Names of devices that are not there."""

import pytest

from lowbit.models.device import choose_device

DEVICES = {
    "gpu": "'gpu' is not known: use cpu, cuda:N or auto",
    "meta": "'meta' is not known",
    "cuda:99": "'cuda:99' does not exist: torch finds [0-9]+ CUDA devices",
}


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=DEVICES[name]):
        choose_device(name)
