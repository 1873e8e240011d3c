"""Waking: what a hub does with the tokens that it has taken."""

from __future__ import annotations

import errno

import anyio
import pytest
from anyio import BrokenResourceError
from peers import arrive, holds, is_waiting, opened
from serving import connected

import anypoll
from anypoll import Connection, _epoll
from anypoll._loop import runtime as _runtime

pytestmark = pytest.mark.anyio

# --- what a token says ----------------------------------------------------------------------------


@pytest.mark.usefixtures("by_threads")
async def test_a_poller_that_fails_opens_no_window() -> None:
    """Its token carries the error where others carry the window's end."""
    async with opened("tcp") as (conn, peer):
        await arrive(conn, peer, b"abcd")
        assert await conn.next(2) == b"ab"  # so there is a block to look at
        failures: list[Exception] = []

        async def read() -> None:
            try:
                await conn.next(1 << 20)
            except BrokenResourceError as exc:
                failures.append(exc)

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await holds(lambda: is_waiting(conn))
            _epoll.set_fault("EPOLL_WAIT", errno.EBADF, times=1)
            while not _epoll.fault_hits("EPOLL_WAIT"):
                _runtime.nudge()
        assert len(failures) == 1


# --- who runs first -------------------------------------------------------------------------------


async def test_a_handler_may_cancel_whoever_is_woken_with_it() -> None:
    """Trio would be told to reschedule that task twice."""
    conns: list[Connection] = []
    got: list[bytes] = []
    scope = anyio.CancelScope()

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        await conn.next(1)
        scope.cancel()
        await conn.next(1)

    async with (
        opened() as (other, one),
        anypoll.serve(handler, host="127.0.0.1", port=0) as server,
    ):

        async def read() -> None:
            with scope:
                got.append(bytes(await other.next(1)))

        with connected(server) as two:
            async with anyio.create_task_group() as group:
                await holds(lambda: conns)
                group.start_soon(read)
                await holds(lambda: is_waiting(other) and is_waiting(conns[0]))
                two.send(b"x")
                one.send(b"y")
            if scope.cancelled_caught:
                got.append(bytes(await other.next(1)))
            assert got == [b"y"]
