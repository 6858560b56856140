"""Calls commands in this process on the example Llama; each folder is quantized once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner
from zoo import MODELS

from lowbit.cli import app

MODEL = MODELS / "llama-mini"
STORY = "Once upon a time there was a little fox who lived in the wood. She had a red ball. "


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Moves the home folder, in which token windows are cached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@contextmanager
def _loud_again() -> Iterator[None]:
    """Restores the warnings that commands turn off, since other tests need them."""
    transformers_level, hub_level = (
        transformers_logging.get_verbosity(),
        hub_logging.get_verbosity(),
    )
    try:
        yield
    finally:
        transformers_logging.set_verbosity(transformers_level)
        transformers_logging.enable_progress_bar()
        hub_logging.set_verbosity(hub_level)
        enable_progress_bars()


@pytest.fixture(scope="session")
def lowbit() -> Callable[..., Any]:
    """lowbit("inspect", folder) returns exit_code, stdout and stderr, and checks for tracebacks."""

    def call(*arguments: object, code: int = 0) -> Any:
        with _loud_again():
            result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

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
