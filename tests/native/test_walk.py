"""Handlers that have input at once go on one after another, in one call of the hub's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio
from peers import holds, is_waiting, opened, settle, within

from anypoll import Connection, _native
from anypoll._loop import asyncio_hub, trio_hub

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("by_loops")]

on_asyncio = pytest.mark.loops("asyncio", "uvloop")
on_trio = pytest.mark.loops("trio")
COUNT = 8


@asynccontextmanager
async def connections(
    count: int = COUNT,
) -> AsyncIterator[tuple[list[Connection], list[socket.socket]]]:
    async with AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(opened()) for _ in range(count)]
        yield [conn for conn, _ in pairs], [peer for _, peer in pairs]


async def driven(conn: Connection, handler: Callable[[], Any]) -> None:
    await _native.Drive(conn._core.hub, handler())


async def all_wait(conns: list[Connection]) -> None:
    await holds(lambda: all(map(is_waiting, conns)))
    await settle()


@on_asyncio
async def test_each_is_the_current_task_in_its_turn() -> None:
    """Beside tasks that are resumed in the same turn, and in a call of dispatch() within one. None
    is current afterwards.
    """
    seen: list[bool] = []
    after: list[object] = []

    async def handler(conn: Connection, n: int) -> None:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for turn in range(3):
            await conn.next(1)
            seen.append(asyncio.current_task() is task)
            if n == turn:
                conn._core.hub.dispatch()
                seen.append(asyncio.current_task() is task)
            if n == 2:
                await anyio.lowlevel.checkpoint()
            if n == COUNT - 1:
                loop.call_soon(lambda: after.append(asyncio.current_task()))

    async with connections() as (conns, peers), anyio.create_task_group() as group:
        for n, conn in enumerate(conns):
            if n % 3 == 1:
                group.start_soon(handler, conn, n)
            else:
                group.start_soon(driven, conn, lambda n=n, conn=conn: handler(conn, n))
        for turn in range(3):
            await all_wait(conns)
            for peer in peers:
                peer.send(b"x")
            await holds(lambda: len(after) == turn + 1)  # noqa: B023
    assert seen == [True] * (3 * COUNT + 3)
    assert after == [None] * 3


@on_asyncio
async def test_without_the_dict_of_current_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is entered and left by asyncio's functions."""
    monkeypatch.setattr(asyncio_hub, "_dict_of_current_tasks", lambda _: None)
    await test_each_is_the_current_task_in_its_turn()


@on_trio
async def test_one_frame_serves_those_that_are_not_protected() -> None:
    """From KeyboardInterrupt, as Trio's system tasks are. One that cancels itself, and one that
    waits for something else, do not spoil it for those that follow.
    """
    seen: dict[int, bool] = {}
    ends: list[int] = []
    frames = 0

    def counted(step: Callable[[], Any]) -> Any:
        nonlocal frames
        frames += 1
        return original(step)

    async def handler(conn: Connection, n: int) -> None:
        await conn.next(1)
        seen[n] = trio.lowlevel.currently_ki_protected()
        if n == 2:
            with trio.CancelScope() as scope:
                scope.cancel()
                await conn.next(1)
            assert scope.cancelled_caught
        if n == 5:
            await trio.sleep(0)
        ends.append(n)

    async with connections() as (conns, peers), trio.open_nursery() as nursery:
        for n, conn in enumerate(conns):
            start = trio.lowlevel.spawn_system_task if n == 3 else nursery.start_soon
            start(driven, conn, lambda n=n, conn=conn: handler(conn, n))
        await all_wait(conns)
        hub: Any = conns[0]._core.hub
        original, hub._unprotected = hub._unprotected, counted
        for peer in peers:
            peer.send(b"x")
        await holds(lambda: len(ends) == COUNT)
        hub._unprotected = original
    assert seen == {n: n == 3 for n in range(COUNT)}
    if hub.loan is not None:
        assert frames < COUNT


@on_trio
@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_exception_of_a_signal_handler_stops_none_of_them(when: str) -> None:
    """Trio's handler raises it in the frame: it is of the first, or of the last."""
    end = KeyboardInterrupt()
    seen: list[int] = []
    interrupted: list[BaseException] = []

    def frame(step: Callable[[], Any]) -> None:
        hub._unprotected = original
        if when == "after":
            step()
        raise end

    async def handler(conn: Connection, n: int) -> None:
        for _ in range(2):
            try:
                await conn.next(1)
                seen.append(n)
            except KeyboardInterrupt as exc:
                interrupted.append(exc)

    async with connections() as (conns, peers), trio.open_nursery() as nursery:
        for n, conn in enumerate(conns):
            nursery.start_soon(driven, conn, lambda n=n, conn=conn: handler(conn, n))
        await all_wait(conns)
        hub: Any = conns[0]._core.hub
        original, hub._unprotected = hub._unprotected, frame
        for peer in peers:
            peer.send(b"x")
        await holds(lambda: interrupted and len(seen) >= COUNT)
        for peer in peers:
            peer.send(b"x")
    assert interrupted == [end]
    assert len(seen) == 2 * COUNT - 1


