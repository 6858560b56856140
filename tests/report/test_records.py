"""Reads files that are missing, incomplete or edited."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
from commands import call

from lowbit.checkpoint.accept import accept
from lowbit.events import EpochFinished
from lowbit.report import read_run
from lowbit.report.records import LoggedEvent, read_events, read_report, read_results


def test_a_folder_that_no_run_made(tmp_path: Path) -> None:
    assert read_report(tmp_path).blocks == {} and read_events(tmp_path) == []


def test_unknown_keys_are_passed_over(tmp_path: Path) -> None:
    block = {"linears": {"up": {"signal_to_noise_db": 7, "new": [1]}}, "tokens": {"up": 3}}
    (tmp_path / "report.json").write_text(json.dumps({"blocks": {"h.0": block}, "more": 1}))
    assert read_report(tmp_path).blocks["h.0"].linears["up"].signal_to_noise_db == 7
    unknown = {"kind": "surprise", "time": 1.5, "anything": {"goes": 1}}
    place = {"block": "h.0", "index": 0, "of": 2}
    known = {"kind": "epoch", "time": 2, "epoch": 1, "loss": 0.5, "more": [1]} | place
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in (unknown, known)))
    assert read_events(tmp_path) == [
        LoggedEvent(1.5, None),
        LoggedEvent(2.0, EpochFinished(epoch=1, loss=0.5, **place)),
    ]


EDITED = {
    "report.json": (
        '{"blocks": [1]}',
        "report.json cannot be used: blocks: should be a mapping.*: restore the file, or delete",
    ),
    "events.jsonl": (
        '{"kind": "x", "time": 1}\n{"kind"',
        "events.jsonl, line 2, cannot be read as JSON: column 8: .*; restore the file",
    ),
}


@pytest.mark.parametrize("name", EDITED)
def test_what_was_edited_is_named(name: str, tmp_path: Path) -> None:
    text, message = EDITED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path)
        read_events(tmp_path)


NOT_OURS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda report: report.clear(),
    "no block": lambda report: report["blocks"].clear(),
    "another fallback": lambda report: report["fallbacks"].update(
        {"model.layers.0": "more simply"}
    ),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_a_report_that_lowbit_did_not_write(name: str, tmp_path: Path) -> None:
    """It would be shown as if the errors of the layers were unknown, or others."""
    folder = Path(shutil.copytree(quantized.folder(), tmp_path / "out"))
    quantized.edit_json(folder / "report.json", NOT_OURS[name])
    message = r"out/report.json has \d+ bytes, not [\d,]+. .*: restore the file, or delete it"
    with pytest.raises(ValueError, match=message):
        read_run(folder)
    assert "--accept report.json" in call("inspect", folder, code=1).stderr
    accept(folder, ["report.json"])
    read_run(folder)
    call("inspect", folder)


LINES = {
    '{"kind": "x"}': "time: is missing",
    '{"kind": "x", "time": 1e999}': "time: should be a valid number",
    '{"kind": "done", "time": 1}': "out: is missing",
    '{"kind": "warning", "time": 1, "text": [1]}': "text: should be a valid string",
    "[1]": "should be a mapping of names to values",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_event(line: str, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=f"events.jsonl, line 1, cannot be used: .*{LINES[line]}"):
        read_events(tmp_path)


# Written before reports had classes: names of keys, and where they stood, were others.
EARLIER = Path(__file__).parent / "earlier"


@pytest.mark.parametrize("name", [path.name for path in sorted(EARLIER.iterdir())])
def test_files_of_an_earlier_version(name: str) -> None:
    written = json.loads((EARLIER / name / "report.json").read_text())
    report, events = read_report(EARLIER / name), read_events(EARLIER / name)
    assert report.fallbacks == written["given_up"] and report.left_float == written["left_float"]
    for block, facts in written["blocks"].items():
        found = report.blocks[block]
        for linear, known in facts["linears"].items():
            for key in known:
                slices = {
                    int(bits): decibels for bits, decibels in known.get("slices_db", {}).items()
                }
                wanted = slices if key == "slices_db" else known[key]
                assert getattr(found.linears[linear], key) == wanted
        for key in ("loss_rtn", "loss_before", "loss_after"):
            assert getattr(found, key) == facts.get(key)
        curve = facts.get("training", {}).get("curve", [])
        assert found.training is None or found.training.curve == curve
    lines = (EARLIER / name / "events.jsonl").read_text().splitlines()
    for line, event in zip(map(json.loads, lines), events, strict=True):
        assert event.event is not None and line["time"] == event.time
        known = {key: value for key, value in line.items() if value is not None and key != "time"}
        assert event.event.to_json() == known


def test_results_in_the_order_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = {name: {"model": name, "perplexity": {"text": float("inf")}} for name in ("b", "a")}
    path.write_text(json.dumps(rows))  # Infinity, as a broken model has it
    assert [row.model for row in read_results(path)] == ["b", "a"]
    assert read_results(path)[0].perplexity == {"text": float("inf")}
    path.write_text('{"a": {"perplexity": 3}}')
    with pytest.raises(ValueError, match="results.json was not written by lowbit eval --json"):
        read_results(path)
