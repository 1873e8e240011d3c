"""The native awaitables: a coroutine to everybody, a future to asyncio."""

from __future__ import annotations

import asyncio
import asyncio.tasks
import contextvars
import gc
import sys
from collections.abc import Coroutine
from typing import Any

import anyio
import pytest
import trio
from anyio import ClosedResourceError
from peers import arrive, holds, is_waiting, opened, send_all, settle, within

from anypoll import Connection, _native

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.loops("asyncio", "uvloop")


# --- a coroutine ----------------------------------------------------------------------------------


async def test_it_does_nothing_before_it_is_awaited() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"ab")
        call = conn.next(1)
        assert isinstance(call, Coroutine)
        assert await conn.next(2) == b"ab"
        call.close()
        with pytest.raises(RuntimeError, match="already awaited"):
            call.send(None)


async def test_one_that_is_never_awaited_is_reported() -> None:
    async with opened() as (conn, _):
        with pytest.warns(RuntimeWarning, match="'next' was never awaited"):
            conn.next(1)
        call = conn.next(1)
        call.close()  # on purpose
        del call


async def test_it_is_awaited_once() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"ab")
        call = conn.next(1)
        assert await call == b"a"
        with pytest.raises(RuntimeError, match="already awaited"):
            await call
        assert await conn.next(1) == b"b"


@pytest.mark.parametrize("kind", ["tcp", "unix", "messages"])
async def test_iteration_ends_with_the_stream(kind: str) -> None:
    async with opened(kind) as (conn, peer):
        assert conn.__aiter__() is conn
        got: list[bytes] = []
        for piece in (b"ab", b"cd"):
            await send_all(peer, piece)
            got.append(await conn.__anext__())
        peer.close()
        for _ in range(2):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await conn.__anext__()
                pytest.fail("the end is a checkpoint")
            with pytest.raises(StopAsyncIteration) as caught:
                await conn.__anext__()
            assert caught.value.__cause__ is None
            assert caught.value.__context__ is None or caught.value.__suppress_context__
        assert [piece async for piece in conn] == []
    assert got == [b"ab", b"cd"]
    with pytest.raises(ClosedResourceError):
        await conn.__anext__()


async def test_iteration_takes_what_receive_would() -> None:
    async with opened("tcp") as (conn, peer):
        await arrive(conn, peer, b"x" * 70_000)
        assert [len(await conn.__anext__()) for _ in range(2)] == [65536, 70_000 - 65536]
        with pytest.warns(RuntimeWarning, match="'receive' was never awaited"):
            conn.__anext__()


@pytest.mark.parametrize("end", ["throw", "close", "throw a class"])
async def test_it_can_be_ended_from_outside(end: str) -> None:
    """As whoever drives a coroutine by hand does; nothing is consumed, and the reader is free."""
    async with opened() as (conn, peer):
        call = conn.next(4)
        call.send(None)
        assert is_waiting(conn)
        if end == "throw":
            with pytest.raises(KeyError, match="x"):
                call.throw(KeyError("x"))
        elif end == "throw a class":
            with pytest.raises(KeyError):
                call.throw(KeyError)
        else:
            call.close()
        assert not is_waiting(conn)
        await send_all(peer, b"abcd")
        assert await within(conn.next(4)) == b"abcd"


@on_asyncio
@pytest.mark.parametrize("then", ["nothing", "release", "close"])
async def test_a_checkpoint_that_is_cancelled_leaves_the_bytes(then: str) -> None:
    """`receive()` had them already. Whatever was done to the reader meanwhile still holds."""
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"abcdef")
        call = conn.receive(10)
        call.send(None)
        if then == "release":
            conn.reader.release()
        elif then == "close":
            conn.abort()
        with pytest.raises(asyncio.CancelledError):
            call.throw(asyncio.CancelledError())
        if then == "close":
            with pytest.raises(ClosedResourceError):
                await conn.next(3)
        else:
            assert await within(conn.next(3)) == b"abc"


async def test_task_groups_take_it_as_a_coroutine_function() -> None:
    async with opened() as (conn, peer):
        async with anyio.create_task_group() as group:
            group.start_soon(conn.next, 2)
            await settle()
            await send_all(peer, b"abcd")
        assert await within(conn.next(2)) == b"cd"


@pytest.mark.loops("trio")
async def test_nurseries_take_it_as_an_async_function() -> None:
    async with opened() as (conn, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.next, 2)
            await settle()
            await send_all(peer, b"abcd")
        assert await within(conn.next(2)) == b"cd"


@on_asyncio
async def test_asyncio_takes_it_as_a_coroutine() -> None:
    async with opened() as (conn, peer):
        task = asyncio.create_task(conn.next(2))
        await settle()
        assert "next(2) waiting" in repr(task)
        await send_all(peer, b"ab")
        assert await task == b"ab"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(conn.next(1), 0.01)
        await send_all(peer, b"cd")
        assert await asyncio.gather(conn.next(2)) == [b"cd"]
        call = conn.next(1)
        assert not asyncio.isfuture(call)
        call.close()


