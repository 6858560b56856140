"""What lowbit serve refuses before it loads a model, and that nothing else loads the server."""

import ast
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import quantized
from commands import call

import lowbit
from lowbit.server.run import is_loopback

pytestmark = pytest.mark.slow


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        yield bound.getsockname()[1]


def test_a_port_that_is_taken(taken: int) -> None:
    error = call("serve", quantized.folder(), "--port", taken, code=1).stderr
    assert f"cannot listen on 127.0.0.1:{taken}: another program listens there" in error


ERRORS = {
    "no such host": (("--host", "no.such.host.invalid"), "--host must be an address of this"),
    "another machine": (("--host", "192.0.2.1"), "--host must be an address of this machine"),
    "one width": (("--port", 0, "--bits", 4), "only layers made by matquant have several widths"),
    "no device": (("--port", 0, "--device", "cuda:7"), "device 'cuda:7' does not exist"),
}


@pytest.mark.parametrize(("options", "sentence"), ERRORS.values(), ids=ERRORS)
def test_options(options: tuple[object, ...], sentence: str) -> None:
    error = call("serve", quantized.folder(), *options, code=1).stderr
    assert sentence in error and len(error.splitlines()) == 1


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "is empty: name the folder" in call("serve", tmp_path, code=1).stderr
    assert "there is no such folder" in call("serve", tmp_path / "none", code=1).stderr


def test_which_hosts_are_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.0.1", "example.com")))


def test_other_commands_do_not_load_the_server() -> None:
    """Only functions import it, so that lowbit works and starts fast without its libraries."""
    package = Path(lowbit.__file__).parent
    for path in package.rglob("*.py"):
        if "server" in path.parts:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("lowbit.server"), path
            elif isinstance(node, ast.Import):
                assert not [one for one in node.names if "lowbit.server" in one.name], path
