"""Shared helpers for server tests: handlers, clients, faults, and a record of the log."""

from __future__ import annotations

import errno
import functools
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
from anyio import EndOfStream
from peers import holds, pollers_have_looked, read_all, read_to_end, send_all, settle, within

import anypoll
from anypoll import Connection, _epoll

HOST = "127.0.0.1"
MODES = ["handler", "on_request"]
FOR_EVER = 1e6
local = functools.partial(anypoll.serve, host=HOST, port=0)


async def once(conn: Connection) -> None:
    await conn.send(await conn.receive())


async def echo(conn: Connection) -> None:
    with suppress(EndOfStream):
        while True:
            await once(conn)


async def stubborn(_conn: Connection) -> None:
    """Ends only if it is cancelled."""
    await anyio.sleep_forever()


def echoing(mode: str) -> dict[str, Any]:
    """The same service in both modes, as an argument of ``serve()``."""
    return {mode: {"handler": echo, "on_request": once}[mode]}


def connected(server: anypoll.Server) -> socket.socket:
    """A plain non-blocking socket, connected to the server's first address."""
    [address, *_] = server.addresses
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


@asynccontextmanager
async def client(server: anypoll.Server) -> AsyncIterator[socket.socket]:
    """The same, closed at the end."""
    with connected(server) as sock:
        yield sock


async def is_served(sock: socket.socket, data: bytes = b"x") -> None:
    """By one who echoes."""
    await send_all(sock, data)
    assert await within(read_all(sock, len(data))) == data


async def turned_away(sock: socket.socket) -> bool:
    """Closed without a word; by a reset if there was unread input."""
    with suppress(ConnectionResetError):
        return await within(read_to_end(sock)) == b""
    return True


async def ends(server: anypoll.Server, **reasons: int) -> None:
    """Until so many connections have ended, for these reasons."""
    await holds(lambda: sum(server.statistics().closed.values()) == sum(reasons.values()))
    assert dict(server.statistics().closed) == reasons
    assert server.connections == ()


def gone(conn: anypoll.Connection) -> bool:
    """Whether it is known that the peer has ended its side, or reset the connection."""
    return bool(_epoll.conn_status(conn._core.handle) & _epoll.IS_GONE)


@pytest.fixture(name="log", autouse=True)
def all_is_accounted_for(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Whatever is logged above debug level must have been expected: :func:`errors` clears it."""
    caplog.set_level(logging.DEBUG, "anypoll")
    yield caplog
    found = [r.getMessage() for r in caplog.get_records("call") if r.levelno > logging.DEBUG]
    caplog.clear()  # records hold connections
    caplog.get_records("call").clear()
    assert found == []


def errors(log: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was logged above debug level, and is accounted for now."""
    found = [r for r in log.records if r.name.startswith("anypoll") and r.levelno > logging.DEBUG]
    log.clear()
    return found


@pytest.fixture(name="fault")
def faults_are_undone() -> Iterator[Callable[..., None]]:
    """`set_fault`, undone after the test."""
    yield _epoll.set_fault
    _epoll.clear_faults()


@pytest.fixture(name="deaf")
def no_event_comes(
    fault: Callable[..., None],
    by_threads: None,  # a loop that drives would find its poller readable for ever
) -> Callable[[], Awaitable[None]]:
    """Makes the pollers deaf until the faults are cleared: only the loop learns anything."""

    async def deafen() -> None:
        fault("EPOLL_WAIT", errno.EINTR, times=-1)
        await pollers_have_looked()
        await settle()  # the loop, too, with what they had told before

    return deafen
