import re
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import quantized

from lowbit.checkpoint import QuantizedFolder
from lowbit.cli.auto_quip import main

pytestmark = pytest.mark.slow


def auto_quip(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the script."""
    monkeypatch.setattr(sys, "argv", ["auto_quip", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_console_script_is_main() -> None:
    (found,) = entry_points(group="console_scripts", name="auto_quip")
    assert found.load() is main


def test_the_seven_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    flags = {
        "model_name": str(quantized.source()),
        "quant_dir": str(out),
        "codebook": "D4",
        "dataset": quantized.text(),
        "nsamples": "2",
        "quip_tune_iters": "1",
        "modules_to_not_convert": "down_proj",
    }
    given = [part for name, value in flags.items() for part in (f"--{name}", value)]
    assert auto_quip(monkeypatch, *given, "--merge_suv") == 0
    entries = QuantizedFolder(out).entries
    assert {entry["codebook"] for entry in entries.values()} == {"D4"}
    assert not any("down_proj" in name for name in entries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name", "a"], "quant_dir"),
        (["--model_name", "a", "--quant_dir", "b", "--bits", "2"], "No such option"),
        (["--model_name", "a", "--quant_dir", "b", "--nsamples", "0"], "nsamples"),
        (["--model_name", "a", "--quant_dir", "b", "--codebook", "E9"], "error: .*E8P12"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert auto_quip(monkeypatch, *arguments) != 0
    assert re.search(message, capsys.readouterr().err)
