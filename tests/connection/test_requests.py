"""Request mode: when a call is made, in what, and all the ways in which there will be no more."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import itertools
import os
import socket
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
from anyio import (
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
)
from peers import (
    KIB,
    MIB,
    arrived,
    holds,
    opened,
    pattern,
    read_all,
    read_to_end,
    reset,
    send_all,
    within,
)
from programs import run_to_end
from serving import HOST, all_is_accounted_for, client, errors, local  # noqa: F401

import anypoll
from anypoll import Connection, IdleTimeout

pytestmark = pytest.mark.anyio

Function = Callable[[Any], Awaitable[Any]]


def tasks() -> int:
    """Tasks of the event loop that runs, its own ones included."""
    try:
        return trio.lowlevel.current_statistics().tasks_living
    except RuntimeError:
        return len(asyncio.all_tasks())


def is_idle(conn: Connection) -> bool:
    requests = conn._core.requests
    return requests is not None and requests.idle


async def until(condition: Callable[..., object], *args: Any) -> None:
    """As ``holds``, for a condition about the values of now."""
    await holds(functools.partial(condition, *args))


async def rounds(count: int = 20) -> None:
    """Gives everything that is ready its turn, time and again."""
    for _ in range(count):
        await anyio.sleep(0.001)


async def one_of(server: anypoll.Server) -> Connection:
    await holds(lambda: server.connections)
    return server.connections[0]  # type: ignore[no-any-return]


async def ends(server: anypoll.Server, reason: str, count: int = 1) -> None:
    """Until so many connections have ended, all for that reason."""
    await holds(lambda: sum(server.statistics().closed.values()) == count)
    assert dict(server.statistics().closed) == {reason: count}
    assert server.connections == ()


async def echo_line(conn: Connection) -> None:
    conn.writer.write(bytes(await conn.until(b"\n")))


class Calls:
    """A request function that keeps account of its calls."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self.begun = self.ended = self.running = self.most = 0

    async def __call__(self, conn: Connection) -> None:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._function(conn)
        finally:
            self.running -= 1
            self.ended += 1


# --- when a call is made -------------------------------------------------------------------------


async def test_a_call_when_input_arrives() -> None:
    calls = Calls(echo_line)
    async with local(on_request=calls) as server, client(server) as sock:
        await holds(lambda: server.connections)
        await rounds()
        assert calls.begun == 0
        for i in range(3):
            await send_all(sock, b"line %d\n" % i)
            assert await read_all(sock, 7) == b"line %d\n" % i
        await holds(lambda: calls.ended == 3)
        await rounds()
        assert calls.begun == 3


async def test_one_task_makes_all_calls_for_a_pipeline() -> None:
    """Those that do not wait, one after another."""
    before = most = 0

    async def function(conn: Connection) -> None:
        nonlocal most
        await echo_line(conn)
        most = max(most, tasks())

    async with opened() as (conn, peer):
        data = b"".join(b"%d\n" % i for i in range(200))
        peer.send(data)
        await holds(lambda: len(conn.reader) == len(data))
        before = tasks()
        conn.set_on_request(function)
        assert await read_all(peer, len(data)) == data
        assert tasks() == most == before + 1


async def test_no_task_exists_per_idle_connection() -> None:
    calls = Calls(echo_line)
    async with local(on_request=calls) as server:
        socks: list[socket.socket] = []
        try:
            counted: list[int] = []
            for _ in range(100):
                socks.append(socket.create_connection((HOST, server.port)))
                socks[-1].setblocking(False)
                await send_all(socks[-1], b"x\n")
                assert await read_all(socks[-1], 2) == b"x\n"
                await holds(lambda: len(server.connections) == len(socks))
                await holds(lambda: all(is_idle(conn) for conn in server.connections))
                counted.append(tasks())
            assert set(counted) == {counted[0]}
        finally:
            for sock in socks:
                sock.close()
        await ends(server, "eof", 100)
        assert tasks() < counted[0] + 16  # workers that have shared the ends park


async def test_it_may_wait_for_more_through_the_reader() -> None:
    got: list[bytes] = []

    async def function(conn: Connection) -> None:
        got.append(bytes(await conn.reader.next(6)))

    calls = Calls(function)
    async with local(on_request=calls) as server, client(server) as sock:
        conn = await one_of(server)
        for piece in (b"ab", b"cd", b"ef"):
            await send_all(sock, piece)
            await holds(lambda: calls.begun == 1 and arrived(sock) == 0)
            await rounds(3)
        await holds(lambda: got)
        assert got == [b"abcdef"]
        await holds(lambda: is_idle(conn))
        assert calls.begun == 1


@pytest.mark.parametrize("looks", [False, True])
async def test_a_call_that_consumes_nothing_is_made_again_only_for_more(looks: bool) -> None:
    """O6. Never a spin; and what it has looked at is still there, however it arrived."""
    seen: list[int] = []

    async def function(conn: Connection) -> None:
        if looks:
            assert bytes(await conn.reader.peek(1)) == b"a"
        seen.append(len(conn.reader))
        if len(conn.reader) == 4:
            assert bytes(await conn.reader.next(4)) == b"abcd"

    async with local(on_request=function) as server, client(server) as sock:
        conn = await one_of(server)
        for i, byte in enumerate((b"a", b"b", b"c", b"d")):
            await send_all(sock, byte)
            await until(lambda i: len(seen) == i + 1 and is_idle(conn), i)
            await rounds()
            assert seen == list(range(1, i + 2))
        await send_all(sock, b"a")
        await holds(lambda: len(seen) == 5)
        assert seen[4] == 1


async def test_views_that_are_kept_stay_as_they_are() -> None:
    """What is idle has no window: what comes next may lie in the same block."""
    views: list[memoryview] = []

    async def function(conn: Connection) -> None:
        views.append(await conn.reader.next(4))

    async with local(on_request=function) as server, client(server) as sock:
        conn = await one_of(server)
        for i in range(20):
            await send_all(sock, b"%04d" % i)
            await until(lambda i: len(views) == i + 1 and is_idle(conn), i)
        assert [bytes(view) for view in views] == [b"%04d" % i for i in range(20)]
        views.clear()


