import re
import subprocess
import sys
from pathlib import Path

import pytest
import quantized

from lowbit.checkpoint import QuantizedFolder

RUN = [sys.executable, "-c", "from lowbit.cli.auto_quip import main; main()"]


def auto_quip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, check=False)


def test_the_seven_flags(tmp_path: Path) -> None:
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
    done = auto_quip(*given, "--merge_suv")
    assert done.returncode == 0, done.stderr
    entries = QuantizedFolder(out).entries
    assert {entry["codebook"] for entry in entries.values()} == {"D4"}
    assert not any("down_proj" in name for name in entries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name", "a"], "quant_dir"),
        (["--model_name", "a", "--quant_dir", "b", "--bits", "2"], "No such option"),
        (["--model_name", "a", "--quant_dir", "b", "--nsamples", "0"], "nsamples"),
        (["--model_name", "", "--quant_dir", "b", "--codebook", "E9"], "error: .*E8P12"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str) -> None:
    done = auto_quip(*arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr)
