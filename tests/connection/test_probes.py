"""What a connection pool asks, without any I/O: is this idle connection still good?

Nothing here lets the event loop run between what the peer does and the answer: a poller has
noticed it, or has not.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Callable

import anyio
import pytest
from anyio.abc import SocketAttribute
from calls import called
from peers import at_once, holds, opened, read_all, reset, send_all, send_until_full, settle

from anypoll import Connection

pytestmark = pytest.mark.anyio

Wire = tuple[Connection, socket.socket]


def good(conn: Connection) -> bool:
    return conn.is_active and not conn.at_eof and not conn.reader.buffered


def noticed(condition: Callable[[], object]) -> bool:
    """Whether it comes true while the event loop stands still."""
    until = time.monotonic() + 30
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


@pytest.fixture(params=["tcp", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["fresh", "used", "raw"])
async def wire(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Wire]:
    """An idle connection: that nobody has used yet, with an exchange behind it, or whose raw socket
    somebody has.
    """
    async with opened(kind) as (conn, peer):
        if request.param == "used":
            await conn.send(b"question")
            assert await read_all(peer, 8) == b"question"
            await send_all(peer, b"answer")
            assert await conn.receive() == b"answer"
        elif request.param == "raw":
            conn.extra(SocketAttribute.raw_socket)
        yield conn, peer


async def test_an_idle_connection_is_good(wire: Wire) -> None:
    conn, _ = wire
    for _ in range(100):
        assert good(conn)
    before = conn.statistics()
    assert good(conn)
    assert conn.statistics() == before  # nothing was read, written or waited for


def resets(conn: Connection, peer: socket.socket) -> None:
    if conn.extra(SocketAttribute.family) == socket.AF_UNIX:
        at_once(conn.writer.flush())  # the only kind of reset there is: it closes with input unread
    reset(peer)


def ends_idle(conn: Connection, _: socket.socket) -> None:
    conn.idle_timeout = 0.001


#: What happens; whether it is still active then, at its end, and what there is to read.
NEWS: dict[str, tuple[Callable[[Connection, socket.socket], object], bool | None, bool, int]] = {
    "close": (lambda _, peer: peer.close(), None, True, 0),
    "half-close": (lambda _, peer: peer.shutdown(socket.SHUT_WR), True, True, 0),
    "reset": (resets, False, False, 0),
    "stray bytes": (lambda _, peer: peer.send(b"HTTP/1.1 408 Request Timeout"), True, False, 28),
    "idle": (ends_idle, False, False, 0),
}


@pytest.mark.parametrize(("happens", "active", "eof", "buffered"), NEWS.values(), ids=NEWS)
async def test_news_are_noticed_while_nobody_reads(
    wire: Wire,
    happens: Callable[[Connection, socket.socket], object],
    active: bool | None,
    eof: bool,
    buffered: int,
) -> None:
    """O22."""
    conn, peer = wire
    conn.writer.write(b"unread")
    happens(conn, peer)
    assert noticed(lambda: not good(conn))
    assert conn.at_eof == eof
    assert conn.reader.buffered == len(conn.reader) == buffered
    assert active in (conn.is_active, None)


async def test_stray_bytes_and_the_end_are_noticed_while_nobody_reads(wire: Wire) -> None:
    conn, peer = wire
    peer.send(b"bye")
    peer.close()
    assert noticed(lambda: conn.reader.buffered == 3)
    assert not conn.at_eof  # there is something to read yet
    assert await conn.next(3) == b"bye"
    assert noticed(lambda: conn.at_eof)


@pytest.mark.parametrize("how", ["aclose", "abort", "detach"])
async def test_the_own_close_is_known_at_once(wire: Wire, how: str) -> None:
    conn, _ = wire
    if how == "detach":
        conn.detach()[0].close()
    else:
        await called(getattr(conn, how))
    assert (conn.is_active, conn.at_eof, conn.reader.buffered) == (False, False, 0)


async def test_probes_while_another_task_reads(wire: Wire) -> None:
    conn, _ = wire
    async with anyio.create_task_group() as group:
        group.start_soon(conn.receive)
        await settle()
        assert good(conn)
        group.cancel_scope.cancel()
    assert good(conn)


# --- with the read-ahead paused ------------------------------------------------------------------


async def paused(conn: Connection, peer: socket.socket) -> int:
    """The peer has sent more than is read ahead; returns what is buffered."""
    await send_until_full(conn, peer, bytes(16 << 20))
    await holds(lambda: len(conn.reader) >= 256 * 1024)
    return conn.reader.buffered


async def test_paused_input_is_not_good(kind: str) -> None:
    async with opened(kind) as (conn, peer):
        await paused(conn, peer)
        assert not good(conn)
        assert conn.is_active


async def test_a_reset_behind_paused_input_is_noticed_while_nobody_reads(kind: str) -> None:
    async with opened(kind) as (conn, peer):
        buffered = await paused(conn, peer)
        conn.writer.write(b"unread")
        resets(conn, peer)
        assert noticed(lambda: not conn.is_active)
        assert conn.reader.buffered == buffered
        assert not conn.at_eof


async def test_an_end_behind_paused_input_is_known_once_that_is_read(kind: str) -> None:
    async with opened(kind) as (conn, peer):
        buffered = await paused(conn, peer)
        peer.shutdown(socket.SHUT_WR)
        assert conn.is_active
        assert not conn.at_eof
        assert conn.reader.buffered == buffered
        with anyio.fail_after(30):
            async for _ in conn:
                pass
        assert conn.at_eof
        assert conn.is_active


async def test_the_own_close_of_paused_input(kind: str) -> None:
    async with opened(kind) as (conn, peer):
        await paused(conn, peer)
        await conn.aclose()
        assert (conn.is_active, conn.at_eof, conn.reader.buffered) == (False, False, 0)
