"""A TLS client independent of anypoll, over a plain socket, and helpers for tests of sessions."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest
from certificates import client_context, server_context
from peers import KIB, send_all

from anypoll import Connection, TLSConnection, _epoll

#: What the certificate is for.
NAME = "anypoll.test"


class Peer:
    """A TLS client, or a server, over a non-blocking socket: it sends what, when, and in which
    pieces the test wants.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None = None,
        *,
        server_side: bool = False,
        name: str | None = NAME,
        **options: Any,
    ) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.context = context or (server_context() if server_side else client_context())
        options["server_hostname"] = None if server_side else name
        self.ssl = self.context.wrap_bio(self.incoming, self.outgoing, server_side, **options)

    async def more(self) -> None:
        while True:
            try:
                data = self.sock.recv(64 * KIB)
            except BlockingIOError:
                await anyio.wait_readable(self.sock)
                continue
            if data:
                self.incoming.write(data)
            else:
                self.incoming.write_eof()
            return

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                return function(*args)
            except ssl.SSLWantReadError:
                await send_all(self.sock, self.outgoing.read())
                await self.more()
            finally:
                with suppress(BrokenPipeError):
                    await send_all(self.sock, self.outgoing.read())

    async def shake_hands(self) -> None:
        await self.call(self.ssl.do_handshake)

    def encrypted(self, data: bytes) -> bytes:
        """A record that was not sent."""
        self.ssl.write(data)
        return self.outgoing.read()

    def close_notify(self) -> bytes:
        with suppress(ssl.SSLWantReadError):
            self.ssl.unwrap()
        return self.outgoing.read()

    async def send(self, data: bytes) -> None:
        await send_all(self.sock, self.encrypted(data))

    async def receive(self, size: int) -> bytes:
        """Exactly so many bytes, or fewer up to the ``close_notify``."""
        got = bytearray()
        with anyio.fail_after(60):
            while len(got) < size:
                try:
                    data = await self.call(self.ssl.read, size - len(got))
                except ssl.SSLZeroReturnError:
                    break
                if not data:
                    break
                got += data
        return bytes(got)


async def both(*functions: Callable[[], Awaitable[Any]]) -> None:
    """All of them at once."""
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for function in functions:
                tasks.start_soon(function)


async def accepted(
    conn: Connection, peer: Peer, context: ssl.SSLContext | None = None, **options: Any
) -> TLSConnection:
    """The server's end of a session, behind the handshake with the peer."""
    made: list[TLSConnection] = []

    async def wrap() -> None:
        made.append(
            await TLSConnection.wrap(
                conn, server_side=True, ssl_context=context or server_context(), **options
            )
        )

    await both(wrap, peer.shake_hands)
    return made[0]


#: For a test of what only a session over memory does in a way of its own.
over_memory = pytest.mark.parametrize("tls_way", ["memory"], indirect=True)

#: For a test of connections with and without TLS.
plain_or_tls = pytest.mark.parametrize("tls_way", ["plain", "memory", "native"], indirect=True)

#: For a test of what only a session of the core does in a way of its own.
in_core = pytest.mark.parametrize("tls_way", ["native"], indirect=True)


def waits(stream: TLSConnection) -> bool:
    """Whether a task waits for input."""
    core = stream.connection._core
    return core.hub.waits(core.number)


def read_ahead(stream: TLSConnection) -> int:
    """How much is read ahead, encrypted or not; nothing is decrypted for that."""
    return len(stream.reader if stream._session.native else stream.connection.reader)


def sends(stream: TLSConnection) -> bool:
    """Whether a task is sending."""
    session: Any = stream._session
    return stream.connection._core._writing if session.native else session.sink._writing


def has_said_goodbye(stream: TLSConnection) -> bool:
    """Whether a ``close_notify`` was sent."""
    session: Any = stream._session
    if not session.native:
        return bool(session.sink.eof_sent)
    return bool(_epoll.conn_status(stream.connection._core.handle) & _epoll.IS_SHUT)


def has_begun(stream: TLSConnection) -> bool:
    """Whether part of a record has come, or something is unread."""
    session: Any = stream._session
    if not session.native:
        return bool(session.engine.has_begun)
    core = stream.connection._core
    return core.session is not None and (core.session.has_begun or core.has_arrived())


class Instead:
    """An ``SSLObject`` of which a test replaces some methods."""

    def __init__(self, ssl_object: ssl.SSLObject) -> None:
        self._ssl = ssl_object

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ssl, name)
