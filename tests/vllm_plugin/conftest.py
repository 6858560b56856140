from collections.abc import Iterator

import pytest
from vllm_stand_in import vllm

import lowbit

__all__ = ["vllm"]


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    """Other backends round inputs a little, in different ways for parts of a layer."""
    with lowbit.backend("reference"):
        yield
