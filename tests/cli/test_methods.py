"""lowbit methods."""

import pytest

from lowbit.methods import METHODS

pytestmark = pytest.mark.slow


def test_one_line_each(lowbit):
    lines = [line.rstrip() for line in lowbit("methods").stdout.splitlines()]
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(len(line) <= 80 and line.endswith(".") for line in lines)
    assert lines[0].endswith(METHODS["rtn"].about.splitlines()[0])


@pytest.mark.parametrize("name", METHODS)
def test_one_method_in_80_columns(lowbit, name):
    text = lowbit("methods", name).stdout
    assert all(len(line) <= 80 for line in text.splitlines())
    joined, method = " ".join(text.split()), METHODS[name]
    for field, facts in method.model_fields.items():
        star = "*" if field in method.per_linear else ""
        assert f" {field}{star}: " in joined and facts.description in joined
    assert joined.startswith(f"{name}: {' '.join(method.about.split())}")
    assert f"lowbit.methods.{method.__name__}(FIELD=VALUE)" in joined


def test_types_defaults_and_recipes(lowbit):
    text = " ".join(lowbit("methods", "gptq").stdout.split())
    assert "bits*: integer from 2 to 8; default 4" in text
    assert "group_size*: integer of at least 1, or None; default None" in text
    assert 'damping: "auto", or number above 0; default "auto"' in text
    assert "gptq-w2a16, gptq-w2a16-g64, gptq-w2a16-g64-paper" in text and "rtn-w2a16" not in text


def test_an_unknown_method(lowbit):
    error = lowbit("methods", "omnquant", code=1).stderr
    assert error.startswith("error: 'omnquant' is not a method: did you mean 'omniquant'?")
    assert error.count("\n") == 1
