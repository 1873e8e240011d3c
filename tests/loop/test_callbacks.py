"""Close callbacks: when they run, in which order, for how long, and that each runs once."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError
from peers import holds, opened, reset, served, settle, within
from serving import HOST, all_is_accounted_for, errors, local  # noqa: F401 -- a fixture

import anypoll
from anypoll import Connection

pytestmark = pytest.mark.anyio

Notes = list[Any]


@pytest.fixture
async def conn() -> AsyncIterator[Connection]:
    async with opened() as (conn, _):
        yield conn


def logged(log: pytest.LogCaptureFixture) -> list[str]:
    """The messages above debug level, which are accounted for now."""
    return [f"{record.name}: {record.getMessage()}" for record in errors(log)]


def plain(notes: Notes, what: Any) -> Callable[[], None]:
    def callback() -> None:
        notes.append(what)

    return callback


def slow(notes: Notes, what: Any) -> Callable[[], Coroutine[Any, Any, None]]:
    """Async, and it waits for something."""

    async def callback() -> None:
        await anyio.sleep(0.001)
        notes.append(what)

    return callback


def fill(conn: Connection, notes: Notes) -> None:
    """Plain and async ones in turn: what runs last is added first."""
    for n in range(6):
        conn.add_close_callback((plain if n % 2 else slow)(notes, n))


#: Where the end waits for them; and where it does not, and async ones come later.
IN_ORDER = [5, 4, 3, 2, 1, 0]
PLAIN_FIRST = [5, 3, 1, 4, 2, 0]


async def close(conn: Connection, how: str) -> None:
    if how == "aclose":
        await conn.aclose()
    elif how == "block":
        async with conn:
            pass
    elif how == "cancelled aclose":
        with anyio.CancelScope() as scope:
            scope.cancel()
            await conn.aclose()
            pytest.fail("the call did not see the cancellation")
    elif how == "abort":
        conn.abort()
    elif how == "detach":
        conn.detach()[0].close()
    elif how == "idle":
        conn.idle_timeout = 0.001
        await holds(lambda: not conn.is_active)


@asynccontextmanager
async def visited(handler: Any, **options: Any) -> AsyncIterator[anypoll.Server]:
    """A server with one client, until its connection has been closed."""
    async with local(handler, **options) as server:
        with socket.create_connection((HOST, server.port)) as client:
            await holds(lambda: server.connections or server.statistics().closed)
            yield server
            with suppress(OSError):  # the server may have closed it
                client.shutdown(socket.SHUT_WR)
            await holds(lambda: server.statistics().closed)


async def until_cancelled(notes: Notes) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        notes.append("cancelled")


# --- all ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["aclose", "block", "cancelled aclose"])
async def test_a_close_runs_them_last_in_first_out(conn: Connection, how: str) -> None:
    notes: Notes = []
    fill(conn, notes)
    assert notes == []
    await close(conn, how)
    assert notes == IN_ORDER
    await conn.aclose()
    conn.abort()
    await settle()
    assert notes == IN_ORDER


@pytest.mark.parametrize("how", ["abort", "detach", "idle"])
@pytest.mark.parametrize("waits", [False, True])
async def test_what_cannot_wait_runs_plain_ones_first(
    conn: Connection, how: str, waits: bool
) -> None:
    """An `aclose()` that follows waits for the others."""
    notes: Notes = []
    fill(conn, notes)
    await close(conn, how)
    if how != "idle":
        assert notes == PLAIN_FIRST[:3]
    if waits:
        await conn.aclose()
        assert notes == PLAIN_FIRST
    await holds(lambda: notes == PLAIN_FIRST)
    conn.abort()
    await conn.aclose()
    conn.add_close_callback(plain(notes, "late"))
    assert notes == [*PLAIN_FIRST, "late"]


async def test_an_abort_of_a_draining_aclose(conn: Connection) -> None:
    notes: Notes = []
    fill(conn, notes)
    conn.writer.write(bytes(16 << 20))
    async with anyio.create_task_group() as group:
        group.start_soon(conn.aclose)
        await holds(lambda: not conn.is_active)
        assert notes == []
        conn.abort()
        assert notes == PLAIN_FIRST[:3]
    assert notes == PLAIN_FIRST


async def test_a_peer_that_goes_releases_nothing() -> None:
    notes: Notes = []
    async with opened("tcp") as (conn, peer):
        fill(conn, notes)
        reset(peer)
        await holds(lambda: not conn.is_active)
        assert notes == []
    assert notes == IN_ORDER


async def forgotten(notes: Notes) -> socket.socket:
    ours, peer = socket.socketpair()
    conn = await Connection.from_socket(ours)
    conn.add_close_callback(lambda given: notes.append(given.fileno()))
    conn.add_close_callback(slow(notes, "async"))
    return peer


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_forgotten_connection_runs_them_in_its_loop(elsewhere: bool) -> None:
    notes: Notes = []
    with await forgotten(notes), pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031
        if elsewhere:
            thread = threading.Thread(target=gc.collect)
            thread.start()
            thread.join()
        else:
            gc.collect()
        assert notes == []
        await holds(lambda: notes == ["async", -1])
        gc.collect()


async def test_a_late_one_runs_at_once(conn: Connection, log: pytest.LogCaptureFixture) -> None:
    """O21. One that raises is only logged."""
    notes: Notes = []
    await conn.aclose()
    conn.add_close_callback(plain(notes, "plain"))
    assert notes == ["plain"]
    conn.add_close_callback(slow(notes, "async"))
    assert notes == ["plain"]
    await holds(lambda: notes == ["plain", "async"])
    conn.add_close_callback(fail)
    [message] = logged(log)
    assert "has failed" in message


# --- aclose() ------------------------------------------------------------------------------------


async def test_the_connection_is_closed_before_they_run(conn: Connection) -> None:
    """O7."""
    notes: Notes = []
    fd = conn.fileno()

    async def look(given: Connection) -> None:
        await anyio.sleep(0)
        notes.append((given is conn, given.fileno(), given.is_active))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        with pytest.raises(ClosedResourceError):
            await given.receive()

    conn.add_close_callback(look)
    await conn.aclose()
    assert notes == [(True, -1, False)]


def returning(function: Callable[[], Any]) -> Callable[[], Any]:
    """A plain function that returns something to be awaited."""

    def callback() -> Any:
        return function()

    return callback


def fail() -> None:
    raise LookupError


class Forms:
    """Callables of all kinds."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def none(self) -> None:
        self.notes.append(())

    def one(self, conn: Connection) -> None:
        self.notes.append(conn)

    async def async_none(self) -> None:
        await anyio.sleep(0)
        self.notes.append(())

    async def async_one(self, conn: Connection) -> None:
        await anyio.sleep(0)
        self.notes.append(conn)

    def optional(self, conn: Connection | None = None) -> None:
        self.notes.append(() if conn is None else conn)

    async def __call__(self, conn: Connection) -> None:
        await anyio.sleep(0)
        self.notes.append(conn)


