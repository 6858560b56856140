"""Each measurement has a column, and all models are compared with the first."""

from pathlib import Path
from typing import Any

import pytest

from lowbit.report.records import ResultRecord
from lowbit.report.results import flatten, result_tables

BITS = {"linears": 2.281, "model": 3.74}
ROW: dict[str, Any] = {"bits_per_weight": BITS, "size_bytes": 2_331_048, "seqlen": 512}


def row(model: str, **measured: Any) -> ResultRecord:
    return ResultRecord(**ROW | {"model": model, "method": "m"} | measured)


def test_perplexity_and_sizes() -> None:
    found = [
        row("models/a", perplexity={"x/t.txt": 20.0}, windows={"x/t.txt": 1024}),
        row("out/b", perplexity={"x/t.txt": 25.0}),
        row("out/c", perplexity={"x/t.txt": float("inf")}),
        row("out/d", perplexity={"x/t.txt": None}, size_bytes=None, bits_per_weight={}),
        row("out/e", perplexity={"x/t.txt": 30.0}, tokens={"x/t.txt": "of another tokenizer"}),
    ]
    (table,) = result_tables(found, Path("out/b"))
    assert table.head == [
        ("perplexity", "t.txt"),
        ("change", ""),
        ("bits", "linears"),
        ("bits", "model"),
        ("size", ""),
    ]
    assert [r.cells for r in table.rows] == [
        ["20.000", "", "2.28", "3.74", "2.33 MB"],
        ["25.000", "+25.0 %", "2.28", "3.74", "2.33 MB"],
        ["∞", "", "2.28", "3.74", "2.33 MB"],
        ["", "", "", "", ""],
        ["30.000", "", "2.28", "3.74", "2.33 MB"],
    ]
    assert [(r.model, r.marked) for r in table.rows] == [
        ("a", False),
        ("b", True),
        ("c", False),
        ("d", False),
        ("e", False),
    ]
    assert table.conditions == [
        "Perplexity over non-overlapping windows of 512 tokens: 1,024 of t.txt."
    ]


def test_divergence_follows_its_text() -> None:
    near = {"t": {"kl": 0.00012, "agreement": 0.984, "tokens": 9}}
    far = {"t": {"kl": 1.23456, "agreement": 0.5, "tokens": 9}}
    facts = {"perplexity": {"t": 20.0}, "windows": {"t": 8}, "reference": "models/a"}
    found = [row("a", divergence=near, **facts), row("b", divergence=far, **facts), row("c")]
    (table,) = result_tables(found, Path("b"))
    assert table.head[:4] == [
        ("perplexity", "t"),
        ("change", ""),
        ("KL", "t"),
        ("same top token", "t"),
    ]
    assert [r.cells[2:4] for r in table.rows] == [
        ["0.00012", "98.4 %"],
        ["1.2346", "50.0 %"],
        ["", ""],
    ]
    assert table.conditions[1] == "KL(a || model) in nats per token, on the same tokens."


def test_tasks_have_a_table_of_their_own() -> None:
    task = {"metrics": {"acc": 0.41, "ppl": 12.5}, "stderr": {"acc": 0.02}, "rows": 100}
    tasks = {
        "arc": task | {"available": 500, "few_shot": 0, "cut": 2},
        "arc_easy": task | {"part_of": "arc"},
    }
    _, table = result_tables([row("a", tasks=tasks), row("b")], Path("b"))
    assert table.head == [("arc", "acc"), ("arc", "ppl")]
    assert [r.cells for r in table.rows] == [["41.0 ± 2.0", "12.5"], ["", ""]]
    assert table.conditions == [
        "Tasks in % ± standard error, 0-shot: arc 100 rows of 500.",
        "Rows that were longer than the context and lost their beginning: 2 of arc.",
    ]


def test_measurements_that_are_not_known_here_are_shown_too() -> None:
    found = [row("a", flops={"layer_1": {"up": 5}}, speed=float("nan")), row("b", speed=12345.6)]
    (table,) = result_tables(found, Path("b"))
    assert table.head[:2] == [("flops", "layer_1 up"), ("speed", "")]
    assert [r.cells[:2] for r in table.rows] == [["5", "not a number"], ["", "12,346"]]


@pytest.mark.parametrize("value", [True, "7", None, [7], {}])
def test_what_is_no_number_has_no_column(value: object) -> None:
    assert flatten({"a": value, "b": 1}) == {("b",): 1.0}


def test_nothing_measured() -> None:
    assert result_tables([], Path("b")) == []