@on_asyncio
async def test_a_task_written_in_python_may_wait_for_it() -> None:
    """`asyncio.tasks._PyTask` is what debuggers and other implementations are like."""
    async with opened() as (conn, peer):
        loop = asyncio.get_running_loop()
        task: Any = asyncio.tasks._PyTask(conn.next(2), loop=loop)  # type: ignore[attr-defined]
        await settle()
        await send_all(peer, b"ab")
        assert await task == b"ab"
        task = asyncio.tasks._PyTask(conn.next(2), loop=loop)  # type: ignore[attr-defined]
        await settle()
        task.cancel("why")
        with pytest.raises(asyncio.CancelledError):
            await task
        await send_all(peer, b"cd")
        assert await within(conn.next(2)) == b"cd"


@on_asyncio
async def test_asyncio_shields_it() -> None:
    async with opened() as (conn, peer):
        task = asyncio.ensure_future(conn.next(2))
        outer = asyncio.shield(task)
        await settle()
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer
        assert is_waiting(conn)
        await send_all(peer, b"abcd")
        assert await within(task) == b"ab"
        async with asyncio.TaskGroup() as group:
            rest = group.create_task(conn.next(2))
        assert rest.result() == b"cd"


@on_asyncio
async def test_asyncio_in_debug_mode() -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    try:
        async with opened() as (conn, peer):
            task = asyncio.ensure_future(conn.next(2))
            await holds(lambda: is_waiting(conn))
            await send_all(peer, b"ab")
            assert await within(task) == b"ab"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await conn.receive()
    finally:
        loop.set_debug(False)


@pytest.mark.loops("asyncio")  # uvloop hands the factory an argument that this one does not take
@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks")
async def test_eager_tasks() -> None:
    """They begin within `create_task()`, and in the middle of a task that is resumed at once."""
    loop = asyncio.get_running_loop()
    factory = loop.get_task_factory()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
    try:
        async with opened() as (first, one), opened() as (second, two):
            await arrive(first, one, b"ab")
            assert asyncio.ensure_future(first.next(2)).done()

            async def read() -> bytes:
                await first.next(1)
                task = asyncio.ensure_future(second.next(1))
                assert is_waiting(second)
                return bytes(await task)

            task = asyncio.ensure_future(read())
            assert is_waiting(first)
            await send_all(one, b"x")
            await holds(lambda: is_waiting(second))
            await send_all(two, b"y")
            assert await within(task) == b"y"
    finally:
        loop.set_task_factory(factory)


async def test_a_scope_cancels_what_a_task_group_runs() -> None:
    async with opened() as (conn, peer):
        async with anyio.create_task_group() as group:
            group.start_soon(conn.next, 2)
            await holds(lambda: is_waiting(conn))
            group.cancel_scope.cancel()
        assert not is_waiting(conn)
        await send_all(peer, b"ab")
        assert await within(conn.next(2)) == b"ab"


# --- a future -------------------------------------------------------------------------------------


@on_asyncio
async def test_what_a_task_may_ask_of_it() -> None:
    async with opened() as (conn, peer):
        call: Any = conn.next(2)
        assert call._asyncio_future_blocking is None
        assert call.cancel() is False
        assert call.send(None) is call
        assert call._asyncio_future_blocking is True
        assert call.get_loop() is asyncio.get_running_loop()
        assert not call.done()
        with pytest.raises(asyncio.InvalidStateError):
            call.result()
        woken: list[Any] = []
        call.add_done_callback(woken.append, context=contextvars.copy_context())
        with pytest.raises(RuntimeError, match="only one"):
            call.add_done_callback(print)
        assert call.remove_done_callback(print) == 0
        await send_all(peer, b"ab")
        await holds(lambda: woken)
        assert call.done()
        assert call.result() is None
        with pytest.raises(StopIteration) as caught:
            call.send(None)
        assert caught.value.value == b"ab"
        assert woken == [call]


@on_asyncio
async def test_a_cancellation_is_kept_until_the_task_has_run() -> None:
    """AnyIO cancels again and again; an answer of False would make the task be cancelled twice."""
    async with opened() as (conn, _):
        call: Any = conn.next(2)
        call.send(None)
        woken: list[Any] = []
        call.add_done_callback(woken.append)
        assert call.cancel("first") is True
        assert call.cancel(msg="second") is True
        assert woken == []
        await settle()
        assert woken == [call]
        assert call.cancelled()
        with pytest.raises(asyncio.CancelledError, match="second"):
            call.result()
        with pytest.raises(asyncio.CancelledError):
            call.throw(asyncio.CancelledError())
        assert call.cancel() is False
        assert not conn._core._reading


@on_asyncio
async def test_whoever_listens_late_is_told_in_the_next_round() -> None:
    async with opened() as (conn, peer):
        call: Any = conn.next(2)
        call.send(None)
        await send_all(peer, b"ab")
        await holds(call.done)
        woken: list[Any] = []
        call.add_done_callback(woken.append)
        assert woken == []
        await settle()
        assert woken == [call]
        call.close()
        assert await within(conn.next(2)) == b"ab"