async def test_input_that_comes_while_a_call_runs_is_not_missed() -> None:
    """Also if that call has looked at nothing of it, and consumes nothing."""
    begun, go_on = anyio.Event(), anyio.Event()
    seen: list[int] = []

    async def function(conn: Connection) -> None:
        begun.set()
        await go_on.wait()
        seen.append(len(conn.reader))

    async with local(on_request=function) as server, client(server) as sock:
        conn = await one_of(server)
        await send_all(sock, b"a")
        await within(begun.wait())
        await send_all(sock, b"b")
        await holds(lambda: conn.statistics().bytes_received == 2)
        go_on.set()
        await holds(lambda: len(seen) == 2 and is_idle(conn))
        await rounds()
        assert seen == [2, 2]


async def test_more_than_high_water_is_still_news() -> None:
    """What a call leaves, it leaves; reading goes on for what would make another one due."""
    size = 200 * KIB
    done: list[bytes] = []
    calls = 0

    async def function(conn: Connection) -> None:
        nonlocal calls
        calls += 1
        if len(conn.reader) >= size:
            done.append(await conn.reader.read_bytes(size))

    async with (
        local(on_request=function, read_high_water=16 * KIB) as server,
        client(server) as sock,
    ):
        await send_all(sock, pattern(size))
        await holds(lambda: done)
        assert done == [pattern(size)]
        assert calls <= 100  # by the portion, not by the byte


async def test_calls_of_several_connections_run_side_by_side() -> None:
    """One that takes its time delays nobody, and one worker is not all there are."""
    together = anyio.Event()

    async def function(conn: Connection) -> None:
        await conn.reader.skip(1)
        if calls.running == 40:
            together.set()
        await together.wait()

    calls = Calls(function)
    async with local(on_request=calls) as server:
        before = tasks()
        socks = [socket.create_connection((HOST, server.port)) for _ in range(40)]
        for sock in socks:
            sock.send(b"x")
        await within(together.wait())
        await holds(lambda: calls.ended == 40)
        for sock in socks:
            sock.close()
        await ends(server, "eof", 40)
        await holds(lambda: tasks() <= before + 16)


async def test_others_get_their_turn_beside_calls_that_never_wait() -> None:
    """A call that names others all the time suspends nowhere, but its worker does."""
    turns = 0

    async def first(conn: Connection) -> None:
        conn.set_on_request(second)

    async def second(conn: Connection) -> None:
        if turns >= 10:
            await conn.reader.skip(1)
        conn.set_on_request(first)

    async with local(on_request=first) as server, client(server) as sock:
        await send_all(sock, b"x")
        for _ in range(10):
            await anyio.sleep(0)
            turns += 1
        await holds(lambda: server.connections and is_idle(server.connections[0]))


@pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")])
async def test_descriptors_get_their_turn_beside_a_pipeline() -> None:
    """Calls that follow one another within a callback of the hub count in its turn (256)."""
    calls = 0
    seen: list[int] = []
    reader, writer = socket.socketpair()
    loop = asyncio.get_running_loop()

    async def function(conn: Connection) -> None:
        nonlocal calls
        await conn.until(b"\n")
        calls += 1

    def tick() -> None:
        reader.recv(1)
        seen.append(calls)

    with reader, writer:
        writer.send(b"x" * 4096)
        async with local(on_request=function) as server, client(server) as sock:
            await send_all(sock, b"\n")
            await holds(lambda: calls == 1)
            loop.add_reader(reader, tick)
            await send_all(sock, b"\n" * 20_000)
            await holds(lambda: calls == 20_001)
            loop.remove_reader(reader)
    assert len(seen) < 4096
    assert max(after - before for before, after in itertools.pairwise(seen)) <= 256 + 64


async def by_the_byte(conn: Connection) -> None:
    await conn.send(await conn.receive(1))
    await anyio.lowlevel.checkpoint()


async def in_tasks(conn: Connection) -> None:
    """A call may sleep, cancel what it has begun, and start tasks."""
    line = bytes(await conn.until(b"\n"))
    with anyio.move_on_after(0.001) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    async with anyio.create_task_group() as group:
        group.start_soon(conn.send, line)


async def counting(conn: Connection) -> None:
    conn.state = (conn.state or 0) + len(await conn.next(1))
    conn.writer.write(b"%d" % conn.state)
    conn.writer.write(b",")


@pytest.mark.parametrize(
    ("function", "sent", "answer"),
    [
        pytest.param(by_the_byte, b"x" * 300, b"x" * 300, id="what is left is for the next one"),
        pytest.param(in_tasks, b"one\ntwo\n", b"one\ntwo\n", id="it runs in a task"),
        pytest.param(counting, b"...", b"1,2,3,", id="state, and a flush behind each"),
    ],
)
async def test_each_request_is_answered_in_turn(
    function: Function, sent: bytes, answer: bytes
) -> None:
    calls = Calls(function)
    async with local(on_request=calls) as server, client(server) as sock:
        await send_all(sock, sent)
        assert await read_all(sock, len(answer)) == answer
        await holds(lambda: is_idle(server.connections[0]))
        await rounds(5)
        assert calls.begun == calls.ended == {in_tasks: 2}.get(function, len(sent))
        assert calls.most == 1


# --- in what -------------------------------------------------------------------------------------


variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default=None)


async def test_context_variables_are_those_of_the_server() -> None:
    """And what one call sets is not seen by the next one, be it of the same connection: not even
    if it looks the same.
    """
    outside: list[int] = []
    variable.set(outside)
    seen: list[Any] = []

    async def function(conn: Connection) -> None:
        await conn.reader.skip(1)
        seen.append(variable.get())
        variable.set([])
        if len(seen) % 2:
            await anyio.sleep(0)

    async with local(on_request=function) as server, client(server) as a, client(server) as b:
        for i in range(10):
            await send_all(b if i % 3 else a, b"x")
            await until(lambda i: len(seen) == i + 1, i)
        assert all(value is outside for value in seen)


