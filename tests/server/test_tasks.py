"""The tasks of handlers are tasks of the server's group, whoever starts them."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from contextlib import suppress
from typing import Any

import anyio
import pytest
import trio
from peers import holds, read_to_end, send_all, settle, within
from serving import FOR_EVER, HOST, client, echo, is_served, local, once

import anypoll
from anypoll import Connection
from anypoll._loop import asyncio_hub
from anypoll._loop.asyncio_hub import AsyncioHub
from anypoll._loop.hub import Hub
from anypoll._loop.trio_hub import TrioHub
from anypoll._network.listener import SocketListener

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.loops("asyncio", "uvloop")


@pytest.fixture(params=["lean", "by the group"], autouse=True)
def lean(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each test holds for both ways."""
    if request.param != "lean":
        monkeypatch.setattr(AsyncioHub, "tasks_in", Hub.tasks_in)
        monkeypatch.setattr(TrioHub, "tasks_in", Hub.tasks_in)
    return bool(request.param == "lean")


class Stop(BaseException):
    """Ends a server."""


def groups(task: object) -> bool:
    """Whether the group made a handle for the task, and a coroutine around its own."""
    coroutine: Any = task.coro if isinstance(task, trio.lowlevel.Task) else task.get_coro()  # type: ignore[attr-defined]
    return "_run_coro" in coroutine.__qualname__


def current_task() -> object:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return trio.lowlevel.current_task()


async def test_it_is_started_as_it_was_asked_for(lean: bool) -> None:
    """With this version of AnyIO its registers are as expected."""
    seen: list[bool] = []

    async def handler(conn: Connection) -> None:
        seen.append(groups(current_task()))
        await echo(conn)

    async with local(handler) as server, client(server) as sock:
        await is_served(sock)
    assert seen == [not lean]


async def test_anyio_knows_it() -> None:
    seen: dict[str, Any] = {}

    async def handler(conn: Connection) -> None:
        seen["task"] = anyio.get_current_task()
        seen["deadline"] = anyio.current_effective_deadline()
        seen["running"] = anyio.get_running_tasks()
        seen["pending"] = anyio.get_current_task().has_pending_cancellation()
        await echo(conn)

    with anyio.fail_after(1000) as scope:
        async with local(handler) as server, client(server) as sock:
            await is_served(sock)
            running = anyio.get_running_tasks()
            parents = {task.id: task.parent_id for task in running}
            mine = anyio.get_current_task().id
    task = seen["task"]
    assert task in seen["running"]
    assert task in running
    assert task.name == "anypoll._server.lifecycle.Lifecycle._run"
    assert parents[parents[task.id]] == mine  # its parent is the task that holds the group
    assert seen["deadline"] == scope.deadline
    assert not seen["pending"]


async def test_a_deadline_that_was_moved() -> None:
    """The group's scope is the innermost one of the task, not a copy."""
    deadlines: list[float] = []

    async def handler(conn: Connection) -> None:
        while True:
            await once(conn)
            deadlines.append(anyio.current_effective_deadline())

    with anyio.CancelScope() as scope:
        async with local(handler) as server, client(server) as sock:
            await is_served(sock)
            scope.deadline = anyio.current_time() + 500
            await is_served(sock)
            await is_served(sock)
    assert deadlines[-1] == scope.deadline


async def test_a_cancellation_comes_again() -> None:
    """As long as the scope is cancelled, each wait of the task is."""
    times = 0

    async def handler(conn: Connection) -> None:
        nonlocal times
        await once(conn)
        for _ in range(3):
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                times += 1
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0)
            times += 1

    with anyio.CancelScope() as scope:
        async with local(handler) as server, client(server) as sock:
            await is_served(sock)
            scope.cancel()
            await anyio.sleep_forever()
    assert times == 4


async def test_scopes_and_groups_inside() -> None:
    """They end with the server's, unless they are shielded."""
    ended: list[str] = []
    release = anyio.Event()

    async def inner(name: str) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(name)

    async def handler(conn: Connection) -> None:
        await once(conn)
        with anyio.move_on_after(0) as short:
            await anyio.sleep_forever()
        assert short.cancelled_caught
        async with anyio.create_task_group() as group:
            group.start_soon(inner, "child")
            try:
                await inner("self")
            finally:
                with anyio.CancelScope(shield=True):
                    await release.wait()
                    ended.append("shielded")

    with anyio.fail_after(60) as outer, anyio.CancelScope() as scope:
        async with local(handler) as server, client(server) as sock:
            await is_served(sock)
            await settle()
            scope.cancel()
            async with anyio.create_task_group() as watchers:
                watchers.cancel_scope.shield = True
                await settle()
                assert set(ended) == {"child", "self"}
                release.set()
    assert not outer.cancel_called
    assert ended[-1] == "shielded"


