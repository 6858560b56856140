"""Listens on a port until it is interrupted."""

import errno
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from lowbit.server.app import LOOPBACK, Service
from lowbit.server.worker import Worker

GRACE = 5  # seconds that running answers get to end after an interrupt


def listener(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address; clients cannot connect yet.

    port: 0 to 65535; 0: any free one.

    Raises ValueError if the port is taken, or the address is not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "another program listens there: choose another --port"
        elif error.errno == errno.EACCES:
            reason = "the system allows ports below 1024 to its administrator only: choose another"
        else:
            reason = f"{error.strerror}: --host must be an address of this machine"
        raise ValueError(f"cannot listen on {host}:{port}: {reason}") from None
    return bound


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches a host."""
    return host in (*LOOPBACK, "::1") or host.startswith("127.")


def serve(
    bound: socket.socket,
    worker: Worker,
    name: str,
    host: str,
    on_ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Answers requests until SIGINT or SIGTERM; answers in the making get some seconds to end.

    bound: from `listener`.
    worker: generates the text.
    name: of the model, by which clients call it.
    on_ready: called with the port once clients can connect.
    """
    with worker:
        service = Service(worker, name, is_loopback(host))
        config = uvicorn.Config(
            service.app(),
            log_level="error",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE,
        )
        bound.listen()
        on_ready(bound.getsockname()[1])
        with suppress(KeyboardInterrupt):  # uvicorn raises it again once it has stopped
            uvicorn.Server(config).run(sockets=[bound])
