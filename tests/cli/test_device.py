"""--device."""

import pytest

from lowbit.cli.device import device_map

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("gpus", "device", "wanted"),
    [
        (0, "auto", None),
        (0, "cpu", None),
        (2, "auto", "auto"),
        (2, "cpu", None),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_device_map(monkeypatch, gpus, device, wanted):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert device_map(device) == wanted


def test_unknown():
    with pytest.raises(ValueError, match="'gpu' is not known: use cpu, cuda:N or auto"):
        device_map("gpu")
