"""The idle timeout: no byte in or out for that long, whatever the handler does."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import EndOfStream
from peers import (
    arrive,
    holds,
    opened,
    read_to_end,
    reset,
    send_all,
    send_until_full,
    served,
    within,
)

import anypoll
from anypoll import AnypollAttribute, Connection, IdleTimeout

pytestmark = pytest.mark.anyio

Wire = tuple[Connection, socket.socket]
SOON = 0.001


@pytest.fixture(params=["tcp", "unix"])
async def wire(request: pytest.FixtureRequest) -> AsyncIterator[Wire]:
    """A connection, and the plain socket at its other end."""
    async with opened(request.param) as both:
        yield both


async def ended(conn: Connection) -> None:
    await holds(lambda: not conn.is_active)


async def test_a_silent_connection_is_ended(wire: Wire) -> None:
    """L48."""
    conn, peer = wire
    conn.idle_timeout = SOON
    assert conn.idle_timeout == SOON
    await ended(conn)
    assert await within(read_to_end(peer)) == b""
    assert conn.fileno() >= 0  # it is ended and not closed
    assert not conn.at_eof


async def test_what_is_buffered_can_still_be_read(wire: Wire) -> None:
    conn, peer = wire
    await arrive(conn, peer, b"some words")
    assert await conn.peek(4) == b"some"
    conn.idle_timeout = SOON
    await ended(conn)
    assert conn.reader.buffered == 10
    assert await conn.next(5) == b"some "
    with pytest.raises(IdleTimeout):
        await within(conn.next(6))
    assert await conn.receive() == b"words"
    with pytest.raises(IdleTimeout):
        await conn.receive()


async def test_pending_output_is_dropped(wire: Wire) -> None:
    conn, peer = wire
    conn.writer.write(b"never sent")
    conn.idle_timeout = SOON
    await holds(lambda: not conn.is_active and not len(conn.writer))
    await conn.aclose()
    assert await within(read_to_end(peer)) == b""


async def test_it_works_while_python_is_busy(wire: Wire) -> None:
    """The event loop does not run here, and the peer is told all the same."""
    conn, peer = wire
    conn.idle_timeout = SOON
    peer.settimeout(30)
    assert peer.recv(1) == b""
    assert not conn.is_active


async def outlives_a_silent_one(wire: Wire, direction: str) -> bool:
    """Whether a connection with traffic outlives one without, which was opened after it. `False`
    if there was a time without traffic for half of the timeout, on a busy machine.
    """
    conn, peer = wire
    pauses = []
    async with opened() as (silent, _):
        before = time.monotonic()
        conn.idle_timeout = silent.idle_timeout = 0.4
        with suppress(IdleTimeout, BrokenPipeError, ConnectionResetError):
            while silent.is_active and conn.is_active:
                if direction == "in":
                    await send_all(peer, b"x")
                    await within(conn.skip(1))
                else:
                    await conn.send(b"x")
                    await anyio.wait_readable(peer)
                    peer.recv(1)
                pauses.append(time.monotonic() - before)
                before += pauses[-1]
                await anyio.sleep(0.01)
    if conn.is_active:
        return True
    assert max([*pauses, time.monotonic() - before]) > 0.2
    return False


@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_traffic_keeps_a_connection_alive(kind: str, direction: str) -> None:
    """Longer than a silent one lives. An attempt in which this process stood still for long proves
    nothing, and is repeated.
    """
    done = False
    while not done:
        async with opened(kind) as wire:
            done = await outlives_a_silent_one(wire, direction)


@pytest.mark.parametrize("never", [None, float("inf"), 1e12])
async def test_it_can_be_taken_back(wire: Wire, never: float | None) -> None:
    conn, peer = wire
    async with opened() as (other, _):
        conn.idle_timeout = 0.05
        conn.idle_timeout = never
        assert conn.idle_timeout == never
        other.idle_timeout = 0.06
        await ended(other)
    assert conn.is_active
    await send_all(peer, b"x")
    assert await within(conn.receive()) == b"x"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (-1, ValueError),
        (float("nan"), ValueError),
        (float("-inf"), ValueError),
        ("1", TypeError),
        (b"", TypeError),
    ],
)
async def test_nonsense_is_refused_and_changes_nothing(
    wire: Wire, wrong: Any, error: type[Exception]
) -> None:
    conn, _ = wire
    conn.idle_timeout = 1000
    with pytest.raises(error, match="idle_timeout must"):
        conn.idle_timeout = wrong
    assert conn.idle_timeout == 1000
    assert conn.is_active


async def test_zero_ends_it_at_once(wire: Wire) -> None:
    """O27."""
    conn, _ = wire
    assert conn.idle_timeout is None
    conn.idle_timeout = 0
    assert conn.idle_timeout == 0
    with pytest.raises(IdleTimeout):
        await within(conn.receive())
    conn.abort()
    conn.idle_timeout = 3  # it may be set at any time
    assert conn.idle_timeout == 3


async def test_after_the_peers_end(wire: Wire) -> None:
    """The end of the stream came first, and stays; writing is over."""
    conn, peer = wire
    peer.shutdown(socket.SHUT_WR)
    await holds(lambda: conn.at_eof)
    conn.idle_timeout = SOON
    await ended(conn)
    with pytest.raises(EndOfStream):
        await conn.receive()
    with pytest.raises(IdleTimeout):
        await conn.send(b"x")


async def test_after_a_reset_the_reset_stays() -> None:
    async with opened("tcp") as (conn, peer):
        reset(peer)
        await ended(conn)
        with pytest.raises(anyio.BrokenResourceError):
            await conn.receive()
        conn.idle_timeout = SOON
        with pytest.raises(anyio.BrokenResourceError) as caught:
            await conn.receive()
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ECONNRESET


async def test_it_ends_a_connection_whose_input_is_paused(wire: Wire) -> None:
    conn, peer = wire
    await send_until_full(conn, peer, bytes(16 << 20))
    buffered = len(conn.reader)
    conn.idle_timeout = SOON
    await ended(conn)
    await conn.skip(buffered)
    with pytest.raises(IdleTimeout):
        await conn.receive()


async def test_a_draining_close_ends_with_it(wire: Wire) -> None:
    conn, _ = wire
    conn.writer.write(bytes(16 << 20))
    conn.idle_timeout = 0.05
    await within(conn.aclose())
    assert conn.fileno() == -1


# --- in a server ---------------------------------------------------------------------------------


async def test_serve_sets_it_for_each_connection() -> None:
    async with served(idle_timeout=1000) as (conn, _):
        assert conn.idle_timeout == 1000
        conn.idle_timeout = SOON
        with pytest.raises(IdleTimeout):
            await within(conn.receive())


async def test_the_end_of_a_handler_by_it_is_normal(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive()

    async with anypoll.serve(handler, host="127.0.0.1", port=0, idle_timeout=SOON) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.setblocking(False)
            assert await within(read_to_end(client)) == b""
            await holds(lambda: dict(server.statistics().closed) == {"idle_timeout": 1})
        assert server.statistics().handler_errors == 0
    assert [r for r in caplog.records if r.name.startswith("anypoll")] == []


async def test_it_ends_the_connection_of_a_handler_that_does_something_else() -> None:
    seen: list[bool] = []

    async def handler(conn: Connection) -> None:
        await holds(lambda: not conn.is_active)
        seen.append(conn.extra(AnypollAttribute.statistics).bytes_received == 0)

    async with anypoll.serve(handler, host="127.0.0.1", port=0, idle_timeout=SOON) as server:
        with socket.create_connection(("127.0.0.1", server.port)):
            await holds(lambda: dict(server.statistics().closed) == {"done": 1})
    assert seen == [True]
