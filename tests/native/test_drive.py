"""Handlers that the hub resumes directly are handlers like any other."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import random
import socket
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import trio.testing
from peers import holds, is_waiting, opened, send_all, settle, within
from serving import connected

import anypoll
from anypoll import Connection, _native
from anypoll._loop import asyncio_hub, runtime as _runtime

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.loops("asyncio", "uvloop")
Handler = Callable[[Connection], Awaitable[None]]


@pytest.fixture(params=[True, False], ids=["directly", "by its task"], autouse=True)
def direct(request: pytest.FixtureRequest) -> Any:
    """Each test holds for both ways."""
    anypoll.configure(direct_resume=request.param)
    yield request.param
    anypoll.configure(direct_resume=True)


@asynccontextmanager
async def one(handler: Handler, **options: Any) -> AsyncIterator[socket.socket]:
    """A client of a server with that handler."""
    async with anypoll.serve(handler, host="127.0.0.1", port=0, **options) as server:
        sock = connected(server)
        sock.setblocking(False)
        with sock:
            yield sock
            await within(server.shutdown(0))


async def parked() -> None:
    """Until a handler waits for input: what is sent then finds it resumed by the hub. How many
    rounds of the loop a connection takes to come so far depends on the machine.
    """
    hub = _runtime.current_hub()
    await holds(lambda: any(hub.waits(core.number) for core in hub._cores()))


async def read(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes."""
    data = b""
    with anyio.fail_after(60):
        while len(data) < size:
            await anyio.wait_readable(sock)
            data += sock.recv(size - len(data))
    return data


async def test_it_is_resumed_as_it_was_asked_for(direct: bool) -> None:
    """On Trio, too: with this version its inside is as expected."""
    drives: list[bool] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        await conn.next(1)
        kinds = [type(o) for o in gc.get_objects()]
        drives.append(_native.Drive in kinds)
        await conn.send(b"!")

    async with one(handler) as sock:
        await send_all(sock, b"a")
        await settle()
        await send_all(sock, b"b")
        assert await read(sock, 1) == b"!"
    assert drives == [direct]


async def test_it_may_await_anything() -> None:
    """Between two reads: sleeps, threads, events, streams, task groups, another connection."""

    async def handler(conn: Connection) -> None:
        send, receive = anyio.create_memory_object_stream[int](1)
        a, b = anypoll.socketpair()
        async with send, receive, a, b:
            for n in range(50):
                assert await conn.next(1) == bytes([n])
                await anyio.lowlevel.checkpoint()
                await anyio.sleep(0)
                if n % 5 == 0:
                    assert await anyio.to_thread.run_sync(abs, -n) == n
                await send.send(n)
                assert await receive.receive() == n
                async with anyio.create_task_group() as group:
                    group.start_soon(a.send, bytes([n]))
                    assert await b.receive() == bytes([n])
                event = anyio.Event()
                async with anyio.create_task_group() as group:
                    group.start_soon(anyio.sleep, 0)
                    event.set()
                    await event.wait()
                conn.writer.write(bytes([n]))
                await conn.writer.flush()

    async with one(handler) as sock:
        for n in range(50):
            await send_all(sock, bytes([n]))
            assert await read(sock, 1) == bytes([n])


@pytest.mark.parametrize("shield", [False, True])
async def test_scopes_with_deadlines(shield: bool) -> None:
    async def handler(conn: Connection) -> None:
        while True:
            with anyio.move_on_after(0.02, shield=shield) as scope:
                await conn.next(4)
            await conn.send(b"late" if scope.cancelled_caught else b"came")

    async with one(handler) as sock:
        assert await read(sock, 4) == b"late"
        await send_all(sock, b"ab")
        assert await read(sock, 4) == b"late"
        await send_all(sock, b"cd")
        assert b"came" in await read(sock, 4) + await read(sock, 4)


async def test_a_handler_that_cancels_itself() -> None:
    seen: list[str] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await conn.next(1)
            seen.append("not reached")
        seen.append("caught" if scope.cancelled_caught else "lost")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep(1000)
        seen.append("caught" if scope.cancelled_caught else "lost")
        await conn.next(1)
        await conn.send(b"!")

    async with one(handler) as sock:
        await parked()
        await send_all(sock, b"a")
        await holds(lambda: len(seen) == 2)
        await send_all(sock, b"b")
        assert await read(sock, 1) == b"!"
    assert seen == ["caught", "caught"]


@on_asyncio
@pytest.mark.parametrize("then", ["reads", "sleeps", "awaits a future", "returns"])
async def test_a_task_that_cancels_itself(then: str) -> None:
    """`Task.cancel()` from within, while the hub runs the handler."""
    seen: list[str] = []
    futures: list[asyncio.Future[None]] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        task = asyncio.current_task()
        assert task is not None
        task.cancel("mine")
        seen.append("cancelled")
        try:
            if then == "reads":
                await conn.next(1)
            elif then == "sleeps":
                await asyncio.sleep(0)
            elif then == "awaits a future":
                futures.append(asyncio.get_running_loop().create_future())
                await futures[0]
            else:
                return
        except asyncio.CancelledError as exc:
            seen.append(str(exc))
            raise

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with connected(server) as sock:
            sock.send(b"x")
            await holds(lambda: sum(server.statistics().closed.values()) == 1)
            reasons = dict(server.statistics().closed)
    assert seen == (["cancelled"] if then == "returns" else ["cancelled", "mine"])
    assert all(future.cancelled() for future in futures)
    assert sum(reasons.values()) == 1