@pytest.mark.parametrize(
    ("make", "with_conn"),
    [
        (lambda f: f.none, False),
        (lambda f: f.one, True),
        (lambda f: f.async_none, False),
        (lambda f: f.async_one, True),
        (lambda f: f.optional, False),
        (lambda f: f, True),
        (lambda f: functools.partial(f.async_one), True),
        (lambda f: functools.partial(f.notes.append, ()), False),
        (lambda f: returning(f.async_none), False),
        (lambda f: f.notes.append, True),
        (lambda f: f.notes.copy, None),
    ],
)
@pytest.mark.parametrize("how", ["aclose", "abort"])
async def test_callables_of_all_kinds(
    conn: Connection, make: Any, with_conn: bool | None, how: str
) -> None:
    notes: Notes = []
    conn.add_close_callback(make(Forms(notes)))
    await close(conn, how)
    expected = [] if with_conn is None else [conn if with_conn else ()]
    await holds(lambda: notes == expected)


async def test_several_aclose_at_once_wait_for_all(conn: Connection) -> None:
    notes: Notes = []
    go = anyio.Event()
    conn.add_close_callback(plain(notes, "last"))
    conn.add_close_callback(go.wait)

    async def close() -> None:
        await conn.aclose()
        notes.append("closed")

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(close)
        await settle()
        assert notes == []
        assert conn.fileno() == -1
        go.set()
    assert notes == ["last", "closed", "closed", "closed"]