async def test_a_close_wakes_in_the_next_round() -> None:
    """Not at once: the task would run in the middle of the code that closes."""
    async with opened() as (conn, _):
        ended = anyio.Event()

        async def read() -> None:
            with pytest.raises(ClosedResourceError):
                await conn.next(1)
            ended.set()

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await holds(lambda: is_waiting(conn))
            conn.abort()
            assert not ended.is_set()
        assert ended.is_set()


# --- tasks that are woken together ----------------------------------------------------------------


async def test_more_tasks_than_one_turn_wakes() -> None:
    """Each is woken, whatever the number; hub.c wakes 256 before the loop gets its turn."""
    pairs = 300
    async with anyio.create_task_group() as group:
        conns = [await group_opened(group) for _ in range(pairs)]
        got: list[bytes] = []

        async def read(conn: Connection) -> None:
            got.append(bytes(await conn.next(1)))

        for conn, _ in conns:
            group.start_soon(read, conn)
        await holds(lambda: all(is_waiting(conn) for conn, _ in conns))
        for _, peer in conns:
            peer.send(b"x")
        await holds(lambda: len(got) == pairs)
        group.cancel_scope.cancel()


async def group_opened(group: Any) -> Any:
    """A pair that is open until the group ends."""

    async def keep(*, task_status: Any) -> None:
        async with opened() as pair:
            task_status.started(pair)
            await anyio.sleep_forever()

    return await group.start(keep)


@on_asyncio
@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
async def test_what_ends_the_program_loses_no_other_wake_up(end: type[BaseException]) -> None:
    """It comes out of one task that runs in the hub's callback."""
    loop = asyncio.get_running_loop()
    async with opened() as (first, one), opened() as (second, two):

        async def fails() -> None:
            await first.next(1)
            raise end

        interrupted = loop.create_task(fails())
        other = loop.create_task(second.next(1))
        await holds(lambda: is_waiting(first) and is_waiting(second))
        hub = first._core.hub
        dispatch = hub.dispatch if hub.loan is None else lambda: hub.drive(hub.loan)

        def run() -> None:  # as the loop calls it
            one.send(b"x")
            two.send(b"x")
            while not interrupted.done():
                dispatch()

        with pytest.raises(end):
            await outside_of_tasks(run)
        assert isinstance(interrupted.exception(), end)
        assert await within(other) == b"x"


async def outside_of_tasks(function: Any) -> None:
    """The function's exception, raised by a callback of the loop and not by a task."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def call() -> None:
        try:
            function()
        except BaseException as exc:  # noqa: BLE001
            future.set_result(exc)
        else:
            future.set_result(None)

    loop.call_soon(call)
    exc = await future
    if exc is not None:
        raise exc


async def test_a_woken_task_has_its_own_context() -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    seen: list[tuple[str, bool]] = []

    async def read(conn: Connection, own: str) -> None:
        name.set(own)
        task = anyio.get_current_task()
        await conn.next(1)
        seen.append((name.get(), anyio.get_current_task() == task))

    async with (
        opened() as (first, one),
        opened() as (second, two),
        anyio.create_task_group() as group,
    ):
        group.start_soon(read, first, "first")
        group.start_soon(read, second, "second")
        await holds(lambda: is_waiting(first) and is_waiting(second))
        one.send(b"x")
        two.send(b"x")
    assert sorted(seen) == [("first", True), ("second", True)]


# --- memory ---------------------------------------------------------------------------------------


async def test_nothing_is_left_of_thousands_of_calls() -> None:
    async with opened() as (conn, peer):

        async def use() -> None:
            for _ in range(50):
                peer.send(b"abcdef\n")
                assert await within(conn.next(3)) == b"abc"
                assert await within(conn.peek(1)) == b"d"
                await within(conn.skip(1))
                assert await within(conn.until(b"\n")) == b"ef\n"
                with anyio.move_on_after(0):
                    await conn.next(1)
                call = conn.next(1)
                call.send(None)
                call.close()

        def objects() -> int:
            gc.collect()
            return sum(isinstance(o, _native.Operation) for o in gc.get_objects())

        await use()
        before, blocks = objects(), sys.getallocatedblocks()
        for _ in range(20):
            await use()
        assert objects() <= before
        gc.collect()
        assert sys.getallocatedblocks() - blocks < 500  # 1000 rounds


async def test_views_keep_their_block_alone_alive() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"abcd")
        view = await conn.next(2)
        block = view.obj
        assert type(block) is _native.Block
        assert view.readonly
        count = sys.getrefcount(block)
        views = [view[:1] for _ in range(5)]
        more = await conn.peek(2)
        assert sys.getrefcount(block) == count + 1  # slices share the view's own hold
        del more, views
        assert sys.getrefcount(block) == count
        await conn.aclose()
        assert view == b"ab"
