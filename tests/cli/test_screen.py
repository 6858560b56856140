"""The console that commands write to."""

import pytest

from lowbit.cli.screen import console, shortened

pytestmark = pytest.mark.slow


def test_shortened():
    assert shortened(["a", "b", "c"]) == "a, b, c"
    assert shortened(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_a_pipe_gets_wide_lines_without_colours(capsys):
    console().print("x" * 150 + " [red]y[/red] :smile:", style="bold red")
    assert capsys.readouterr().out == "x" * 150 + " [red]y[/red] :smile:\n"