async def test_context_variables_are_those_of_who_sets_the_function() -> None:
    seen: dict[int, set[Any]] = {i: set() for i in range(5)}

    async def function(conn: Connection) -> None:
        await conn.reader.skip(1)
        seen[conn.state].add(variable.get())
        variable.set("else")

    pairs = [anypoll.socketpair() for _ in range(5)]

    async def begin(i: int) -> None:
        variable.set(i)
        pairs[i][0].state = i
        pairs[i][0].set_on_request(function)

    async with anyio.create_task_group() as group:
        for i in range(5):
            group.start_soon(begin, i)
    for _ in range(3):
        for ours, theirs in pairs:
            received = ours.statistics().bytes_received
            await theirs.send(b"xy")
            await until(lambda o, r: o.statistics().bytes_received == r + 2, ours, received)
            await until(is_idle, ours)
    assert seen == {i: {i} for i in range(5)}
    for ours, theirs in pairs:
        await theirs.aclose()
        await ours.aclose()


async def test_a_peer_that_never_reads_is_not_answered_for_ever() -> None:
    """Above high water the next call waits for the drain before it gets a byte."""
    answers = 0

    async def function(conn: Connection) -> None:
        nonlocal answers
        await conn.reader.skip(1)
        conn.writer.write(bytes(64 * KIB))
        answers += 1

    async with (
        local(on_request=function, write_high_water=128 * KIB) as server,
        client(server) as sock,
    ):
        conn = await one_of(server)
        await send_all(sock, bytes(300))
        await holds(lambda: conn._core.number in conn._core.hub.writers)
        await rounds()
        assert conn.statistics().buffered_output <= 256 * KIB
        assert len(await read_all(sock, 300 * 64 * KIB)) == 300 * 64 * KIB
        assert answers == 300


async def test_nobody_else_reads_between_the_calls() -> None:
    async with local(on_request=echo_line) as server, client(server) as sock:
        conn = await one_of(server)
        with pytest.raises(BusyResourceError):
            await conn.receive()
        with pytest.raises(BusyResourceError):
            await conn.reader.peek(1)
        with pytest.raises(BusyResourceError):
            conn.reader.next_nowait(1)
        await conn.send(b"unasked")  # but anybody may write
        await send_all(sock, b"x\n")
        assert await read_all(sock, 9) == b"unaskedx\n"


async def test_a_call_that_leaves_a_reader_behind_is_an_error(
    log: pytest.LogCaptureFixture,
) -> None:
    async with anyio.create_task_group() as group:

        async def read(conn: Connection) -> None:
            with pytest.raises(ClosedResourceError):
                await conn.reader.next(100)

        async def function(conn: Connection) -> None:
            group.start_soon(read, conn)
            await holds(lambda: conn._core._reading)

        async with local(on_request=function) as server, client(server) as sock:
            await send_all(sock, b"x")
            await ends(server, "error")
    [record] = errors(log)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], RuntimeError)


# --- hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["handler", "requests"])
@pytest.mark.parametrize("hooks", [0, 1, 2, 4, 8, 15])
async def test_the_end_is_told_with_every_combination_of_hooks(mode: str, hooks: int) -> None:
    """L07, L33. Each hook that there is runs once, and in its order; that of the end never before
    that of the beginning has returned, although the peer has gone long before.
    """
    told: list[str] = []

    def on_prepare(conn: Connection) -> None:
        told.append("prepare")

    async def on_connect(conn: Connection) -> None:
        await holds(conn._core.status)
        await rounds()
        told.append("connect")

    async def on_disconnect(conn: Connection) -> None:
        told.append("disconnect")

    async def function(conn: Connection) -> None:
        await conn.reader.skip(2)
        await holds(conn._core.status)  # that it has gone
        told.append("function")

    def callback() -> None:
        told.append("closed")

    def prepare(conn: Connection) -> None:
        if hooks & 1:
            on_prepare(conn)
        if hooks & 8:
            conn.add_close_callback(callback)

    options: dict[str, Any] = {"handler" if mode == "handler" else "on_request": function}
    if hooks & 2:
        options["on_connect"] = on_connect
    if hooks & 4:
        options["on_disconnect"] = on_disconnect
    async with local(on_prepare=prepare, **options) as server:
        async with client(server) as sock:
            await send_all(sock, b"xx")
        await ends(server, "done" if mode == "handler" else "eof")
    names = ["prepare", "connect", "function", "disconnect", "closed"]
    wanted = [hooks & 1, hooks & 2, True, hooks & 4, hooks & 8]
    expected = [name for name, there in zip(names, wanted, strict=True) if there]
    assert sorted(told) == sorted(expected)
    told = [name for name in told if name != "function" or not hooks & 4]  # it may be beside that
    assert told == [name for name in expected if name != "function" or not hooks & 4]


# --- errors --------------------------------------------------------------------------------------


async def test_raising_closes_the_connection(log: pytest.LogCaptureFixture) -> None:
    told: list[tuple[Any, Exception]] = []

    async def function(conn: Connection) -> None:
        conn.writer.write(b"never sent")
        if bytes(await conn.until(b"\n")) == b"fail\n":
            raise LookupError("on purpose")

    def on_error(conn: Connection, exc: Exception) -> None:
        told.append((conn, exc))

    async with (
        local(on_request=function, on_error=on_error) as server,
        client(server) as sock,
        client(server) as other,
    ):
        await send_all(sock, b"fail\n")
        assert await read_to_end(sock) == b""
        await holds(lambda: len(server.connections) == 1)
        await send_all(other, b"go on\n")
        assert await read_all(other, 10) == b"never sent"
        assert dict(server.statistics().closed) == {"error": 1}
        assert server.statistics().handler_errors == 1
    [record] = errors(log)
    assert record.name == "anypoll.server"
    [(conn, exc)] = told
    assert conn._core.closed
    assert isinstance(exc, LookupError)


