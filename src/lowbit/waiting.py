"""Makes the idle threads of the command line sleep instead of spin.

The threads of OpenMP, by which torch computes, spin while they wait for each other. On a busy
machine they keep the thread that they wait for from running: OmniQuant on a small model took ten
times as long. OpenMP reads its settings when torch is imported, so this comes before.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("lowbit", "auto_quip")


def is_command_line(arguments: Sequence[str]) -> bool:
    """Whether this process is one of our commands. arguments: as in sys.orig_argv"""
    scripts = {Path(argument).stem for argument in arguments[1:2]}
    return arguments[1:3] == ["-m", "lowbit"] or not scripts.isdisjoint(COMMANDS)


# A program that imports lowbit as a library makes this choice itself.
if is_command_line(sys.orig_argv):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