async def test_a_cancellation_meanwhile_is_seen_afterwards(conn: Connection) -> None:
    notes: Notes = []
    begun, go = anyio.Event(), anyio.Event()

    async def callback() -> None:
        begun.set()
        await go.wait()
        notes.append("ended")

    conn.add_close_callback(callback)
    async with anyio.create_task_group() as group:
        group.start_soon(conn.aclose)
        await begun.wait()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await settle()
            go.set()
    assert notes == ["ended"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_native_cancel_does_not_reach_them(conn: Connection) -> None:
    notes: Notes = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def callback() -> None:
        begun.set()
        await go.wait()
        notes.append("ended")

    conn.add_close_callback(callback)
    task = asyncio.ensure_future(conn.aclose())
    await begun.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.001)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert notes == ["ended"]


async def test_draining_comes_first(conn: Connection) -> None:
    notes: Notes = []
    conn.write_timeout = 0.01
    conn.add_close_callback(plain(notes, "closed"))
    conn.writer.write(bytes(16 << 20))
    await conn.aclose()
    assert notes == ["closed"]


async def test_their_context_is_that_of_who_closes(conn: Connection) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="nobody")
    notes: Notes = []

    async def callback() -> None:
        notes.append(variable.get())

    conn.add_close_callback(callback)
    variable.set("who closes")
    await conn.aclose()
    assert notes == ["who closes"]


# --- failures and limits -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["aclose", "abort"])
@pytest.mark.parametrize("kind", [plain, slow])
async def test_one_that_raises_is_logged_and_stops_nobody(
    conn: Connection, log: pytest.LogCaptureFixture, kind: Any, how: str
) -> None:
    """O7."""
    notes: Notes = []

    def fail() -> None:
        raise LookupError("plain")

    async def fail_later() -> None:
        await anyio.sleep(0)
        raise LookupError("async")

    for failure in (fail, fail_later):
        conn.add_close_callback(kind(notes, failure.__name__))
        conn.add_close_callback(failure)
    await close(conn, how)
    await holds(lambda: len(notes) == 2)
    assert sorted(notes) == ["fail", "fail_later"]
    await holds(lambda: len([r for r in log.records if r.levelno > logging.DEBUG]) == 2)
    assert {str(r.exc_info[1]) for r in log.records if r.exc_info} == {"plain", "async"}
    where = "test_one_that_raises_is_logged_and_stops_nobody.<locals>"
    assert sorted(logged(log)) == [
        f"anypoll.connection: The close callback {where}.fail has failed",
        f"anypoll.connection: The close callback {where}.fail_later has failed",
    ]


async def test_one_that_takes_too_long_is_cancelled_and_logged(
    conn: Connection, log: pytest.LogCaptureFixture
) -> None:
    notes: Notes = []
    conn.add_close_callback(plain(notes, "the next"))
    conn.add_close_callback(functools.partial(until_cancelled, notes))
    callbacks = conn._core.callbacks
    assert callbacks is not None
    assert callbacks._timeout == 10  # outside of servers, as documented
    callbacks._timeout = 0.02
    await within(conn.aclose())
    assert notes == ["cancelled", "the next"]
    [message] = logged(log)
    assert message.startswith("anypoll.connection: ")
    assert message.endswith("took longer than 0.02 s: cancelled")


async def test_an_exit_does_not_cost_the_others_their_turn(conn: Connection) -> None:
    notes: Notes = []

    def leave() -> None:
        raise SystemExit(3)

    conn.add_close_callback(plain(notes, "plain"))
    conn.add_close_callback(slow(notes, "async"))
    conn.add_close_callback(leave)
    with pytest.raises(SystemExit):
        conn.abort()
    await holds(lambda: sorted(notes) == ["async", "plain"])


# --- callbacks that do things to connections -----------------------------------------------------


@pytest.mark.parametrize("how", ["aclose", "abort"])
async def test_one_that_adds_another(conn: Connection, how: str) -> None:
    notes: Notes = []

    async def first(conn: Connection) -> None:
        conn.add_close_callback(plain(notes, "plain"))
        conn.add_close_callback(slow(notes, "async"))
        notes.append("first")

    conn.add_close_callback(slow(notes, "last"))
    conn.add_close_callback(first)
    await close(conn, how)
    await holds(lambda: notes == ["plain", "first", "async", "last"])