async def test_errors_without_a_server_are_logged(log: pytest.LogCaptureFixture) -> None:
    async def function(conn: Connection) -> None:
        raise LookupError

    async with opened() as (conn, peer):
        conn.set_on_request(function)
        peer.send(b"x")
        await holds(lambda: conn._core.closed)
        await holds(lambda: log.records)
    [record] = errors(log)
    assert record.name == "anypoll.connection"
    assert conn not in (record.args or ())  # records may be kept for long


# --- ends that are counted under their reason ----------------------------------------------------


async def nothing(_conn: Connection) -> None:
    """It consumes nothing."""


async def ten(conn: Connection) -> None:
    """It tells of the end, in an answer that goes out all the same."""
    try:
        await conn.reader.next(10)
    except Exception as exc:
        conn.writer.write(type(exc).__name__.encode())
        raise


async def much(conn: Connection) -> None:
    await conn.reader.skip(1)
    conn.writer.write(bytes(16 * MIB))


async def until_it_is_ended(conn: Connection) -> None:
    await conn.reader.skip(1)
    conn.idle_timeout = 0.001
    await holds(lambda: conn._core.failure)
    with pytest.raises(IdleTimeout):
        conn.writer.write(b"x")


async def for_ever(conn: Connection) -> None:
    await conn.reader.skip(1)
    await anyio.sleep_forever()


async def closing(conn: Connection) -> None:
    conn.writer.write(bytes(await conn.until(b"\n")))
    await conn.aclose()


#: The function; what is sent; what happens when that has been taken, or nobody takes it; what is
#: answered; what is counted; how many calls there are; options of the server.
ENDS: dict[str, tuple[Function, bytes, str, Any, str, int, dict[str, Any]]] = {
    "a FIN, idle": (echo_line, b"", "fin", b"", "eof", 0, {}),
    "a FIN with input": (echo_line, b"one\ntwo\n", "fin", b"one\ntwo\n", "eof", 2, {}),
    "a FIN behind too little": (ten, b"half", "fin", b"IncompleteRead", "incomplete", 1, {}),
    "a FIN, to be drained": (much, b"x", "fin", bytes(16 * MIB), "eof", 1, {}),
    "a FIN, not drained": (much, b"x", "fin", None, "eof", 1, {"write_timeout": 0.02}),
    "a FIN, disconnected": (
        for_ever, b"x", "fin", None, "disconnected", 1, {"cancel_on_disconnect": True}
    ),
    "a RST, idle": (echo_line, b"", "rst", None, "broken", 0, {}),
    "a RST, unread": (nothing, b"half", "rst", None, "broken", 1, {}),
    "a RST, reading": (ten, b"x", "rst", None, "broken", 1, {}),
    "silence, idle": (echo_line, b"", "silence", b"", "idle_timeout", 0, {}),
    "silence, unread": (nothing, b"half", "silence", b"", "idle_timeout", 1, {}),
    "silence, in a call": (until_it_is_ended, b"x", "", b"", "idle_timeout", 1, {}),
    "too slow": (ten, b"x", "", b"", "read_timeout", 1, {"read_timeout": 0.01}),
    "too much": (nothing, bytes(MIB), "", None, "message_too_large", -1, {"read_limit": 10_000}),
    "its own": (closing, b"bye\n", "", b"bye\n", "closed", 1, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "sent", "then", "answer", "reason", "count", "options"), ENDS.values(), ids=ENDS
)
async def test_ends_are_counted(
    function: Function,
    sent: bytes,
    then: str,
    answer: bytes | None,
    reason: str,
    count: int,
    options: dict[str, Any],
) -> None:
    calls = Calls(function)
    async with local(on_request=calls, **options) as server, client(server) as sock:
        conn = await one_of(server)
        await rounds(3)
        assert is_idle(conn)  # a read timeout is for calls, not for the time between them
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await send_all(sock, sent)
        await holds(lambda: bool(calls.begun) == bool(sent))
        if function in (echo_line, nothing):
            await holds(lambda: is_idle(conn) or conn._core.closed)
        elif then == "rst":
            await holds(lambda: conn._core.hub.waits(conn._core.number))
        if then == "fin":
            sock.shutdown(socket.SHUT_WR)
        elif then == "rst":
            reset(sock)
        elif then == "silence":
            conn.idle_timeout = 0.001
        if answer is not None:
            assert await read_to_end(sock) == answer
        await ends(server, reason)
        assert conn._core.closed
        assert calls.begun == calls.ended
        assert count in (calls.begun, -1)


# --- the peer ends, in time ----------------------------------------------------------------------


@pytest.mark.parametrize("fin_first", [False, True])
async def test_a_fin_behind_what_no_call_takes(fin_first: bool) -> None:
    """The call that consumes nothing is the last one: no more can come."""
    go_on = anyio.Event()

    async def function(conn: Connection) -> None:
        await go_on.wait()

    calls = Calls(function)
    async with local(on_request=calls) as server, client(server) as sock:
        conn = await one_of(server)
        await send_all(sock, b"half")
        await holds(lambda: calls.begun == 1)
        if fin_first:
            sock.shutdown(socket.SHUT_WR)
            await holds(conn._core.status)
        go_on.set()
        if not fin_first:
            await holds(lambda: is_idle(conn))
            sock.shutdown(socket.SHUT_WR)
        assert await read_to_end(sock) == b""
        await ends(server, "incomplete")
        assert calls.begun == 1


async def test_a_reset_ends_a_busy_one_when_its_call_has_ended() -> None:
    go_on = anyio.Event()

    async def function(conn: Connection) -> None:
        await conn.reader.skip(1)
        await go_on.wait()

    calls = Calls(function)
    async with local(on_request=calls) as server, client(server) as sock:
        conn = await one_of(server)
        await send_all(sock, b"x")
        await holds(lambda: calls.running)
        reset(sock)
        await holds(conn._core.status)
        await rounds()
        assert not conn._core.closed
        go_on.set()
        await ends(server, "broken")
        assert calls.begun == 1


