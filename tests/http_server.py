"""A real HTTP server as a subprocess, for tests of HTTP clients.

It is also the program that runs in that process: hypercorn, with an application that answers as
those tests need.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE = 64 * 1024


@dataclass(frozen=True)
class HTTPServer:
    """Where it listens: HTTP on TCP and on a UNIX socket, HTTPS on TCP."""

    port: int
    path: str
    tls_port: int


@contextlib.contextmanager
def serving(
    directory: Path, env: dict[str, str], *, certificate: Any, **settings: Any
) -> Iterator[HTTPServer]:
    """Runs the server. It listens from the start: the sockets are made here and inherited.

    :param certificate: trustme's
    :param settings: hypercorn's
    """
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    for n, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(directory / "chain.pem", append=n > 0)
    path = str(directory / "http")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.create_server(("127.0.0.1", 0)) as tls,
    ):
        unix.bind(path)
        unix.listen()
        options = {
            "insecure_bind": [f"fd://{tcp.fileno()}", f"fd://{unix.fileno()}"],
            "bind": [f"fd://{tls.fileno()}"],
            "certfile": str(directory / "chain.pem"),
            "keyfile": str(directory / "key.pem"),
            **settings,
        }
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            env=env,
            stdin=subprocess.PIPE,
            pass_fds=[tcp.fileno(), unix.fileno(), tls.fileno()],
        )
        server = HTTPServer(tcp.getsockname()[1], path, tls.getsockname()[1])
    with process:
        yield server
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()  # which ends it


# --- the program ---------------------------------------------------------------------------------


async def application(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application."""
    if scope["type"] == "http":
        name, _, argument = scope["path"].removeprefix("/").partition("/")
        await globals()[f"on_{name}"](argument, receive, send)


async def begin(send: Any, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def body(send: Any, data: bytes, *, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def on_hello(_argument: str, receive: Any, send: Any) -> None:
    await begin(send)
    await body(send, b"hello")


async def on_last(_argument: str, receive: Any, send: Any) -> None:
    """The server closes the connection after this one."""
    await begin(send, (b"connection", b"close"))
    await body(send, b"last")


async def on_bytes(size: str, receive: Any, send: Any) -> None:
    await begin(send)
    for start in range(0, int(size), PIECE):
        await body(send, bytes([start // PIECE % 251]) * min(PIECE, int(size) - start), more=True)
    await body(send, b"")


def bytes_of(size: int) -> bytes:
    """What `on_bytes` sends."""
    return b"".join(bytes([n % 251]) * PIECE for n in range(-(-size // PIECE)))[:size]


async def on_hash(_argument: str, receive: Any, send: Any) -> None:
    digest = hashlib.sha256()
    more = True
    while more:
        message = await receive()
        digest.update(message.get("body", b""))
        more = message.get("more_body", False)
    await begin(send)
    await body(send, digest.hexdigest().encode())


async def on_echo(_argument: str, receive: Any, send: Any) -> None:
    """Each piece as it comes."""
    await begin(send)
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        await body(send, message.get("body", b""), more=more)


released = asyncio.Event()


async def on_drip(_argument: str, receive: Any, send: Any) -> None:
    """A first piece; the second when somebody asks for its release."""
    released.clear()
    await begin(send)
    await body(send, b"first", more=True)
    await released.wait()
    await body(send, b"second")


async def on_release(_argument: str, receive: Any, send: Any) -> None:
    released.set()
    await on_hello("", receive, send)


async def on_never(_argument: str, receive: Any, send: Any) -> None:
    """No answer, and nothing of a body is taken, until the client has gone."""
    await asyncio.Event().wait()


def main() -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    def end_with_the_tests() -> None:
        sys.stdin.read()
        os._exit(0)

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # clients that are gone are no news
    threading.Thread(target=end_with_the_tests, daemon=True).start()
    config = Config.from_mapping(json.loads(sys.argv[1]), loglevel="ERROR")
    asyncio.run(serve(application, config))


if __name__ == "__main__":
    main()
