"""Runs the readers of other programs in an environment of their own (`make test-engines`)."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PYTHON = "LOWBIT_ENGINES"  # path of a Python in which constraints-engines.txt is installed
READERS = Path(__file__).parent / "readers"
Answer = dict[str, Any]


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Answer]:
    """Returns a function that runs a reader on a file or folder."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"{PYTHON} is not set: run make test-engines")

    def run(reader: str, target: Path, **request: Any) -> Answer:
        asked = tmp_path / "request.json"
        asked.write_text(json.dumps({"prompts": [], "texts": []} | request))
        done = subprocess.run(
            [python, str(READERS / f"{reader}.py"), str(target), str(asked)],
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        answer: Answer = json.loads(done.stdout.strip().splitlines()[-1])
        return answer

    return run