# --- this side ends ------------------------------------------------------------------------------


async def close(conn: Connection) -> None:
    await conn.aclose()


async def abort(conn: Connection) -> None:
    conn.abort()


async def detach(conn: Connection) -> None:
    sock, rest = conn.detach()
    sock.close()
    assert rest == (b"half" if conn.state == "unread" else b"")


@pytest.mark.parametrize("end", [close, abort, detach])
@pytest.mark.parametrize("state", ["idle", "unread", "busy"])
@pytest.mark.parametrize("kind", ["served", "dialled"])
async def test_ended_by_another_task(end: Function, state: str, kind: str) -> None:
    go_on = anyio.Event()
    callbacks = 0

    def ended() -> None:
        nonlocal callbacks
        callbacks += 1

    async def function(conn: Connection) -> None:
        if state == "busy":
            await conn.reader.skip(1)
            await go_on.wait()
            assert conn._core.closed

    calls = Calls(function)

    async def check(conn: Connection, peer: socket.socket) -> None:
        conn.state = state
        conn.add_close_callback(ended)
        if state == "unread":
            await send_all(peer, b"half")
            await holds(lambda: calls.ended and is_idle(conn))
        elif state == "busy":
            await send_all(peer, b"x")
            await holds(lambda: calls.running)
        await end(conn)
        go_on.set()
        assert conn._core.closed
        await holds(lambda: callbacks)
        await holds(lambda: not calls.running and conn._core.requests is None)
        await rounds()
        assert callbacks == 1
        assert calls.begun == (state != "idle")

    if kind == "served":
        async with local(on_request=calls) as server, client(server) as sock:
            await check(await one_of(server), sock)
            await ends(server, "closed")
    else:
        async with opened("tcp") as (conn, peer):
            conn.set_on_request(calls)
            await check(conn, peer)


async def test_a_call_that_is_due_is_not_made_on_a_closed_connection() -> None:
    calls = Calls(echo_line)
    async with opened() as (conn, peer):
        peer.send(b"x\n")
        await holds(lambda: len(conn.reader))
        conn.set_on_request(calls)  # it is ready from now on
        conn.abort()
        await holds(lambda: conn._core.requests is None)
        await rounds()
        assert calls.begun == 0


async def test_input_does_not_cut_off_what_a_close_still_sends() -> None:
    """Another task's aclose() has the connection until all is sent."""
    data = pattern(8 * MIB)
    calls = Calls(echo_line)
    async with opened() as (conn, peer), anyio.create_task_group() as group:
        conn.set_on_request(calls)
        conn.writer.write(data)
        group.start_soon(conn.aclose)
        await holds(lambda: conn._core.number in conn._core.hub.writers)
        peer.send(b"too late\n")
        await rounds()
        assert await read_to_end(peer) == data
        await holds(lambda: conn._core.requests is None)
        assert calls.begun == 0


