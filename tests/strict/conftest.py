"""Everything in this folder runs with the strict device."""

from collections.abc import Iterator

import pytest
import strict_device
import torch


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    if not strict_device.HAS_API:  # CI does not allow this skip
        pytest.skip(f"torch {torch.__version__} has no backends in Python")
    with strict_device.available():
        yield
