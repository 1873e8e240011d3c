"""Shared helpers for TLS server tests: what is served, and clients on plain sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from certificates import server_context
from peers import MIB, within
from serving import connected, local
from tls_peers import Peer

import anypoll
from anypoll import TLSConnection

MODES = ["handler", "on_request"]
Function = Callable[[Any], Awaitable[Any]]


def secure(**options: Any) -> anypoll.serve:
    return local(ssl_context=server_context(), **options)


@asynccontextmanager
async def talking(server: anypoll.Server) -> AsyncIterator[Peer]:
    """A client behind its handshake."""
    with connected(server) as sock:
        peer = Peer(sock)
        await within(peer.shake_hands())
        yield peer


async def echo_line(stream: TLSConnection) -> None:
    stream.writer.write(bytes(await stream.until(b"\n")))


async def echo_lines(stream: TLSConnection) -> None:
    while True:
        await echo_line(stream)


def echo(mode: str) -> dict[str, Any]:
    return {mode: echo_lines if mode == "handler" else echo_line}


async def rest(peer: Peer) -> bytes:
    """All up to the ``close_notify``."""
    return await peer.receive(8 * MIB)