async def test_nothing_of_an_ended_connection_waits_for_the_garbage_collector() -> None:
    """No cycle leads to what the user has of it: neither of the exception of its end, nor of a
    cancelled call.
    """

    async def used() -> weakref.ref[Connection]:
        conn, peer = anypoll.socketpair()
        conn.set_on_request(echo_line)
        await peer.send(b"x\n")
        assert await peer.receive() == b"x\n"
        await peer.aclose()
        await holds(lambda: conn._core.closed)
        return weakref.ref(conn)

    gc.collect()
    gc.disable()
    try:
        found = await used()
        await holds(lambda: found() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("owner", ["server", "nobody"])
async def test_an_idle_one_that_another_thread_aborts(owner: str) -> None:
    """Its end is the event loop's all the same."""
    if owner == "nobody":
        conn, peer = anypoll.socketpair()
        conn.set_on_request(echo_line)
        await anyio.to_thread.run_sync(conn.abort)
        await holds(lambda: conn._core.requests is None)
        await peer.aclose()
        return
    async with local(on_request=echo_line) as server, client(server) as sock:
        await holds(lambda: server.connections and is_idle(server.connections[0]))
        await anyio.to_thread.run_sync(server.connections[0].abort)
        await holds(lambda: server.statistics().closed == {"closed": 1})
        with pytest.raises(ConnectionResetError):
            await read_to_end(sock)


# --- set_on_request ------------------------------------------------------------------------------


async def test_a_dialled_one_that_nobody_refers_to_goes_on() -> None:
    conn, peer = anypoll.socketpair()
    conn.set_on_request(echo_line)
    del conn
    gc.collect()
    async with peer:
        await peer.send(b"x\n")
        assert await peer.receive() == b"x\n"
        await peer.send_eof()
        with pytest.raises(EndOfStream):
            await within(peer.receive())


async def test_replaced_between_two_calls() -> None:
    """O6. The new one is called for what the old one has left, and the old one never again."""

    async def nothing(conn: Connection) -> None:
        pass

    old, new = Calls(nothing), Calls(echo_line)
    async with opened() as (conn, peer):
        conn.set_on_request(old)
        peer.send(b"x\n")
        await holds(lambda: old.ended and is_idle(conn))
        conn.set_on_request(new)
        assert await read_all(peer, 2) == b"x\n"
        await holds(lambda: is_idle(conn))
        assert (old.begun, new.begun) == (1, 1)
        conn.set_on_request(old)
        await rounds()
        assert (old.begun, new.begun) == (1, 1)


async def test_replaced_in_a_call() -> None:
    async def second(conn: Connection) -> None:
        conn.writer.write(b"2" + bytes(await conn.reader.next(1)))

    async def first(conn: Connection) -> None:
        conn.set_on_request(second)
        conn.writer.write(b"1")

    async with opened() as (conn, peer):
        conn.set_on_request(first)
        peer.send(b"ab")
        assert await read_all(peer, 5) == b"12a2b"


async def test_a_call_that_names_its_own_function_is_no_circle() -> None:
    """O6."""
    calls = 0

    async def function(conn: Connection) -> None:
        nonlocal calls
        calls += 1
        conn.set_on_request(function)

    async with opened() as (conn, peer):
        conn.set_on_request(function)
        peer.send(b"x")
        await holds(lambda: is_idle(conn) and calls)
        await rounds()
        assert calls == 1
        conn.set_on_request(function)  # but from outside it is called for what is there
        await holds(lambda: calls == 2)


async def test_in_on_prepare_and_in_on_connect() -> None:
    """O6. It replaces that of the server, before any call."""

    async def second(conn: Connection) -> None:
        await conn.send(b"2" + await conn.receive())

    async def third(conn: Connection) -> None:
        await conn.send(b"3" + await conn.receive())

    first = Calls(echo_line)

    async def on_connect(conn: Connection) -> None:
        await holds(lambda: len(conn.reader))
        conn.set_on_request(third)

    async with (
        local(on_request=first, on_prepare=lambda conn: conn.set_on_request(second)) as server,
        client(server) as sock,
    ):
        await send_all(sock, b"x")
        assert await read_all(sock, 2) == b"2x"
    async with local(on_request=first, on_connect=on_connect) as server, client(server) as sock:
        await send_all(sock, b"x")
        assert await read_all(sock, 2) == b"3x"
    assert first.begun == 0


@pytest.mark.parametrize("gentle", [False, True])
async def test_in_a_server_with_a_handler(gentle: bool) -> None:
    """The handler's end is the end: a FIN alone is none."""
    go_on = anyio.Event()

    async def handler(conn: Connection) -> None:
        conn.set_on_request(echo_line)
        await go_on.wait()
        await conn.send(b"end")

    async with local(handler) as server, client(server) as sock:
        await send_all(sock, b"x\n")
        assert await read_all(sock, 2) == b"x\n"
        if gentle:
            sock.shutdown(socket.SHUT_WR)
            conn = await one_of(server)
            await holds(lambda: conn._core.requests is None)
            await rounds()
            assert not conn._core.closed
        go_on.set()
        assert await read_to_end(sock) == b"end"
        await ends(server, "done")


async def test_an_error_in_a_server_with_a_handler(log: pytest.LogCaptureFixture) -> None:
    """It closes the connection, and the handler finds it so."""

    async def function(conn: Connection) -> None:
        raise LookupError

    async def handler(conn: Connection) -> None:
        conn.set_on_request(function)
        await holds(lambda: conn._core.closed)
        conn.writer.write(b"x")

    async with local(handler) as server, client(server) as sock:
        await send_all(sock, b"x")
        await ends(server, "closed")
        assert server.statistics().handler_errors == 1
    [record] = errors(log)
    assert record.name == "anypoll.server"


async def test_refused() -> None:
    async with opened() as (conn, peer):
        nothing: Any = 7
        with pytest.raises(TypeError):
            conn.set_on_request(nothing)
        async with anyio.create_task_group() as group:
            group.start_soon(conn.reader.skip, 1)
            await holds(lambda: conn._core._reading)
            with pytest.raises(BusyResourceError):
                conn.set_on_request(echo_line)
            peer.send(b"x")

        async def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                conn.set_on_request(echo_line)

        await anyio.to_thread.run_sync(anyio.run, elsewhere)

        def in_a_thread() -> None:
            with pytest.raises(RuntimeError, match="event loop"):
                conn.set_on_request(echo_line)

        await anyio.to_thread.run_sync(in_a_thread)
        assert conn._core.requests is None
        peer.send(b"y")
        assert await conn.receive() == b"y"  # nothing has changed
    with pytest.raises(ClosedResourceError):
        conn.set_on_request(echo_line)


# --- UNIX sockets --------------------------------------------------------------------------------


async def test_descriptors_in_a_call() -> None:
    got: list[tuple[bytes, int]] = []

    async def function(conn: Any) -> None:
        message, fds = await conn.receive_fds(4, 4)
        got.append((message, len(fds)))
        for fd in fds:
            os.close(fd)

    conn, peer = anypoll.socketpair()
    conn.set_on_request(function)
    async with peer:
        unix: Any = peer
        for i in range(3):
            await unix.send_fds(b"with", [0, 1][: i + 1])
            await unix.send(b"none")
            await until(lambda i: len(got) == 2 * i + 2, i)
            await holds(lambda: is_idle(conn))
        await unix.send_fds(b"left", [0])  # and what nobody takes is closed
        await holds(lambda: len(got) == 7)
    await holds(lambda: conn._core.closed)
    assert got == [(b"with", 1), (b"none", 0), *[(b"with", 2), (b"none", 0)] * 2, (b"left", 1)]


async def test_messages() -> None:
    async def function(conn: Any) -> None:
        await conn.send(await conn.receive())

    calls = Calls(function)
    async with opened("messages") as (conn, peer):
        conn.set_on_request(calls)
        for size in (1, 3000, 2, 10_000):
            peer.send(bytes(size))
            await holds(lambda: arrived(peer))
            assert peer.recv(20_000) == bytes(size)
        for i in range(5):
            peer.send(b"%d" % i)
        peer.shutdown(socket.SHUT_WR)  # what comes with it is answered
        await holds(lambda: conn._core.closed)
        assert [peer.recv(10) for _ in range(6)] == [b"0", b"1", b"2", b"3", b"4", b""]
        assert calls.begun == 9


async def test_a_message_that_no_call_receives() -> None:
    """Never a spin, whatever else happens to the connection; and what is new is told."""

    async def function(conn: Any) -> None:
        if calls.begun < 100:  # a call that spins would be stopped by this
            await conn.send(bytes(50_000))

    calls = Calls(function)
    async with opened("messages") as (conn, peer):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        conn.set_on_request(calls)
        peer.send(b"first")
        for count in range(1, 4):
            for _ in range(20):  # it is readable and writable again and again
                await anyio.sleep(0.001)
                while arrived(peer):
                    assert peer.recv(50_000) == bytes(50_000)
            await holds(lambda: is_idle(conn))
            assert calls.begun == count
            peer.send(b"next")
            await until(lambda count: calls.begun == count + 1, count)
        while not is_idle(conn):
            await anyio.sleep(0.001)
            while arrived(peer):
                peer.recv(50_000)

        async def receive(conn: Any) -> None:
            received.append(await conn.receive())

        received: list[bytes] = []
        conn.set_on_request(receive)  # what is there already triggers it
        await holds(lambda: len(received) == 4)
        assert received == [b"first", b"next", b"next", b"next"]


# --- the server ends -----------------------------------------------------------------------------


async def test_a_shutdown_ends_what_is_idle_at_once() -> None:
    calls = Calls(echo_line)
    async with (
        local(on_request=calls, shutdown_timeout=1000) as server,
        client(server) as sock,
        client(server) as fresh,
    ):
        await send_all(sock, b"x\n")
        assert await read_all(sock, 2) == b"x\n"
        await holds(lambda: len(server.connections) == 2)
        await holds(lambda: all(is_idle(conn) for conn in server.connections))
        await within(server.shutdown())
        assert await read_to_end(sock) == b""
        assert await read_to_end(fresh) == b""
    assert dict(server.statistics().closed) == {"eof": 2}


async def test_a_shutdown_leaves_half_a_message_its_time() -> None:
    """What has been left unread makes it busy: until the rest has come, or the time is up."""

    async def function(conn: Connection) -> None:
        if len(conn.reader) >= 4:
            conn.writer.write(bytes(await conn.reader.next(4)))

    calls = Calls(function)
    async with (
        local(on_request=calls, shutdown_timeout=1000) as server,
        client(server) as whole,
        client(server) as half,
        anyio.create_task_group() as group,
    ):
        await send_all(whole, b"ab")
        await send_all(half, b"ab")
        await holds(lambda: calls.ended == 2)
        await holds(lambda: all(is_idle(conn) for conn in server.connections))
        group.start_soon(server.shutdown)
        await within(server.wait_shutting_down())
        await rounds()
        assert len(server.connections) == 2
        await send_all(whole, b"cd")
        assert await read_to_end(whole) == b"abcd"
        assert dict(server.statistics().closed) == {"eof": 1}
        await within(server.shutdown(0))
        assert dict(server.statistics().closed) == {"eof": 1, "cancelled": 1}
        assert await read_to_end(half) == b""


async def test_a_shutdown_lets_a_call_finish() -> None:
    go_on = anyio.Event()

    async def function(conn: Connection) -> None:
        line = bytes(await conn.until(b"\n"))
        await go_on.wait()
        conn.writer.write(line)

    calls = Calls(function)
    async with (
        local(on_request=calls, shutdown_timeout=1000) as server,
        client(server) as sock,
        anyio.create_task_group() as group,
    ):
        await send_all(sock, b"one\ntwo\n")
        await holds(lambda: calls.running)
        group.start_soon(server.shutdown)
        await within(server.wait_shutting_down())
        await rounds()
        go_on.set()
        assert await read_to_end(sock) == b"one\ntwo\n"
        await ends(server, "eof")


@pytest.mark.parametrize("how", ["timeout", "exception", "cancellation"])
async def test_an_end_by_force(how: str) -> None:
    """Each connection ends once, in whatever state, and its callbacks have run by then."""
    callbacks = 0

    async def callback() -> None:
        nonlocal callbacks
        await anyio.sleep(0)
        callbacks += 1

    async def function(conn: Connection) -> None:
        if bytes(await conn.reader.peek(1)) != b"h":
            await anyio.sleep_forever()

    calls = Calls(function)
    socks: list[socket.socket] = []
    with anyio.CancelScope() as scope:
        try:
            async with local(
                on_request=calls,
                on_prepare=lambda conn: conn.add_close_callback(callback),
            ) as server:
                for i in range(9):
                    socks.append(socket.create_connection((HOST, server.port)))
                    if i % 3:
                        socks[-1].send(b"h" if i % 3 == 1 else b"x")
                await holds(lambda: calls.ended == 3 and calls.running == 3)
                await holds(lambda: sum(is_idle(conn) for conn in server.connections) == 6)
                if how == "timeout":
                    async with anyio.create_task_group() as group:
                        group.start_soon(server.shutdown, 1000)
                        await holds(lambda: server.statistics().closed == {"eof": 3})
                        await server.shutdown(0)
                if how == "exception":
                    raise LookupError
                if how == "cancellation":
                    scope.cancel()
                    await anyio.sleep_forever()
        except LookupError:
            assert how == "exception"
    for sock in socks:
        sock.close()
    assert sum(server.statistics().closed.values()) == callbacks == 9
    expected = {"eof": 3, "cancelled": 6} if how == "timeout" else {"cancelled": 9}
    assert dict(server.statistics().closed) == expected


@pytest.mark.parametrize("takes", [True, False], ids=["takes", "leaves"])
async def test_an_end_by_force_does_not_reach_a_shielded_call(*, takes: bool) -> None:
    """It ends, and then its connection does: nobody would answer what comes later."""
    begun, go = anyio.Event(), anyio.Event()

    async def shielded(conn: Connection) -> None:
        with anyio.CancelScope(shield=True):
            if takes:
                await conn.receive()
            begun.set()
            await go.wait()
        conn.writer.write(b"done")

    async def release(server: anypoll.Server) -> None:
        await server.wait_shutting_down()
        await rounds()
        go.set()

    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:
            async with local(on_request=shielded) as server:
                sock = socket.create_connection((HOST, server.port))
                sock.setblocking(False)
                await send_all(sock, b"request")
                await within(begun.wait())
                group.start_soon(release, server)
                scope.cancel()
                await anyio.sleep_forever()
    assert server.connections == ()
    assert server.statistics().closed == {"done": 1}
    with sock:
        assert await within(read_to_end(sock)) == b"done"


async def test_an_end_by_force_of_a_handler_with_request_mode() -> None:
    """The handler's task ends the connection, and nobody else."""

    async def handler(conn: Connection) -> None:
        conn.set_on_request(echo_line)
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        async with local(handler) as server, client(server) as sock:
            await send_all(sock, b"x\n")
            assert await read_all(sock, 2) == b"x\n"
            conn = await one_of(server)
            await holds(lambda: is_idle(conn))
            scope.cancel()
            await anyio.sleep_forever()
    assert dict(server.statistics().closed) == {"cancelled": 1}


@pytest.mark.parametrize("refuses", [False, True])
async def test_an_end_by_force_before_request_mode_has_begun(
    refuses: bool, log: pytest.LogCaptureFixture
) -> None:
    """A task ends the connection that on_prepare did not want: nobody else does."""
    waits = anyio.Event()

    async def wait(*_: Any) -> None:
        waits.set()
        with anyio.CancelScope(shield=True):
            await rounds()

    def on_prepare(conn: Connection) -> None:
        conn.add_close_callback(wait)
        if not refuses:
            raise LookupError
        conn.abort()

    with anyio.CancelScope() as scope:
        async with (
            local(on_request=echo_line, on_prepare=on_prepare, on_error=wait) as server,
            client(server),
        ):
            await within(waits.wait())
            scope.cancel()
            await anyio.sleep_forever()
    assert sum(server.statistics().closed.values()) == 1
    assert len(errors(log)) == (not refuses)


async def test_a_close_while_a_connection_becomes_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, while its server is ending: the owner is told."""
    async with opened() as (conn, peer):
        core = conn._core
        conn.set_on_request(echo_line)
        core.draining = True
        requests = core.requests

        def close(self: Any) -> None:
            thread = threading.Thread(target=self.close)
            thread.start()
            thread.join()

        monkeypatch.setattr(type(core), "_end_if_drained", close)
        peer.send(b"x\n")
        await holds(lambda: core.closed)
        await holds(lambda: core.requests is None)
        assert not requests.idle


# --- the event loop ends -------------------------------------------------------------------------

ENDINGS = """
import asyncio, sys
import anyio, anypoll

kept = []

async def function(conn):
    await conn.reader.next(1)
    await anyio.sleep_forever()

async def main():
    for state in sys.argv[2].split(","):
        conn, peer = anypoll.socketpair()
        kept.append((conn, peer))
        if state == "late":
            # what is submitted in the very last round begins after everything was cancelled
            await peer.send(b"x")
            while not len(conn.reader):
                await anyio.sleep(0.001)
            asyncio.get_running_loop().call_soon(conn.set_on_request, function)
            continue
        conn.set_on_request(function)
        if state == "busy":
            await peer.send(b"x")
            while conn._core.requests.idle:
                await anyio.sleep(0.001)

backend, options = {
    "asyncio": ("asyncio", {}), "uvloop": ("asyncio", {"use_uvloop": True}), "trio": ("trio", {})
}[sys.argv[1]]
anyio.run(main, backend=backend, backend_options=options)
assert all(conn._core.closed for conn, _ in kept)
print("ended")
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("states", ["idle", "idle,busy,busy,late"])
@pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {}), id="")])
async def test_the_loop_ends(loop: str, states: str) -> None:
    """Nothing hangs, nothing is said, and everything is closed."""
    if loop == "trio":
        states = states.replace("late", "busy")
    elif loop == "uvloop":
        pytest.importorskip("uvloop")
    done = run_to_end([sys.executable, "-W", "error", "-c", ENDINGS, loop, states])
    assert (done.stdout, done.stderr, done.returncode) == ("ended\n", "", 0)