async def test_one_that_closes_its_own_connection(conn: Connection) -> None:
    notes: Notes = []

    async def close(conn: Connection) -> None:
        await conn.aclose()
        conn.abort()
        notes.append("closed again")

    conn.add_close_callback(slow(notes, "last"))
    conn.add_close_callback(close)
    conn.add_close_callback(Connection.abort)
    await within(conn.aclose())
    assert notes == ["closed again", "last"]


async def test_one_that_closes_another_connection_runs_its_callbacks(conn: Connection) -> None:
    notes: Notes = []
    async with opened() as (other, _):
        fill(other, notes)
        conn.add_close_callback(plain(notes, "last"))
        conn.add_close_callback(other.aclose)
        await within(conn.aclose())
        assert notes == [5, 4, 3, 2, 1, 0, "last"]


async def test_two_that_close_each_other_do_not_wait_for_each_other(conn: Connection) -> None:
    """The two sides of a proxy, which end at the same time."""
    notes: Notes = []
    both_run = anyio.Event()
    running: list[int] = []

    def closer(other: Connection) -> Any:
        async def callback() -> None:
            running.append(1)
            if len(running) == 2:
                both_run.set()
            await both_run.wait()
            await other.aclose()
            notes.append("closed")

        return callback

    async with opened() as (other, _):
        conn.add_close_callback(closer(other))
        other.add_close_callback(closer(conn))
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(conn.aclose)
                group.start_soon(other.aclose)
    assert notes == ["closed", "closed"]


# --- in a server ---------------------------------------------------------------------------------


async def test_in_a_server_they_run_when_the_handler_has_ended() -> None:
    notes: Notes = []

    async def handler(conn: Connection) -> None:
        conn.add_close_callback(lambda given: notes.append((given is conn, given.fileno())))
        fill(conn, notes)
        await anyio.sleep(0.001)
        notes.append("handler")

    async with visited(handler):
        pass
    assert notes == ["handler", *IN_ORDER, (True, -1)]


@pytest.mark.parametrize("how", ["aclose", "abort", "detach", "idle"])
async def test_in_a_server_they_wait_for_the_handler_also_if_it_closes(how: str) -> None:
    notes: Notes = []

    async def handler(conn: Connection) -> None:
        fill(conn, notes)
        await close(conn, how)
        if how != "idle":  # an end that the loop may not know of yet
            conn.add_close_callback(plain(notes, "late"))
            assert notes.pop() == "late"
        await settle()
        notes.append("handler")

    async with visited(handler):
        pass
    assert notes == ["handler", *IN_ORDER]


@pytest.mark.parametrize("how", ["raises", "cancelled", "eof"])
async def test_however_a_handler_ends(how: str, log: pytest.LogCaptureFixture) -> None:
    notes: Notes = []

    async def handler(conn: Connection) -> None:
        fill(conn, notes)
        if how == "raises":
            raise LookupError
        if how == "cancelled":
            with anyio.CancelScope() as scope:
                scope.cancel()
                await anyio.sleep(1)
            await anyio.sleep_forever()
        await conn.receive()

    async with visited(handler) as server:
        if how == "cancelled":
            await within(server.shutdown(0))
    assert notes == IN_ORDER
    assert len(logged(log)) == (how == "raises")


async def test_a_connection_is_active_until_they_have_run() -> None:
    go = anyio.Event()
    conns: list[Connection] = []

    async def handler(conn: Connection) -> None:
        conn.add_close_callback(go.wait)
        conns.append(conn)

    async with local(handler) as server:
        with socket.create_connection((HOST, server.port)):
            await holds(lambda: conns and not conns[0].is_active)
            assert server.connections == tuple(conns)
            assert server.statistics().active == 1
            assert not server.statistics().closed
            async with anyio.create_task_group() as group:
                group.start_soon(server.shutdown)
                await anyio.sleep(0.01)
                assert server.statistics().active == 1  # the shutdown waits for it
                go.set()
            assert server.connections == ()
            assert server.statistics().active == 0


async def test_a_cancelled_server_does_not_cancel_them() -> None:
    notes: Notes = []
    begun = anyio.Event()

    async def callback() -> None:
        begun.set()
        await anyio.sleep(0.02)
        notes.append("ended")

    async def handler(conn: Connection) -> None:
        conn.add_close_callback(callback)

    with anyio.CancelScope() as scope:
        async with visited(handler):
            await begun.wait()
            scope.cancel()
    assert notes == ["ended"]


