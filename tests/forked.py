"""Runs parts of a test in processes of their own, which begin as copies of this one."""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any


def forked(run: Callable[[], Any]) -> tuple[int, int]:
    """Starts a process; returns its number, and a pipe from which `result_of` reads."""
    reader, writer = os.pipe()
    number = os.fork()
    if number:
        os.close(writer)
        return number, reader
    try:
        answer: Any = {"result": run()}
    except BaseException as error:
        traceback.print_exc(file=sys.stdout)
        answer = {"error": f"{type(error).__name__}: {error}"}
    try:
        os.write(writer, json.dumps(answer, default=str).encode())
    finally:
        os._exit(0)


def result_of(started: tuple[int, int]) -> Any:
    """Waits for a process; returns {"result": ...}, {"error": "..."} or {"signal": number}."""
    number, reader = started
    with open(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(number, 0)
    return json.loads(text) if text else {"signal": os.WTERMSIG(status)}


def processes(count: int, run: Callable[[int], Any]) -> list[Any]:
    """Runs run(index) in processes as torchrun would start them; returns what `result_of` does."""
    return [result_of(each) for each in started(count, run)]


def started(count: int, run: Callable[[int], Any]) -> Sequence[tuple[int, int]]:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]

    def member(index: int) -> Any:
        os.environ |= {"RANK": str(index), "WORLD_SIZE": str(count), "LOCAL_RANK": str(index)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        return run(index)

    return [forked(lambda index=index: member(index)) for index in range(count)]