FORGOTTEN = """
import asyncio, gc
import anypoll

class Everything:
    pass

async def function(conn):
    pass

async def main():
    conn, peer = anypoll.socketpair()
    conn.set_on_request(function)
    return conn, peer

everything = Everything()
everything.itself = everything
everything.loop = asyncio.new_event_loop()
everything.conns = everything.loop.run_until_complete(main())
gc.collect()  # puts what the connections hold behind them, also in what is collected at the end
gc.disable()
"""


@pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {}), id="")])
async def test_the_interpreter_ends() -> None:
    """It collects an idle connection before the hub that lists it. Under ``-W error`` the finaliser
    has not closed the connection.
    """
    done = run_to_end([sys.executable, "-W", "error", "-c", FORGOTTEN])
    assert done.returncode == 0


# --- cancelled, on asyncio -----------------------------------------------------------------------

on_asyncio = pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")])


@on_asyncio
async def test_a_native_cancel_in_a_call_ends_its_connection_alone() -> None:
    """Not the server: to its task group, a task that was cancelled by itself would be a failure."""

    async def function(conn: Connection) -> None:
        line = bytes(await conn.until(b"\n"))
        if line == b"cancel\n":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await anyio.sleep_forever()
        conn.writer.write(line)

    async with (
        local(on_request=function) as server,
        client(server) as sock,
        client(server) as other,
    ):
        for _ in range(3):
            await send_all(other, b"x\n")
            assert await read_all(other, 2) == b"x\n"
        await send_all(sock, b"cancel\n")
        assert await read_to_end(sock) == b""
        for _ in range(3):
            await send_all(other, b"x\n")
            assert await read_all(other, 2) == b"x\n"
        assert dict(server.statistics().closed) == {"cancelled": 1}


@on_asyncio
@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks")
async def test_eager_tasks() -> None:
    """A call begins in a task's own turn, never within what has made it due."""
    loop = asyncio.get_running_loop()
    eager: Any = getattr(asyncio, "eager_task_factory", None)
    loop.set_task_factory(eager)
    inside = False

    async def function(conn: Connection) -> None:
        assert not inside
        conn.writer.write(bytes(await conn.until(b"\n")))
        await anyio.sleep(0)

    try:
        async with opened() as (conn, peer):
            peer.send(b"1\n2\n3\n")
            await holds(lambda: len(conn.reader))
            inside = True
            conn.set_on_request(function)
            inside = False
            assert await read_all(peer, 6) == b"1\n2\n3\n"
    finally:
        loop.set_task_factory(None)
