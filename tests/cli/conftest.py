"""Calls commands in this process on the example Llama; each folder is quantized once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import call
from zoo import MODELS

MODEL = MODELS / "llama-mini"
STORY = "Once upon a time there was a little fox who lived in the wood. She had a red ball. "


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Moves the home folder, in which token windows are cached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def lowbit() -> Callable[..., Any]:
    """lowbit("inspect", folder) returns exit_code, stdout and stderr, and checks for tracebacks."""
    return call


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(STORY * 30)
    return path


@pytest.fixture(scope="session")
def learning(story: Path) -> tuple[object, ...]:
    """Options with which OmniQuant takes one second."""
    brief = ("--samples", 2, "--seqlen", 64, "--set", "epochs=1")
    return ("--recipe", "omniquant-w2a16-g64", "--calibration", story, *brief)


@pytest.fixture(scope="session")
def rtn(lowbit: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "rtn"
    lowbit("quantize", MODEL, out, "--recipe", "rtn-w4a16-g128")
    return out


@pytest.fixture(scope="session")
def learned(
    lowbit: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    learning: tuple[object, ...],
) -> Path:
    out = tmp_path_factory.mktemp("out") / "learned"
    lowbit("quantize", MODEL, out, *learning)
    return out


@pytest.fixture(scope="session")
def nested(
    lowbit: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, story: Path
) -> Path:
    out = tmp_path_factory.mktemp("out") / "nested"
    few = ("--samples", 1, "--seqlen", 32, "--calibration", story)
    joint = ("--set", "rounding=joint", "--set", "min_tokens=1")
    quick = ("--set", "lwc=false", "--set", "epochs=0", "--set", "group_size=64")
    lowbit("quantize", MODEL, out, "--method", "matquant", *few, *quick, *joint)
    return out