@on_trio
async def test_one_that_is_cancelled_while_it_runs_is_cancelled_when_it_waits() -> None:
    """By itself, and by the one before it in the same turn."""
    scopes: dict[int, trio.CancelScope] = {}
    ends: list[tuple[int, bool]] = []

    async def handler(conn: Connection, n: int) -> None:
        with trio.CancelScope() as scopes[n]:
            await conn.next(1)
            if n % 2:
                scopes[n].cancel()
            else:
                scopes[n + 1].cancel()
            await conn.next(100)
        ends.append((n, scopes[n].cancelled_caught))

    async with connections() as (conns, peers), trio.open_nursery() as nursery:
        for n, conn in enumerate(conns):
            nursery.start_soon(driven, conn, lambda n=n, conn=conn: handler(conn, n))
        await all_wait(conns)
        for peer in peers:
            peer.send(b"x")
        await holds(lambda: len(ends) == COUNT / 2)
        nursery.cancel_scope.cancel()
    assert {n for n, caught in ends if caught} == {1, 3, 5, 7}


@on_trio
async def test_what_follows_a_step_may_cancel_the_one_that_is_next() -> None:
    """The function that aborts a trap may be anybody's. It is called when the step is over, and
    whoever is next has been chosen.
    """
    scopes: dict[int, trio.CancelScope] = {}
    ends: list[tuple[int, bool]] = []

    def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
        for scope in scopes.values():
            scope.cancel()
        return trio.lowlevel.Abort.SUCCEEDED

    async def handler(conn: Connection, n: int) -> None:
        with trio.CancelScope() as scope:
            scopes[n] = scope
            await conn.next(1)
            scope.cancel()
            await trio.lowlevel.wait_task_rescheduled(abort)
        ends.append((n, scope.cancelled_caught))

    async with connections() as (conns, peers), trio.open_nursery() as nursery:
        for n, conn in enumerate(conns):
            nursery.start_soon(driven, conn, lambda n=n, conn=conn: handler(conn, n))
        await all_wait(conns)
        for peer in peers:
            peer.send(b"x")
        await holds(lambda: len(ends) == COUNT)
    assert sorted(ends) == [(n, True) for n in range(COUNT)]


@on_trio
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_signal_handler_that_cancels(when: str) -> None:
    """The one whose turn it is, in a frame around the step; its task is not blocked then."""
    ends: list[bool] = []

    def frame(step: Callable[[], Any]) -> None:
        hub._unprotected = original
        if when == "before":
            scope.cancel()
        step()
        scope.cancel()

    async def handler(conn: Connection) -> None:
        with scope:
            await conn.next(1)
            await conn.next(1)
        ends.append(scope.cancelled_caught)
        await conn.next(1)

    async with connections(1) as ([conn], [peer]), trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(driven, conn, lambda: handler(conn))
        await all_wait([conn])
        hub: Any = conn._core.hub
        original, hub._unprotected = hub._unprotected, frame
        peer.send(b"x")
        await holds(lambda: ends)
        peer.send(b"x")
    assert ends == [True]


@on_asyncio
async def test_rounds_do_not_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers that rest one after another, each stepped by its own task, share the next callbacks:
    there is one at a time.
    """
    begin = anyio.Event()
    run = 0

    async def handler(conn: Connection) -> None:
        await begin.wait()
        for _ in range(20):
            await conn.send(b"!")
            await asyncio.sleep(0)  # its task steps it again

    async with connections() as (conns, peers), anyio.create_task_group() as group:
        hub: Any = conns[0]._core.hub
        original, hub._queue = hub._queue, None  # as uvloop has it

        def counted(self: Any, unused: None) -> bool:
            nonlocal run
            run += 1
            return _native.Hub._resume_rested(self, unused)

        monkeypatch.setattr(type(hub), "_resume_rested", counted, raising=False)
        for conn in conns:
            group.start_soon(driven, conn, lambda conn=conn: handler(conn))
        await settle()
        begin.set()
        await within(_drained(peers))
        hub._queue = original
    assert 20 <= run <= 3 * 20


@on_trio
@pytest.mark.parametrize("case", ["alone", "busy", "unknown"])
async def test_rounds_of_a_run_with_nothing_else_to_step(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few begin within one step of Trio's; but not while another task has its turn in each,
    before ours or after, nor if that cannot be seen.
    """
    run = 0
    if case == "unknown":
        monkeypatch.setattr(trio_hub, "_frame_of_run", lambda: None)
    over = trio.Event()

    async def handler(conn: Connection) -> None:
        for _ in range(80):
            await conn.next(1)
            await conn.send(b"!")
        over.set()

    async def busy() -> None:
        while not over.is_set():
            await trio.lowlevel.checkpoint()

    def counted(self: Any, unused: None) -> bool:
        nonlocal run
        run += 1
        return _native.Hub._resume_rested(self, unused)

    async with connections(1) as ([conn], [peer]), trio.open_nursery() as nursery:
        nursery.start_soon(driven, conn, lambda: handler(conn))
        await all_wait([conn])
        monkeypatch.setattr(type(conn._core.hub), "_resume_rested", counted, raising=False)
        if case == "busy":
            nursery.start_soon(busy)
        peer.send(b"x" * 80)
        await within(over.wait())
    if case == "alone":
        assert run <= 80 / 4
    else:
        assert run >= 70


@on_trio
async def test_a_run_whose_loop_is_not_as_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    import trio._core._run as run

    assert trio_hub._frame_of_run() is not None
    monkeypatch.setattr(run, "unrolled_run", trio.run)
    assert trio_hub._frame_of_run() is None
    monkeypatch.delattr(run, "unrolled_run")
    assert trio_hub._frame_of_run() is None


async def _drained(peers: list[socket.socket]) -> None:
    for peer in peers:
        for _ in range(20):
            await anyio.wait_readable(peer)
            assert peer.recv(1) == b"!"