async def test_the_server_waits_for_it() -> None:
    """Even if it does not give in, and even if whoever waits is cancelled natively."""
    ended = False
    release = anyio.Event()

    async def handler(conn: Connection) -> None:
        nonlocal ended
        await once(conn)
        with anyio.CancelScope(shield=True):
            await release.wait()
        ended = True

    async def releasing() -> None:
        await settle()
        assert not ended
        release.set()

    async with anyio.create_task_group() as group:
        async with local(handler, shutdown_timeout=0) as server, client(server) as sock:
            await is_served(sock)
            group.start_soon(releasing)
        assert ended


@pytest.mark.parametrize("when", ["before the end", "at the end"])
async def test_the_server_waits_for_it_whatever_is_raised(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener cannot be closed; the other one is, and `shutdown()` returns."""
    ended = False
    release = anyio.Event()
    close = SocketListener._close
    shut_down = anyio.Event()

    def failing(listener: SocketListener) -> None:
        close(listener)
        if listener is server.listeners[0]:
            raise LookupError

    async def handler(conn: Connection) -> None:
        nonlocal ended
        await once(conn)
        with anyio.CancelScope(shield=True):
            await release.wait()
        ended = True

    async def releasing() -> None:
        await server.wait_shutting_down()
        await settle()
        assert not ended
        with suppress(LookupError):
            await server.shutdown()
        assert ended
        shut_down.set()

    async def release_later() -> None:
        await server.wait_shutting_down()
        await settle()
        release.set()

    listeners = [await anypoll.create_tcp_listener(local_host=HOST) for _ in range(2)]
    async with anyio.create_task_group() as group:
        with pytest.raises(BaseExceptionGroup) as raised:  # noqa: PT012
            async with (
                anypoll.serve(handler, listeners=listeners) as server,
                client(server) as sock,
            ):
                await is_served(sock)
                group.start_soon(releasing)
                group.start_soon(release_later)
                await settle()
                monkeypatch.setattr(SocketListener, "_close", failing)
                if when == "before the end":
                    raise KeyError
        assert ended
        assert raised.value.split(LookupError)[1] is None
        assert all(listener._closed for listener in server.listeners)
        await within(shut_down.wait())
        monkeypatch.undo()


async def test_what_ends_the_program_leaves_the_server() -> None:
    """Of each task, in one group."""
    begun = 0

    async def handler(conn: Connection) -> None:
        nonlocal begun
        await once(conn)
        begun += 1
        try:
            await anyio.sleep_forever()
        finally:
            raise Stop(begun)

    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with local(handler) as server, client(server) as a, client(server) as b:
            await is_served(a)
            await is_served(b)
            await settle()
            raise Stop

    def leaves(exc: BaseException) -> list[BaseException]:
        if isinstance(exc, BaseExceptionGroup):
            return [leaf for e in exc.exceptions for leaf in leaves(e)]
        return [exc]

    found = leaves(caught.value)
    assert {type(exc) for exc in found} == {Stop}
    assert len(found) == 3


def test_what_ends_the_program_leaves_a_server_of_plain_asyncio() -> None:
    """There nobody has told sniffio which library is running, but the task that asks for it."""

    async def handler(_conn: Connection) -> None:
        raise Stop

    async def main() -> None:
        with anyio.fail_after(60):
            async with local(handler) as server, client(server):
                await server._ended.wait()

    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(main())
    stopped, others = caught.value.split(Stop)
    assert stopped is not None
    assert others is None


@on_asyncio
async def test_a_native_cancellation_ends_the_server() -> None:
    """As it ends any task group."""
    tasks: list[asyncio.Task[Any]] = []

    async def handler(conn: Connection) -> None:
        task: Any = asyncio.current_task()
        tasks.append(task)
        await echo(conn)

    with anyio.fail_after(60):
        async with local(handler, shutdown_timeout=FOR_EVER) as server, client(server) as sock:
            await is_served(sock)
            tasks[0].cancel()
            await server._ended.wait()
    assert tasks[0].cancelled()


@on_asyncio
async def test_a_task_that_is_cancelled_before_it_begins(lean: bool) -> None:
    """Its coroutine never runs. The server ends all the same, and nothing is left open."""
    if not lean:
        pytest.skip("AnyIO's own coroutine complains that it has not awaited ours")
    started = anyio.Event()

    async def handler(conn: Connection) -> None:
        started.set()
        await echo(conn)

    def prepare(_conn: Connection) -> None:
        loop.call_soon(lambda: [task.cancel() for task in handlers()])

    def handlers() -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if "_run" in task.get_name()]

    loop = asyncio.get_running_loop()
    options = {"on_prepare": prepare, "shutdown_timeout": 0}
    with anyio.fail_after(60):
        async with local(handler, **options) as server, client(server):
            await server._ended.wait()
    assert not started.is_set()


@on_asyncio
async def test_a_task_factory_is_asked(lean: bool) -> None:
    made: list[object] = []

    def factory(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    loop = asyncio.get_running_loop()
    async with local(echo) as server, client(server) as sock:
        loop.set_task_factory(factory)
        await is_served(sock)
        assert len(made) == 1
        loop.set_task_factory(None)


@on_asyncio
async def test_an_anyio_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group starts the tasks, and nothing else changes."""
    backend: Any = pytest.importorskip("anyio._backends._asyncio")
    monkeypatch.delattr(backend, "_task_states")
    assert asyncio_hub._register_of_tasks() is None
    monkeypatch.undo()
    monkeypatch.setattr(backend, "_task_states", {})
    assert asyncio_hub._register_of_tasks() is None
    monkeypatch.undo()
    monkeypatch.setattr(backend, "TaskState", lambda parent: None)
    assert asyncio_hub._register_of_tasks() is None
    monkeypatch.undo()
    monkeypatch.setattr(backend.CancelScope, "_shield", False)
    assert asyncio_hub._register_of_tasks() is None
    monkeypatch.undo()
    assert asyncio_hub._register_of_tasks() is not None


async def test_nothing_is_left_of_it() -> None:
    """The collector is not needed for the task."""
    gone: list[weakref.ref[Any]] = []

    async def handler(conn: Connection) -> None:
        task: Any = current_task()
        gone.append(weakref.ref(task))
        await echo(conn)

    gc.collect()
    gc.disable()
    try:
        async with local(handler) as server:
            async with client(server) as sock:
                await is_served(sock)
            with anyio.fail_after(60):
                while server.connections or gone[0]() is not None:
                    await anyio.sleep(0)
    finally:
        gc.enable()


# --- the end, which needs no waiting as a rule ---------------------------------------------------


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
async def test_an_end_that_has_to_wait_has_a_deadline(hooked: bool) -> None:
    """Input that nobody has read makes the close linger, for `write_timeout` at most."""
    options: dict[str, Any] = {"write_timeout": 0.05, "shutdown_timeout": FOR_EVER}

    async def connected(_conn: Connection) -> None: ...

    async def handler(conn: Connection) -> None:
        await conn.next(1)

    if hooked:
        options["on_connect"] = connected
    async with local(handler, **options) as server, client(server) as sock:
        await send_all(sock, b"more than it reads")
        assert await within(read_to_end(sock)) == b""
        await holds(lambda: not server.connections)
        assert server.statistics().closed == {"done": 1}


@pytest.mark.parametrize("left", ["nothing", "output", "callback"])
async def test_what_the_end_has_to_do(left: str) -> None:
    """The same is counted, and nothing is lost, whether or not the end has to wait."""
    done: list[str] = []
    size = 8 << 20 if left == "output" else 2

    async def callback() -> None:
        await anyio.sleep(0)
        done.append("callback")

    async def handler(conn: Connection) -> None:
        if left == "callback":
            conn.add_close_callback(callback)
        await conn.next(1)
        conn.writer.write(bytes(size))
        await conn.next(1)

    async with local(handler) as server, client(server) as sock:
        await send_all(sock, b"a")
        sock.shutdown(socket.SHUT_WR)
        assert len(await within(read_to_end(sock))) == size
        await holds(lambda: not server.connections)
        statistics = server.statistics()
    assert statistics.closed == {"eof": 1}
    assert (statistics.bytes_received, statistics.bytes_sent) == (1, size)
    assert done == ["callback"] * (left == "callback")
