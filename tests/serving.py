"""Shared helpers for server tests: clients, and a record of everything that is logged."""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

import anypoll
from anypoll import _epoll

HOST = "127.0.0.1"
local = functools.partial(anypoll.serve, host=HOST, port=0)


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