async def test_the_limit_in_a_server_is_its_shutdown_timeout(
    log: pytest.LogCaptureFixture,
) -> None:
    """What fails, too, counts for nothing but the log."""
    notes: Notes = []

    async def handler(conn: Connection) -> None:
        for _ in range(2):
            conn.add_close_callback(functools.partial(until_cancelled, notes))
        conn.add_close_callback(fail)

    async with visited(handler, shutdown_timeout=0.02) as server:
        pass
    assert notes == ["cancelled", "cancelled"]
    assert ["took longer than 0.02 s" in message for message in logged(log)] == [False, True, True]
    assert dict(server.statistics().closed) == {"done": 1}
    assert server.statistics().handler_errors == 0


async def test_a_connection_that_its_server_has_let_go() -> None:
    notes: Notes = []
    async with served() as (conn, _):
        conn.add_close_callback(plain(notes, "run"))
    assert notes == ["run"]
    conn.add_close_callback(plain(notes, "late"))
    assert notes == ["run", "late"]


# --- at the end of the loop ----------------------------------------------------------------------

Main = Callable[[], Coroutine[Any, Any, Any]]


def test_those_of_an_abort_at_the_end_of_the_loop_begin_all_the_same(
    run: Callable[[Main], Any], anyio_backend_name: str
) -> None:
    """asyncio.run() cancels all tasks when main has ended, also what has not begun."""
    notes: Notes = []

    async def begin() -> None:
        notes.append("begun")

    async def main() -> None:
        first, second = anypoll.socketpair()
        await second.aclose()
        first.add_close_callback(begin)
        if anyio_backend_name == "trio":
            first.abort()
        else:
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(lambda _: first.abort())

    run(main)
    assert notes == ["begun"]


def test_one_that_runs_when_asyncio_cancels_all(log: pytest.LogCaptureFixture) -> None:
    notes: Notes = []

    async def main() -> None:
        first, second = anypoll.socketpair()
        await second.aclose()
        first.add_close_callback(slow(notes, "the next"))
        first.add_close_callback(functools.partial(until_cancelled, notes))
        first.abort()
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert notes == ["cancelled", "the next"]
    [message] = logged(log)
    assert message.endswith("was cancelled")


def test_a_connection_that_outlives_its_loop(
    run: Callable[[Main], Any], anyio_backend_name: str, log: pytest.LogCaptureFixture
) -> None:
    """Trio still runs async ones; there is nothing left of an asyncio loop to run them in."""
    notes: Notes = []
    kept: list[Connection] = []

    async def main() -> None:
        kept[:] = anypoll.socketpair()
        fill(kept[0], notes)

    run(main)
    kept[0].add_close_callback(plain(notes, "late"))
    if anyio_backend_name == "trio":
        assert notes == [5, 3, 1, 4, 2, 0, "late"]
    else:
        assert notes == [5, 3, 1, "late"]
        messages = logged(log)
        assert len(messages) == 3
        assert all("after the end of its event loop" in message for message in messages)
    kept[0].add_close_callback(returning(slow(notes, "never")))
    assert len(logged(log)) == 1
    assert "never" not in notes


def test_a_background_task_of_ours_that_fails_ends_nothing(
    run: Callable[[Main], Any], log: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise AssertionError("a fault of ours")

    async def main() -> None:
        first, second = anypoll.socketpair()
        async with first, second:
            assert first._core.hub.spawn(fail)
            await first.send(b"x")
            assert await second.receive() == b"x"

    run(main)
    assert logged(log) == ["anypoll.hub: A background task of a hub has failed"]


def test_spawning_from_another_thread(run: Callable[[Main], Any]) -> None:
    notes: Notes = []

    async def main() -> None:
        first, second = anypoll.socketpair()
        async with first, second:
            hub = first._core.hub
            thread = threading.Thread(target=lambda: notes.append(hub.spawn(slow(notes, "run"))))
            thread.start()
            thread.join()
            await holds(lambda: notes == [True, "run"])
        notes.append(hub)

    run(main)
    assert notes.pop().spawn(slow(notes, "never")) is False
