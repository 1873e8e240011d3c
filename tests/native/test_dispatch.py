"""Waking: what a hub does with the tokens that it has taken."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError
from peers import MIB, arrive, holds, is_waiting, opened
from serving import connected

import anypoll
from anypoll import Connection, _epoll
from anypoll._connection.requests import Requests
from anypoll._loop import runtime as _runtime
from anypoll._loop.workers import Workers

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


# --- what is kept ---------------------------------------------------------------------------------


class Owner:
    """Of one connection in request mode."""

    context = None
    cut = False
    caller = None

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    async def conclude(self, conn: Connection, _exc: BaseException | None) -> None:
        await conn._core.end()


@pytest.mark.usefixtures("by_threads")
async def test_what_is_sent_while_tokens_are_told_is_kept() -> None:
    """A worker that is started for a request may begin at once, as an eager task does. What it
    sends then is not what its connection's token calls sent.
    """
    output = bytes(8 * MIB)
    calls: list[Connection] = []

    async def call(conn: Connection) -> None:
        calls.append(conn)

    async with opened("tcp") as (conn, peer):
        core = conn._core

        def send() -> None:
            conn.writer.write(output)
            assert core._send_pending() > 0

        def start(function: Any) -> bool:
            send()
            return core.hub.spawn(function, stoppable=True)

        core.requests = requests = Requests(conn, core, call, Owner(Workers(core.hub, start)))
        requests.start()
        assert requests.idle
        send()
        while core.queued():  # the loop stands still
            with suppress(BlockingIOError):
                peer.recv(MIB)
        peer.send(b"x")
        while not conn.statistics().bytes_received:
            _runtime.nudge()
        await holds(lambda: calls)
        assert core.queued()
        assert sum(map(len, core.hub.outputs[core.number])) >= core.queued()
        conn.abort()