@on_asyncio
async def test_native_timeouts_nest() -> None:
    async def handler(conn: Connection) -> None:
        task = asyncio.current_task()
        assert task is not None
        while True:
            try:
                async with asyncio.timeout(30), asyncio.timeout(0.02):
                    await conn.next(4)
            except TimeoutError:
                assert task.cancelling() == 0
                await conn.send(b"late")
            else:
                await conn.send(b"came")

    async with one(handler) as sock:
        assert await read(sock, 4) == b"late"
        await send_all(sock, b"abcd")
        assert b"came" in await read(sock, 4) + await read(sock, 4)


async def test_an_exception_has_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def deep(conn: Connection) -> None:
        await conn.next(1)
        raise LookupError("deep")

    async def handler(conn: Connection) -> None:
        await deep(conn)

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with connected(server) as sock:
            await parked()
            sock.send(b"x")
            await holds(lambda: server.statistics().handler_errors == 1)
    lines = "".join(caplog.text)
    caplog.clear()  # the frames keep the connection
    assert "LookupError: deep" in lines
    assert lines.index("in handler") < lines.index("in deep")


@pytest.mark.parametrize("by", ["hub", "task"])
def test_an_exception_keeps_its_context(
    run: Callable[[Any], Any], by: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if something else is being handled where the event loop runs."""
    seen: list[BaseException] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        if by == "task":
            await anyio.sleep(0)
        try:
            raise KeyError("inner")
        except KeyError:
            raise ValueError("outer")  # noqa: B904 -- its context is what matters

    async def main() -> None:
        def on_error(_conn: Connection, exc: Exception) -> None:
            seen.append(exc)

        async with anypoll.serve(handler, host="127.0.0.1", port=0, on_error=on_error) as server:
            with connected(server) as sock:
                await holds(lambda: server.connections and is_waiting(server.connections[0]))
                sock.send(b"x")
                await holds(lambda: seen)

    around = RuntimeError("around")
    try:
        raise around
    except RuntimeError:
        run(main)
    chain = []
    exc: BaseException | None = seen.pop()
    while exc is not None:
        chain.append(repr(exc))
        exc = exc.__context__
    caplog.clear()  # the frames keep the connection
    assert chain == ["ValueError('outer')", "KeyError('inner')", "RuntimeError('around')"]


async def test_its_task_and_its_context_are_its_own() -> None:
    name: contextvars.ContextVar[int] = contextvars.ContextVar("name")
    tasks: dict[int, set[int]] = {}

    async def handler(conn: Connection) -> None:
        number = (await conn.next(1))[0]
        name.set(number)
        for _ in range(20):
            tasks.setdefault(number, set()).add(anyio.get_current_task().id)
            await conn.next(1)
            assert name.get() == number
            await conn.send(b"!")

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        socks = [connected(server) for _ in range(5)]
        for n, sock in enumerate(socks):
            sock.setblocking(False)
            await send_all(sock, bytes([n]))
        for _ in range(20):
            for sock in socks:
                await send_all(sock, b"x")
            for sock in socks:
                assert await read(sock, 1) == b"!"
        for sock in socks:
            sock.close()
    ids = [ids for _, ids in sorted(tasks.items())]
    assert all(len(i) == 1 for i in ids)
    assert len(set.union(*ids)) == 5


@on_asyncio
async def test_it_is_seen_among_the_tasks() -> None:
    async def handler(conn: Connection) -> None:
        await conn.next(1)
        await conn.next(1)

    async with one(handler) as sock:
        await send_all(sock, b"a")
        await settle()

        def waiting() -> list[Any]:
            tasks = [t for t in asyncio.all_tasks() if "Lifecycle" in repr(t)]
            return [t for t in tasks if "wait_for=<" in repr(t)]

        await holds(waiting)
        [task] = waiting()
        assert task.get_stack()


@pytest.mark.loops("trio")
async def test_trio_counts_its_checkpoints() -> None:
    results: list[str] = []

    conns: list[Connection] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        conns.append(conn)
        with trio.testing.assert_checkpoints():
            await conn.next(1)
        results.append("checkpoint")
        await conn.send(b"!")

    async with one(handler) as sock:
        await send_all(sock, b"a")
        await holds(lambda: conns and is_waiting(conns[0]))
        await send_all(sock, b"b")
        assert await read(sock, 1) == b"!"
    assert results == ["checkpoint"]


@pytest.mark.loops("trio")
async def test_instruments_see_every_step(direct: bool) -> None:
    """While there are any, handlers are resumed by their tasks."""
    steps: list[Any] = []
    tasks: list[Any] = []

    class Counter(trio.abc.Instrument):
        def before_task_step(self, task: Any) -> None:
            steps.append(task)

    async def handler(conn: Connection) -> None:
        tasks.append(trio.lowlevel.current_task())
        while True:
            await conn.next(1)
            await conn.writer.flush()
            conn.writer.write(b"!")

    counter = Counter()
    trio.lowlevel.add_instrument(counter)
    try:
        async with one(handler) as sock:
            for _ in range(10):
                await send_all(sock, b"x")
                assert await read(sock, 1) == b"!"
            assert steps.count(tasks[0]) >= 10
    finally:
        trio.lowlevel.remove_instrument(counter)


async def test_handlers_that_end_one_another() -> None:
    """All have input at once; the first to run closes the others."""
    conns: list[Connection] = []
    ends: list[str] = []

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        try:
            await conn.next(1)
            await conn.next(1)
        except anyio.ClosedResourceError:
            ends.append("closed")
            raise
        for other in conns:
            if other is not conn:
                other.abort()
        ends.append("first")

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        socks = [connected(server) for _ in range(20)]
        for sock in socks:
            sock.send(b"a")
        await holds(lambda: len(conns) == 20)
        await settle()
        for sock in socks:
            sock.send(b"b")
        await holds(lambda: len(ends) == 20)
        for sock in socks:
            sock.close()
    assert ends.count("first") == 1


async def test_nothing_is_left_of_thousands_of_handlers() -> None:
    async def handler(conn: Connection) -> None:
        with anyio.move_on_after(30):
            while True:
                await conn.send(await conn.next(1))

    def drives() -> int:
        gc.collect()
        return sum(isinstance(o, (_native.Drive, _native.Operation)) for o in gc.get_objects())

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        before = drives()
        for _ in range(200):
            with connected(server) as sock:
                sock.setblocking(False)
                for _ in range(3):
                    await send_all(sock, b"x")
                    assert await read(sock, 1) == b"x"
        await holds(lambda: not server.connections)
        await holds(lambda: drives() <= before)


@pytest.mark.parametrize("seed", range(3))
async def test_at_random(seed: int) -> None:
    """Cancellations, timeouts, closes and foreign awaits against data: not a byte is lost."""
    dice = random.Random(seed)
    size = 3000
    done: list[bool] = []

    async def handler(conn: Connection) -> None:
        got = bytearray()
        choice = random.Random(seed + 1)
        while len(got) < size:
            n = min(choice.randrange(1, 9), size - len(got))
            how = choice.randrange(7)
            with anyio.move_on_after(choice.choice([0, 0.0005, 30])):
                if how == 0:
                    await anyio.sleep(0)
                if how == 1:
                    async with anyio.create_task_group() as group:
                        group.start_soon(anyio.sleep, 0)
                        view = await conn.next(n)
                        got += view
                elif how == 2:
                    await conn.peek(n)
                elif how == 3:
                    got += await conn.receive(n)
                elif how == 4:
                    conn.read_timeout = 0.0005
                    try:
                        got += await conn.next(n)
                    except anypoll.ReadTimeout:
                        pass
                    finally:
                        conn.read_timeout = None
                else:
                    got += await conn.next(n)
        assert bytes(got) == bytes(i % 251 for i in range(size))
        done.append(True)
        await conn.send(b"!")

    async with one(handler) as sock:
        data = bytes(i % 251 for i in range(size))
        position = 0
        while position < size:
            step = dice.randrange(1, 40)
            await send_all(sock, data[position : position + step])
            position += step
            if dice.random() < 0.3:
                await anyio.sleep(dice.choice([0, 0.0003]))
        assert await read(sock, 1) == b"!"
    assert done == [True]


# --- what goes wrong on the way -------------------------------------------------------------------


async def wake_by_callback(
    conn: Connection, sock: socket.socket, run: Callable[[Callable[[], Any]], Any]
) -> None:
    """Ends the wait of the connection as the event loop does, but within `run`."""
    hub: Any = conn._core.hub
    dispatch = hub.dispatch if hub.loan is None else lambda: hub.drive(hub.loan)
    done = asyncio.get_running_loop().create_future()

    def call() -> None:
        calls = conn.statistics().bytes_received
        sock.send(b"x")
        try:
            while conn.statistics().bytes_received == calls or is_waiting(conn):
                run(dispatch)
            done.set_result(None)
        except BaseException as exc:  # noqa: BLE001
            done.set_exception(exc)

    asyncio.get_running_loop().call_soon(call)
    await done


@on_asyncio
async def test_a_context_that_is_entered_already() -> None:
    """Nobody can enter it a second time, so the task goes on in the next round."""
    conns: list[Connection] = []

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        while True:
            conn.writer.write(await conn.next(1))

    async with one(handler) as sock:
        await send_all(sock, b"a")
        assert await read(sock, 1) == b"a"
        await holds(lambda: is_waiting(conns[0]))
        gc.collect()
        waiters = [o for o in gc.get_objects() if type(o) in (_native.Drive, _native.Operation)]
        contexts = [
            referent
            for waiter in waiters
            for referent in gc.get_referents(waiter)
            if isinstance(referent, contextvars.Context)
        ]
        [context] = contexts
        await wake_by_callback(conns[0], sock, context.run)
        assert await read(sock, 1) == b"x"
        await send_all(sock, b"c")
        assert await read(sock, 1) == b"c"


@on_asyncio
async def test_a_handler_that_leaves_its_task(direct: bool) -> None:
    """The event loop is told, and the handler goes on."""
    if not direct:
        pytest.skip("asyncio itself does not survive that")
    conns: list[Connection] = []

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        await conn.next(1)
        task = asyncio.current_task()
        assert task is not None
        asyncio.tasks._leave_task(asyncio.get_running_loop(), task)
        await conn.next(1)
        await conn.send(b"!")

    async with one(handler) as sock:
        await holds(lambda: conns and is_waiting(conns[0]))
        with pytest.raises(RuntimeError, match=r"[Ll]eaving task"):
            await wake_by_callback(conns[0], sock, lambda dispatch: dispatch())
        await send_all(sock, b"b")
        assert await read(sock, 1) == b"!"


@pytest.mark.loops("trio")
@pytest.mark.parametrize("system", [False, True])
async def test_a_keyboard_interrupt_reaches_a_handler_that_computes(system: bool) -> None:
    """Unless its task is protected, as Trio's system tasks are."""
    seen: list[bool] = []
    done = trio.Event()

    async with opened() as (conn, peer):

        async def handler() -> None:
            for _ in range(3):
                await conn.next(1)
                seen.append(trio.lowlevel.currently_ki_protected())

        async def task() -> None:
            await _native.Drive(conn._core.hub, handler())
            done.set()

        async with trio.open_nursery() as nursery:
            if system:
                trio.lowlevel.spawn_system_task(task)
            else:
                nursery.start_soon(task)
            for n in range(3):
                await holds(lambda: is_waiting(conn))
                await send_all(peer, b"x")
                await holds(lambda: len(seen) > n)  # noqa: B023
            await within(done.wait())
    assert seen == [system] * 3


@pytest.mark.loops("trio")
@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_exception_of_a_signal_handler_is_the_handlers(direct: bool, when: str) -> None:
    """One that comes just before the handler runs, or just after."""
    if not direct:
        pytest.skip("there is no such moment")
    seen: list[BaseException] = []
    conns: list[Connection] = []
    end = KeyboardInterrupt()

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        try:
            await conn.next(1)
            await conn.next(1)
        except KeyboardInterrupt as exc:
            seen.append(exc)
        await conn.next(1)
        await conn.send(b"!")

    def interrupted(step: Callable[[], Any]) -> None:
        hub._unprotected = original
        if when != "before":
            step()
        raise end

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with connected(server) as sock:
            sock.setblocking(False)
            await holds(lambda: conns and is_waiting(conns[0]))
            hub: Any = conns[0]._core.hub
            original, hub._unprotected = hub._unprotected, interrupted
            await send_all(sock, b"x")
            await holds(lambda: seen)
            await send_all(sock, b"y")
            assert await read(sock, 1) == b"!"
            assert seen == [end]


@pytest.mark.loops("trio")
async def test_an_exception_of_a_signal_handler_ends_the_run_if_the_handler_waits(
    direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For something else: that knows its task, and would wake it wherever it is by then."""
    from anypoll._loop import trio_hub

    if not direct:
        pytest.skip("there is no such moment")
    ends: list[BaseException] = []
    monkeypatch.setattr(trio_hub, "_end_run", ends.append)
    conns: list[Connection] = []
    event = trio.Event()
    end = KeyboardInterrupt()

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        await conn.next(1)
        await event.wait()
        assert event.is_set()
        await conn.next(1)
        await conn.send(b"!")

    def interrupted(step: Callable[[], Any]) -> None:
        hub._unprotected = original
        step()
        raise end

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with connected(server) as sock:
            sock.setblocking(False)
            await holds(lambda: conns and is_waiting(conns[0]))
            hub: Any = conns[0]._core.hub
            original, hub._unprotected = hub._unprotected, interrupted
            await send_all(sock, b"x")
            await holds(lambda: ends)
            assert event.statistics().tasks_waiting == 1
            event.set()
            await send_all(sock, b"y")
            assert await read(sock, 1) == b"!"
    assert ends == [end]


@pytest.mark.loops("trio")
@pytest.mark.parametrize(
    "missing",
    [
        "instruments",
        "_ki_protected",
        "_abort_func",
        "_cancel_points",
        "_cancel_status",
        "effectively_cancelled",
        "ki_pending",
        "current task",
        "abort_func",
        "unprotected",
    ],
)
async def test_without_the_inside_of_trio_tasks_resume(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trio._core._run import GLOBAL_RUN_CONTEXT
    from trio._core._traps import WaitTaskRescheduled

    from anypoll._loop import trio_hub

    assert trio_hub._inside_of_trio() is not None
    task: Any = trio.lowlevel.current_task()
    with monkeypatch.context() as patch:
        if missing == "instruments":
            patch.setattr(task._runner, "instruments", None)
        elif missing == "_ki_protected":
            patch.delattr(task, "_ki_protected")
        elif missing.startswith("_"):  # a property, say
            patch.setattr(type(task), missing, property(lambda _: None))
        elif missing == "effectively_cancelled":
            patch.setattr(type(task._cancel_status), missing, None)
        elif missing == "ki_pending":
            patch.setattr(type(task._runner), missing, False)
        elif missing == "current task":
            patch.setattr(GLOBAL_RUN_CONTEXT, "task", None)
            patch.setattr(trio.lowlevel, "current_task", lambda: task)
        elif missing == "abort_func":
            patch.setattr(trio_hub, "_wait_trap", lambda abort: WaitTaskRescheduled(print))
        else:
            patch.setattr(trio_hub, "_unprotected", lambda step: step())
        inside = trio_hub._inside_of_trio()
    assert inside is None


# --- what others see of it ------------------------------------------------------------------------


async def test_debuggers_see_the_handler() -> None:
    async def waits_for_a_word(conn: Connection) -> None:
        await conn.next(1)

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        await waits_for_a_word(conn)

    conns: list[Connection] = []
    async with one(handler) as sock:
        await holds(lambda: conns and is_waiting(conns[0]))
        [drive] = [drive for drive in drives() if drive.cr_frame] or [None]
        if drive is not None:
            assert inspect.getcoroutinestate(drive) == inspect.CORO_SUSPENDED
            assert drive.__name__ == drive.cr_code.co_name == "handler"
            assert drive.cr_await.cr_code.co_name == "waits_for_a_word"
        for coroutine in handler_coroutines():
            names = [frame.f_code.co_name for frame in frames_of(coroutine)]
            assert names[-2:] == ["handler", "waits_for_a_word"]
        await send_all(sock, b"x")


def drives() -> list[Any]:
    """All there are, also of handlers that have ended."""
    return [o for o in gc.get_objects() if type(o) is _native.Drive]


def handler_coroutines() -> list[Any]:
    """The outermost coroutines of the tasks of handlers."""
    return [
        o
        for o in gc.get_objects()
        if inspect.iscoroutine(o) and o.__qualname__ == "Lifecycle._run" and o.cr_frame
    ]


def frames_of(coroutine: Any) -> list[Any]:
    """As Trio's `iter_await_frames` and asyncio's call graph walk them."""
    frames = []
    while hasattr(coroutine, "cr_frame"):
        frames.append(coroutine.cr_frame)
        coroutine = coroutine.cr_await
    return frames


async def test_one_that_runs_cannot_be_resumed(direct: bool) -> None:
    refusals: list[str] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        for drive in [drive for drive in drives() if drive.cr_running]:
            for call in (lambda: drive.send(None), lambda: drive.throw(KeyError()), drive.close):  # noqa: B023
                try:
                    call()
                except ValueError as exc:
                    refusals.append(str(exc))
        await conn.send(b"!")

    async with one(handler) as sock:
        await send_all(sock, b"x")
        assert await read(sock, 1) == b"!"
    assert refusals == (["coroutine already executing"] * 3 if direct else [])


@on_asyncio
@pytest.mark.parametrize("then", ["reads", "sleeps"])
async def test_a_cancellation_that_is_taken_back(then: str) -> None:
    """From 3.13 on asyncio's tasks forget it, earlier ones do not."""
    seen: list[str] = []
    resumed = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        resumed.set()
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        task.uncancel()
        try:
            await (conn.next(1) if then == "reads" else asyncio.sleep(0))
            seen.append("went on")
        except asyncio.CancelledError:
            seen.append("cancelled")

    async with one(handler) as sock:
        await send_all(sock, b"x")
        await within(resumed.wait())
        await send_all(sock, b"y")  # not before: a call that need not wait is not cancelled
        await holds(lambda: seen)
    assert seen == ["went on" if sys.version_info >= (3, 13) else "cancelled"]


# --- handlers that let the loop have a round ------------------------------------------------------


@pytest.mark.parametrize("by", ["hub", "task"])
async def test_other_tasks_have_their_turn_meanwhile(anyio_backend: Any, by: str) -> None:
    """Whatever a handler has made ready runs before its `send()` or `receive()` returns. Trio mixes
    the order within a round.
    """
    order: list[str] = []
    calls: list[anyio.Event] = [anyio.Event() for _ in range(20)]

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        if by == "task":
            await anyio.sleep(0)
        for n, event in enumerate(calls):
            event.set()
            await (conn.send(b"!") if n % 2 else conn.receive(1))
            order.append(f"handler {n}")

    async def listen(n: int) -> None:
        await calls[n].wait()
        order.append(f"listener {n}")

    async with anyio.create_task_group() as group:
        for n in range(20):
            group.start_soon(listen, n)
        async with one(handler) as sock:
            await parked()
            await send_all(sock, b"x" * 11)
            assert await read(sock, 10) == b"!" * 10
            await holds(lambda: len(order) == 40)
    late = 1 if anyio_backend[0] == "trio" else 0
    for n in range(20 - late):
        assert order.index(f"listener {n}") < order.index(f"handler {n + late}")


@pytest.mark.parametrize("by", ["hub", "task"])
async def test_none_is_resumed_twice_in_a_round(by: str) -> None:
    rounds = 0
    spans: list[int] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        if by == "task":
            await anyio.sleep(0)
        before = rounds
        for _ in range(50):
            await conn.send(b"!")
        spans.append(rounds - before)

    async with one(handler) as sock:
        await parked()
        sock.send(b"x")
        with anyio.fail_after(60):
            while not spans:
                await anyio.lowlevel.checkpoint()
                rounds += 1
    assert spans[0] >= 49


@pytest.mark.loops("asyncio")
async def test_a_loop_with_nothing_to_run_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """A few rounds pass within one callback; then the loop looks at its timers and descriptors."""
    loop: Any = asyncio.get_running_loop()
    counted = 0

    def count() -> None:
        nonlocal counted
        counted += 1
        original()

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        before = counted
        for _ in range(80):
            await conn.send(b"!")
        spans.append(counted - before)

    spans: list[int] = []
    async with one(handler) as sock:
        await parked()
        original = loop._run_once
        monkeypatch.setattr(loop, "_run_once", count)
        sock.send(b"x")
        await holds(lambda: spans)
    assert 80 / 8 <= spans[0] <= (60 if direct else 100)


@pytest.mark.parametrize("by", ["hub", "task"])
def test_a_loop_that_stops_runs_nothing_more(by: str) -> None:
    """`run_forever()` ends with the callbacks that are ready: nobody who rests goes on before, nor
    is a later request looked for.
    """
    seen: list[str] = []
    there: list[Connection] = []
    loop = asyncio.new_event_loop()
    may_end = asyncio.Event()

    async def handler(conn: Connection) -> None:
        there.append(conn)
        await conn.next(1)
        if not seen:
            if by == "task":
                await anyio.sleep(0)
            seen.append("stopped")
            other.send(b"y")
            loop.stop()
        await conn.send(b"!")
        seen.append("went on")

    async def main() -> None:
        nonlocal other
        async with one(handler) as sock, anypoll.serve(handler, host="127.0.0.1", port=0) as server:
            other = connected(server)
            with other:
                await holds(lambda: len(there) == 2 and all(map(is_waiting, there)))
                await settle()
                sock.send(b"x")
                await may_end.wait()

    other: Any = None
    anypoll.configure(spin=1000)
    try:
        task = loop.create_task(main())
        loop.run_forever()
        assert seen == ["stopped"]
        may_end.set()
        loop.run_until_complete(task)
        assert seen == ["stopped", "went on", "went on"]
    finally:
        anypoll.configure(spin=20)
        loop.close()


async def test_more_rest_than_one_turn_resumes() -> None:
    """All of them, whatever the number; rest.c resumes 256 before the loop gets its turn."""
    number = 300

    async def handler(conn: Connection) -> None:
        async for chunk in conn:
            await conn.send(chunk)

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        socks = [connected(server) for _ in range(number)]
        for sock in socks:
            sock.setblocking(False)
        await holds(lambda: len(server.connections) == number)
        for _ in range(3):
            await settle()
            for sock in socks:
                sock.send(b"x")
            for sock in socks:
                assert await read(sock, 1) == b"x"
        for sock in socks:
            sock.close()


@pytest.mark.parametrize("by", ["hub", "task"])
@pytest.mark.parametrize("call", ["send", "receive"])
@pytest.mark.parametrize("how", ["scope", "task", "itself"])
async def test_a_cancellation_finds_one_that_rests(
    call: str, how: str, anyio_backend: Any, by: str
) -> None:
    """`receive()` leaves its bytes; on Trio a `send()` that has written returns."""
    on_trio = anyio_backend[0] == "trio"
    if how == "task" and on_trio:
        pytest.skip("Trio's tasks are not cancelled one by one")
    if how == "itself" and call == "send":
        pytest.skip("nothing is sent in a cancelled scope")
    ready = anyio.Event()
    seen: list[str] = []
    victim: list[Any] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        if by == "task":
            await anyio.sleep(0)
        if how == "task":
            victim.append(asyncio.current_task())
        with anyio.CancelScope() as scope:
            if how == "scope":
                victim.append(scope)
            if how == "itself":
                scope.cancel()
            ready.set()
            try:
                await (conn.send(b"!") if call == "send" else conn.receive(1))
                seen.append("went on")
                await conn.next(100)
            except BaseException as exc:
                seen.append(type(exc).__name__)
                if how != "task":
                    raise
                task: Any = asyncio.current_task()
                task.uncancel()
        assert await conn.next(1) == (b"y" if call == "receive" and len(seen) == 1 else b"z")
        await conn.send(b"?")

    async def cancel() -> None:
        await ready.wait()
        if victim:
            victim[0].cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(cancel)
        async with one(handler) as sock:
            await parked()
            await send_all(sock, b"xy" if call == "receive" else b"x")
            await holds(lambda: seen)
            await send_all(sock, b"z")
            assert (await read(sock, 2 if call == "send" else 1))[-1:] == b"?"
    if on_trio and how == "scope":  # Trio mixes the order within a round
        assert seen in ([["went on", "Cancelled"]] + [["Cancelled"]] * (call == "receive"))
    else:
        assert seen in (["Cancelled"], ["CancelledError"])


@pytest.mark.parametrize("by", ["hub", "task"])
@pytest.mark.loops("trio")
async def test_trio_counts_the_points_of_one_that_rests(by: str) -> None:
    results: list[str] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        if by == "task":
            await anyio.sleep(0)
        for _ in range(2):
            with trio.testing.assert_checkpoints():
                await conn.send(b"!")
            with trio.testing.assert_checkpoints():
                await conn.receive(1)
        results.append("checkpoints")

    async with one(handler) as sock:
        await parked()
        await send_all(sock, b"abc")
        assert await read(sock, 2) == b"!!"
        await holds(lambda: results)


@on_asyncio
def test_a_loop_that_is_forgotten_while_handlers_rest(
    run: Callable[[Any], Any], direct: bool
) -> None:
    """The list of those that rest goes with it."""
    seen: list[weakref.ref[Any]] = []

    async def main() -> None:
        async with opened() as (conn, peer):
            hub = conn._core.hub

            async def handler() -> None:
                await conn.next(1)
                await conn.send(b"!")
                await conn.send(b"!")

            drive = _native.Drive(hub, handler())
            task = asyncio.ensure_future(_awaited(drive))
            await holds(lambda: is_waiting(conn))
            await send_all(peer, b"x")
            await holds(lambda: "resting" in repr(drive) or task.done())
            if "resting" in repr(drive):
                seen.append(weakref.ref(task))
                hub._stop_resting()
                assert "woken" in repr(drive)
                assert not hub._can_rest
            await within(task)
            assert await read(peer, 2) == b"!!"

    run(main)
    gc.collect()
    assert all(ref() is None for ref in seen)


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


# --- when something goes wrong in between ---------------------------------------------------------


class Between:
    """Lies between a handler and an operation, and acts when that has begun to wait."""

    def __init__(self, operation: Any, act: Callable[[], None]) -> None:
        self._operation = operation
        self._act = act

    def __await__(self) -> Generator[Any, Any, Any]:
        yielded = self._operation.send(None)
        self._act()
        while True:
            try:
                value = yield yielded
            except BaseException as exc:  # noqa: BLE001
                step, value = self._operation.throw, exc
            else:
                step = self._operation.send
            try:
                yielded = step(value)
            except StopIteration as stop:
                return stop.value


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("by", ["hub", "task"])
async def test_a_close_before_the_scheduler_sees_the_wait(
    by: str, cancel: bool, anyio_backend: Any
) -> None:
    seen: list[str] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        if by == "task":
            await anyio.sleep(0)
        with anyio.CancelScope() as scope:

            def act() -> None:
                conn.abort()
                if cancel:
                    scope.cancel()

            try:
                await Between(conn.next(1), act)
            except BaseException as exc:
                seen.append(type(exc).__name__)
                raise
        seen.append("went on")
        await anyio.sleep(0)

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with connected(server) as sock:
            sock.send(b"x")
            await holds(lambda: sum(server.statistics().closed.values()) == 1)
    if cancel and anyio_backend[0] == "asyncio":  # the first exception that comes
        assert seen == ["CancelledError", "went on"]
    else:
        assert seen == ["ClosedResourceError"]


@pytest.mark.loops("trio")
async def test_a_wait_that_is_over_wakes_nothing_else() -> None:
    """Closed before the scheduler has seen the wait, which then is given up: what the task waits
    for next is not ended by it.
    """

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        waiting: Any = conn.next(1)
        waiting.send(None)
        conn.abort()
        waiting.close()
        await released.wait()
        seen.append("released")

    seen: list[str] = []
    released = trio.Event()
    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with connected(server) as sock:
            sock.send(b"x")
            await holds(lambda: server.connections)
            await settle()
            assert not seen
            released.set()
            await holds(lambda: seen)


@pytest.mark.loops("trio")
@pytest.mark.parametrize("when", ["after the step", "before the trap"])
async def test_a_signal_handler_that_closes_before_the_task_is_blocked(
    when: str, direct: bool
) -> None:
    """Frames of Python's in which one may run lie between the handler's wait and the task's."""
    if not direct:
        pytest.skip("there is no such moment")
    seen: list[str] = []

    async def handler(conn: Connection) -> None:
        hub: Any = conn._core.hub
        unprotected, original = hub._unprotected, hub._wait_trap

        def step_and_close(step: Callable[[], Any]) -> None:
            hub._unprotected = unprotected
            step()
            conn.abort()

        def close_and_cancel(abort: Any) -> Any:
            hub._wait_trap = original
            conn.abort()
            scope.cancel()
            return original(abort)

        if when == "before the trap":
            await anyio.sleep(0)  # from here on it is stepped by its task
            hub._wait_trap = close_and_cancel
        else:
            hub._unprotected = step_and_close
        with anyio.CancelScope() as scope:
            try:
                await conn.next(1)
                await conn.next(1)
            except anyio.ClosedResourceError:
                seen.append("closed")
                raise

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with connected(server) as sock:
            await settle()
            with suppress(ConnectionResetError):
                sock.send(b"x")
            await holds(lambda: sum(server.statistics().closed.values()) == 1)
    assert seen == ["closed"]


@pytest.mark.parametrize("by", ["hub", "task"])
async def test_an_operation_that_has_not_begun_is_nothing_to_yield(by: str) -> None:
    """Neither asyncio nor Trio knows it."""
    seen: list[type[BaseException]] = []

    class Wrong:
        def __init__(self, conn: Connection) -> None:
            self._operation: Any = conn.next(1)

        def __await__(self) -> Generator[Any, Any, None]:
            yield self._operation

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        if by == "task":
            await anyio.sleep(0)
        wrong = Wrong(conn)
        try:
            await wrong
        except Exception as exc:  # noqa: BLE001
            seen.append(type(exc))
        wrong._operation.close()
        await conn.send(b"!")

    async with one(handler) as sock:
        await settle()
        await send_all(sock, b"x")
        assert await read(sock, 1) == b"!"
    assert seen in ([RuntimeError], [TypeError])


class WokenLate:
    """Awaits a drive; the first time its task is to be woken, there is no memory."""

    _asyncio_future_blocking = True

    def __init__(self, drive: Any) -> None:
        self._drive = drive
        self.failures = 0
        self.on_failure: Callable[[], Any] = lambda: None
        self.get_loop, self.cancel, self.result = drive.get_loop, drive.cancel, drive.result

    def __await__(self) -> Generator[Any, Any, Any]:
        yielded = self._drive.send(None)
        while True:
            try:
                value = yield self if yielded is self._drive else yielded
            except BaseException as exc:  # noqa: BLE001
                step, value = self._drive.throw, exc
            else:
                step = self._drive.send
            try:
                yielded = step(value)
            except StopIteration as stop:
                return stop.value

    def add_done_callback(self, callback: Any, *, context: contextvars.Context) -> None:
        def fail_once(future: Any) -> None:
            self.failures += 1
            if self.failures == 1:
                self.on_failure()
                raise MemoryError
            callback(future)

        self._drive.add_done_callback(fail_once, context=context)


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize("soon", [True, False], ids=["woken later", "not woken at all"])
@pytest.mark.parametrize("how", ["returns", "raises", "waits"])
async def test_a_cancellation_between_the_handlers_step_and_its_tasks(
    how: str, soon: bool, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the handler has come to reaches the task, and then that is cancelled."""
    if not direct:
        pytest.skip("they are one")
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    seen: list[str] = []

    def no_memory(*_args: Any, **_kwargs: Any) -> Any:
        raise MemoryError

    def report(_loop: Any, context: dict[str, Any]) -> None:
        monkeypatch.undo()
        if isinstance(context["exception"], MemoryError):
            task.cancel("cancelled")

    monkeypatch.setattr(loop, "_exception_handler", report)
    async with opened() as (conn, peer):

        async def handler() -> str:
            await conn.next(1)
            if how == "waits":
                await future
            if how == "raises":
                raise LookupError
            return "returned"

        async def run() -> None:
            with suppress(LookupError):
                seen.append(await late)  # type: ignore[arg-type]
            try:
                await asyncio.sleep(0)
                seen.append("went on")
            except asyncio.CancelledError as exc:
                seen.append(str(exc))

        late = WokenLate(_native.Drive(conn._core.hub, handler()))
        task = asyncio.ensure_future(run())
        if soon:
            late.on_failure = lambda: loop.call_soon(task.cancel, "cancelled")
        else:
            late.on_failure = lambda: monkeypatch.setattr(loop, "call_soon", no_memory)
        await holds(lambda: is_waiting(conn))
        peer.send(b"x")
        if how == "waits":
            with pytest.raises(asyncio.CancelledError):
                await within(task)
        else:
            await within(task)
    assert future.cancelled() == (how == "waits")
    expected = {"returns": ["returned", "cancelled"], "raises": ["cancelled"], "waits": []}[how]
    assert seen == expected
    assert late.failures == 2


class Interrupted(Exception):
    """As a signal handler may raise it anywhere."""


@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.loops("trio")
async def test_an_exception_before_the_task_waits_is_the_handlers(
    rests: bool, direct: bool
) -> None:
    """Making Trio's trap takes a frame of Python's, in which a signal handler may run."""
    if not direct:
        pytest.skip("there is no such moment")
    seen: list[str] = []

    async def handler(conn: Connection) -> None:
        await anyio.sleep(0)  # from here on it is stepped by its task
        hub = conn._core.hub
        original = hub._wait_trap

        def interrupted(_abort: Any) -> Any:
            hub._wait_trap = original
            raise Interrupted

        hub._wait_trap = interrupted
        try:
            await (conn.send(b"?") if rests else conn.next(1))
        except Interrupted:
            seen.append("interrupted")
        await conn.send(await conn.next(1))
        seen.append("went on")

    async with one(handler) as sock:
        await holds(lambda: seen)
        await send_all(sock, b"x")
        assert await read(sock, 1 + rests) == b"?" * rests + b"x"
        await holds(lambda: len(seen) == 2)
    assert seen == ["interrupted", "went on"]


@pytest.mark.parametrize("by", ["hub", "task"])
@pytest.mark.loops("asyncio")
async def test_an_exception_before_a_round_is_asked_for(
    by: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio's `call_soon()` is interpreted: a signal handler may run in it. Those that rest go on
    all the same.
    """
    if not direct:
        pytest.skip("no rounds are asked for")
    seen: list[str] = []
    loop = asyncio.get_running_loop()
    original = loop.call_soon

    def interrupted(callback: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(callback, "__name__", "") != "_resume_rested":
            return original(callback, *args, **kwargs)
        monkeypatch.setattr(loop, "call_soon", original)
        raise Interrupted

    conns: list[Connection] = []

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        await conn.next(1)
        if by == "task":
            await anyio.sleep(0)
        hub: Any = conn._core.hub
        hub._queue = None  # or it would not ask for a round in which nobody else would run
        monkeypatch.setattr(loop, "call_soon", interrupted)
        try:
            await conn.send(b"!")
            seen.append("sent")
        except Interrupted:
            seen.append("interrupted")
        await conn.send(b"?")
        seen.append("went on")

    monkeypatch.setattr(loop, "_exception_handler", lambda _, context: seen.append("reported"))
    async with one(handler) as sock:
        await parked()
        await send_all(sock, b"x")
        assert await read(sock, 2) == b"!?"
        await holds(lambda: seen[-1:] == ["went on"])
    first = ["reported", "sent"] if by == "hub" else ["interrupted"]
    assert seen == [*first, "went on"]


async def test_a_handler_that_closes_its_own_task(anyio_backend: Any, direct: bool) -> None:
    """The task's coroutine does not run while the hub represents it, so it lets itself be closed,
    and with it goes what awaited the handler. That stays until the handler has stopped.
    """
    if not direct:
        pytest.skip("its coroutine would run")
    seen: list[tuple[int, int]] = []

    def drives() -> int:
        return sum(type(o) is _native.Drive for o in gc.get_objects())

    async with opened("unix") as (conn, peer):

        async def handler() -> None:
            await conn.next(1)
            if anyio_backend[0] == "trio":
                coroutine: Any = trio.lowlevel.current_task().coro
            else:
                task: Any = asyncio.current_task()
                coroutine = task.get_coro()
            before = drives()
            with suppress(ValueError):
                coroutine.close()
            seen.append((before, drives()))

        async def run() -> None:
            await _native.Drive(conn._core.hub, handler())

        with suppress(BaseException):  # the task cannot go on
            async with anyio.create_task_group() as group:
                group.start_soon(run)
                await holds(lambda: is_waiting(conn))
                peer.send(b"x")
        assert seen == [(1, 1)]


@on_asyncio
async def test_a_dict_of_current_tasks_that_is_not_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in CPython 3.14, where native tasks are kept elsewhere."""
    empty = SimpleNamespace(tasks=SimpleNamespace(_current_tasks={}))
    monkeypatch.setattr(asyncio_hub, "asyncio", empty)
    tasks: list[Any] = []

    async def handler(conn: Connection) -> None:
        for _ in range(3):
            await conn.next(1)
            tasks.append(asyncio.current_task())
            with anyio.CancelScope():
                await conn.send(b"!")

    async with one(handler) as sock:
        for n in range(3):
            await send_all(sock, b"x")
            assert await read(sock, 1) == b"!"
            assert len(tasks) == n + 1
    assert len(set(tasks)) == 1
    assert isinstance(tasks[0], asyncio.Task)
