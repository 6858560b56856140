"""What the command line sets before torch is imported, and a library does not."""

import os
import subprocess
import sys

import pytest

from lowbit.waiting import is_command_line

LINES = {
    "script": (["python", "/usr/bin/lowbit", "quantize"], True),
    "script of AutoQuIP": (["python", "auto_quip"], True),
    "on Windows": (["python.exe", "lowbit.exe"], True),
    "module": (["python", "-m", "lowbit", "eval"], True),
    "another module": (["python", "-m", "pytest", "lowbit"], False),
    "a user's program": (["python", "quantize.py", "lowbit"], False),
    "interactive": (["python"], False),
    "code": (["python", "-c", "import lowbit"], False),
}


@pytest.mark.parametrize("name", LINES)
def test_tells_the_command_line_from_other_programs(name):
    arguments, expected = LINES[name]
    assert is_command_line(arguments) is expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("users", "expected"), [(None, "passive"), ("active", "active")], ids=["default", "user's"]
)
def test_the_policy_is_set_before_torch_is_imported(users, expected, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, sys; print(os.environ.get('OMP_WAIT_POLICY')); sys.exit()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": users} if users else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-m", "lowbit"], env=environment, capture_output=True, text=True
    )
    assert ran.stdout.strip() == expected, ran.stderr
