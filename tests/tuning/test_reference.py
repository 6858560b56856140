"""Which hash of a float model a folder states."""

from typing import Any

import pytest

from lowbit.tuning.reference import stated_hash

RTN = {"name": "rtn"}
CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "quantized": ({"method": RTN, "model": "ab"}, "ab"),
    "a slice": ({"method": RTN, "model": "ab", "sliced": {}}, "ab"),
    "converted: the hash is that of codes": (
        {"method": {"name": "converted from gptq"}, "model": "ab"},
        None,
    ),
    "no hash": ({"method": RTN}, None),
    "nothing": ({}, None),
    "damaged": ({"method": 3, "model": 5}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_hash_of_a_float_model(case: str) -> None:
    made_by, wanted = CASES[case]
    assert stated_hash(made_by) == wanted
