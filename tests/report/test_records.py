"""Files that are absent, half there, or edited by somebody."""

import json
from pathlib import Path

import pytest

from lowbit.report.records import LinearRecord, read_events, read_report, read_results


def test_a_folder_that_no_run_made(tmp_path: Path) -> None:
    assert read_report(tmp_path).blocks == {} and read_events(tmp_path) == []


def test_unknown_keys_are_passed_over(tmp_path: Path) -> None:
    block = {"linears": {"up": {"signal_to_noise_db": 7, "new": [1]}}, "tokens": {"up": 3}}
    (tmp_path / "report.json").write_text(json.dumps({"blocks": {"h.0": block}, "more": 1}))
    assert read_report(tmp_path).blocks["h.0"].linears["up"].signal_to_noise_db == 7
    event = {"kind": "surprise", "time": 1.5, "anything": {"goes": 1}}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert [e.kind for e in read_events(tmp_path)] == ["surprise"]


@pytest.mark.parametrize(
    ("record", "exact"), [({"signal_to_noise_db": None}, True), ({}, False), ({"x": 1}, False)]
)
def test_null_decibels_are_an_exact_copy(record: dict[str, object], exact: bool) -> None:
    assert LinearRecord.model_validate(record).exact == exact


EDITED = {
    "report.json": ('{"blocks": [1]}', "report.json was edited: blocks: should be a valid dict"),
    "events.jsonl": ('{"kind": "x", "time": 1}\n{"kind"', "events.jsonl, line 2, cannot be read"),
}


@pytest.mark.parametrize("name", EDITED)
def test_what_was_edited_is_named(name: str, tmp_path: Path) -> None:
    text, message = EDITED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path)
        read_events(tmp_path)


def test_an_event_without_a_time(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"kind": "x"}\n')
    with pytest.raises(ValueError, match="line 1, was edited: time: is missing"):
        read_events(tmp_path)


def test_results_in_the_order_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = {name: {"model": name, "perplexity": {"text": float("inf")}} for name in ("b", "a")}
    path.write_text(json.dumps(rows))  # Infinity, as a broken model has it
    assert [row.model for row in read_results(path)] == ["b", "a"]
    assert read_results(path)[0].perplexity == {"text": float("inf")}
    path.write_text('{"a": {"perplexity": 3}}')
    with pytest.raises(ValueError, match="results.json was not written by lowbit eval --json"):
        read_results(path)
