"""Many tasks write messages to one connection: whole, in order, merged, bounded, and told."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError
from hypothesis import HealthCheck, given, settings, strategies as st
from peers import (
    KIB,
    arrived,
    at_once,
    holds,
    opened,
    pattern,
    read_all,
    read_to_end,
    reset,
    served,
    socket_pair,
    stalled,
    suspends,
    within,
)
from tls_peers import plain_or_tls

import anypoll
from anypoll import IdleTimeout, WriteTimeout, mux
from anypoll._loop import runtime
from anypoll.mux import ShardQueue
from anypoll.nocopy import LinkBuffer, wrap_writer

pytestmark = pytest.mark.anyio

HIGH = 256 * KIB  # the default of write_high_water
HEADER = struct.Struct(">HIH")


def message(caller: int, number: int, size: int) -> tuple[bytes, bytes]:
    return HEADER.pack(caller, number, size), pattern(size, seed=caller * 100_003 + number)


def check(stream: bytes, counts: dict[int, int], size: Callable[[int], int]) -> None:
    """The stream consists of so many messages of each caller, whole and in order."""
    seen = dict.fromkeys(counts, 0)
    view, position = memoryview(stream), 0
    while position < len(view):
        caller, number, length = HEADER.unpack_from(view, position)
        assert number == seen[caller]
        header, body = message(caller, number, size(number))
        end = position + len(header) + length
        assert view[position:end] == header + body
        seen[caller], position = number + 1, end
    assert seen == counts


class Gate(anyio.abc.ByteSendStream):
    """A stream that takes nothing until it is opened."""

    def __init__(self) -> None:
        self.items: list[bytes] = []
        self.open = anyio.Event()
        self.failure: Exception | None = None

    async def send(self, item: bytes) -> None:
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        self.items.append(item)

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def took(self, size: int) -> bytes:
        """What has come behind the filling, when it is so much."""
        await holds(lambda: sum(map(len, self.items)) >= HIGH + size)
        return b"".join(self.items)[HIGH:]


@asynccontextmanager
async def full() -> AsyncIterator[tuple[ShardQueue, Gate]]:
    """A queue that has no room until the gate is opened."""
    gate = Gate()
    async with ShardQueue(wrap_writer(gate)) as queue:
        await queue.add(bytes(HIGH))
        try:
            yield queue, gate
        finally:
            gate.open.set()


@asynccontextmanager
async def narrow(kind: str = "unix") -> AsyncIterator[tuple[anypoll.Connection, socket.socket]]:
    """As `opened()`, with little room in the kernel."""
    async with opened(kind) as (conn, peer):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * KIB)
        raw = conn.extra(anyio.abc.SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
        yield conn, peer


class Flood:
    """A task that adds without end until it is told to stop; counts the bytes it has added."""

    def __init__(self, queue: ShardQueue) -> None:
        self.queue, self.added = queue, 0
        self.told: Exception | None = None

    @classmethod
    async def stopped(cls, queue: ShardQueue, tg: anyio.abc.TaskGroup) -> Flood:
        """One that waits: the connection takes no more for now, and the queue is full."""
        flood = cls(queue)
        tg.start_soon(flood.run)
        await holds(lambda: queue._waiting and queue.buffered >= HIGH)
        return flood

    async def run(self) -> None:
        try:
            while True:
                await self.queue.add(bytes(50_000))
                self.added += 50_000
        except (BrokenResourceError, ClosedResourceError, WriteTimeout) as exc:
            self.told = exc


async def waiting(queue: ShardQueue, count: int) -> None:
    """Until so many calls of add() wait for room."""
    await holds(lambda: len(queue._waiting) == count)


# --- whole, in order, merged ---------------------------------------------------------------------


async def test_a_hundred_tasks_with_a_hundred_messages_each() -> None:
    """O23: each byte arrives, in each task's order, and in few system calls."""

    def size(number: int) -> int:
        return number % 24

    async def caller(queue: ShardQueue, name: int) -> None:
        for number in range(100):
            await queue.add(*message(name, number, size(number)))

    async def send(conn: anypoll.Connection) -> None:
        async with ShardQueue(conn) as queue, anyio.create_task_group() as tg:
            for name in range(100):
                tg.start_soon(caller, queue, name)
        await conn.send_eof()

    async with opened("tcp") as (conn, peer), anyio.create_task_group() as tg:
        tg.start_soon(send, conn)
        check(await read_to_end(peer), dict.fromkeys(range(100), 100), size)
        assert conn.statistics().writes <= 1000


async def test_messages_of_every_size_through_a_small_queue() -> None:
    """Those above 4 KiB are sent by reference, and all of them wait for room again and again."""
    tasks, count, added = 10, 120, 0

    def size(number: int) -> int:
        return [0, 1, 100, 4096, 4097, 40_000][number % 6]

    async def caller(queue: ShardQueue, name: int) -> None:
        nonlocal added
        for number in range(count):
            await queue.add(*message(name, number, size(number)))
            added += 1
            assert queue.buffered <= 1000 + HEADER.size + 40_000

    async with served(write_high_water=1000) as (conn, peer), ShardQueue(conn) as queue:
        async with anyio.create_task_group() as tg:
            for name in range(tasks):
                tg.start_soon(caller, queue, name)
            await stalled(conn)
            assert added < tasks * count, "who adds does not wait for a peer that does not read"
            total = tasks * sum(HEADER.size + size(number) for number in range(count))
            check(await read_all(peer, total), dict.fromkeys(range(tasks), count), size)
        await holds(lambda: queue.buffered == 0)


async def test_what_is_added_in_one_turn_is_sent_at_once() -> None:
    async with opened() as (conn, peer), ShardQueue(conn) as queue:
        before = conn.statistics().writes
        for _ in range(20):
            at_once(queue.add(b"ab", b"c"))
        assert queue.buffered == 60
        assert await read_all(peer, 60) == b"abc" * 20
        assert conn.statistics().writes == before + 1
        await holds(lambda: queue.buffered == 0)


async def test_no_bytes_are_no_message() -> None:
    async with opened() as (conn, peer), ShardQueue(conn) as queue:
        for nothing in [(), (b"",), (b"", bytearray()), (lambda: b"", LinkBuffer())]:
            await queue.add(*nothing)
        assert queue.buffered == 0
        await queue.add(b"", b"x", b"")
        assert await read_all(peer, 1) == b"x"
    assert conn.statistics().bytes_sent == 1


@pytest.mark.loops("asyncio")
async def test_a_checkpoint_comes_once_in_so_many_calls() -> None:
    """The queue may have been closed in it."""
    async with opened() as (conn, _peer), ShardQueue(conn) as queue:
        budget = runtime.settings().checkpoint_budget
        for _ in range(2):
            for _ in range(budget):
                at_once(queue.add(b"x"))
            assert suspends(queue.add(b"x"))
            await queue.add(b"x")
        queue._turns = 0
        adding = queue.add(b"never")
        adding.send(None)
        await queue.aclose()
        with pytest.raises(ClosedResourceError):
            adding.send(None)
    assert conn.statistics().bytes_sent == 2 * (budget + 1)


async def test_a_cancelled_task_stops_adding() -> None:
    """The checkpoint comes before the message is queued."""
    async with opened() as (conn, peer), ShardQueue(conn) as queue:
        added = 0
        with anyio.CancelScope() as scope:
            scope.cancel()
            while added < 10_000:
                await queue.add(b"x")
                added += 1
        assert 0 < added < 10_000
        assert len(await read_all(peer, added)) == added
        await queue.add(b"y")
        assert await read_all(peer, 1) == b"y"


# --- what a buffer may be ------------------------------------------------------------------------


async def test_changeable_buffers_are_copied() -> None:
    async with full() as (queue, gate):
        data = bytearray(b"first")
        view = memoryview(bytearray(b"second"))
        async with anyio.create_task_group() as tg:
            tg.start_soon(queue.add, data, view)
            await waiting(queue, 1)
            data[:] = b"?????"
            view[:] = b"??????"
            gate.open.set()
        data[:] = b"third"
        await queue.add(data)
        data[:] = b"?????"
        assert await gate.took(16) == b"firstsecondthird"


async def test_large_bytes_are_referenced() -> None:
    async with opened() as (conn, peer), ShardQueue(conn) as queue:
        data = bytes(5000)
        at_once(queue.add(data))
        assert queue._pieces[0] is data
        assert await read_all(peer, 5000) == data


async def test_a_link_buffer_is_moved() -> None:
    buffer = LinkBuffer()
    buffer.write(b"readable ")
    buffer.flush()
    buffer.write(b"written ")
    async with opened() as (conn, peer), ShardQueue(conn) as queue:
        await queue.add(b"<", buffer, b">")
        assert len(buffer) == 0
        assert await read_all(peer, 19) == b"<readable written >"
        buffer.write(b"again")
        await queue.add(buffer)
        assert await read_all(peer, 5) == b"again"


async def test_a_link_buffer_stays_whole_until_its_turn() -> None:
    buffer = LinkBuffer()
    buffer.write(b"mine")
    async with full() as (queue, _gate):
        async with anyio.create_task_group() as tg:
            tg.start_soon(queue.add, buffer)
            await waiting(queue, 1)
            tg.cancel_scope.cancel()
        buffer.flush()
        assert buffer.to_bytes() == b"mine"


async def test_callables_are_called_in_the_order_of_sending() -> None:
    numbers = iter(range(1000))

    def next_number() -> bytes:
        return b"%03d" % next(numbers)

    async with full() as (queue, gate):
        async with anyio.create_task_group() as tg:
            for _ in range(50):
                tg.start_soon(queue.add, next_number, b"filling " * 10_000)
            await waiting(queue, 50)
            assert next(numbers) == 0, "called before there was room"
            gate.open.set()
        got = await gate.took(50 * 80_003)
        assert got.replace(b"filling ", b"") == b"".join(b"%03d" % n for n in range(1, 51))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, LinkBuffer])
async def test_what_a_callable_may_return(kind: Any) -> None:
    result = kind() if kind is LinkBuffer else kind(b"bytes")
    if kind is LinkBuffer:
        result.write(b"bytes")
    async with opened() as (conn, peer), ShardQueue(conn) as queue:
        await queue.add(b"<", lambda: result, b">")
        assert await read_all(peer, 7) == b"<bytes>"


CLOSED = object()  # stands for a closed LinkBuffer


def failing() -> bytes:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("text", TypeError),
        (5, TypeError),
        (None, TypeError),
        ([b"x"], TypeError),
        (lambda: "text", TypeError),
        (lambda: failing, TypeError),
        (failing, ZeroDivisionError),
        (CLOSED, ClosedResourceError),
    ],
)
async def test_a_message_that_cannot_be_made(wrong: Any, error: type[Exception]) -> None:
    """O23: nothing of it is sent, nothing is taken, and the queue goes on."""
    buffer = LinkBuffer()
    buffer.write(b"kept")
    if wrong is CLOSED:
        wrong = LinkBuffer()
        wrong.close()
    async with opened() as (conn, peer), ShardQueue(conn) as queue:
        with pytest.raises(error):
            await queue.add(b"part", buffer, lambda: b"called", wrong)
        assert queue.buffered == 0
        await queue.add(buffer)
        assert await read_all(peer, 4) == b"kept"
    assert conn.statistics().bytes_sent == 4


async def test_a_callable_that_fails_after_a_wait() -> None:
    """O23: the room that was kept for it goes to the next one."""
    async with full() as (queue, gate):
        raised = []

        async def add_failing() -> None:
            with pytest.raises(ZeroDivisionError):
                await queue.add(b"part", failing)
            raised.append(1)

        async with anyio.create_task_group() as tg:
            for number in range(5):
                tg.start_soon(add_failing)
                await waiting(queue, 2 * number + 1)
                tg.start_soon(queue.add, b"%d" % number)
                await waiting(queue, 2 * number + 2)
            gate.open.set()
        assert sorted(await gate.took(5)) == sorted(b"01234")
        assert len(raised) == 5
        await holds(lambda: queue.buffered == 0)


# --- bounded -------------------------------------------------------------------------------------


async def test_who_waits_longest_goes_on_first() -> None:
    """And those for whom there is room only then: a grant counts at once."""
    async with full() as (queue, gate):

        async def add(data: bytes) -> None:
            await queue.add(data)
            assert sum(map(len, queue._pieces)) <= HIGH

        async with anyio.create_task_group() as tg:
            for number in range(6):
                tg.start_soon(add, bytes([number]) * HIGH)
                await waiting(queue, number + 1)
            gate.open.set()
        assert await gate.took(6 * HIGH) == b"".join(bytes([n]) * HIGH for n in range(6))


async def test_nobody_overtakes_who_waits() -> None:
    """Not with a smaller message either, for which there would be room."""
    async with full() as (queue, gate):
        async with anyio.create_task_group() as tg:
            tg.start_soon(queue.add, b"first" * HIGH)
            await waiting(queue, 1)
            tg.start_soon(queue.add, b"second")
            await waiting(queue, 2)
            gate.open.set()
        assert await gate.took(5 * HIGH + 6) == b"first" * HIGH + b"second"


async def test_a_cancelled_add_leaves_nothing_behind() -> None:
    async with full() as (queue, gate):
        scopes = [anyio.CancelScope() for _ in range(6)]

        async def add(number: int) -> None:
            with scopes[number]:
                await queue.add(b"%d" % number)

        async with anyio.create_task_group() as tg:
            for number in range(6):
                tg.start_soon(add, number)
                await waiting(queue, number + 1)
            for number in (0, 3, 5):
                scopes[number].cancel()
            await waiting(queue, 3)
            gate.open.set()
        assert sorted(await gate.took(3)) == sorted(b"124")
        await holds(lambda: queue.buffered == 0)
    assert sum(map(len, gate.items)) == HIGH + 3


@pytest.mark.parametrize(
    "whose", ["AnyIO's", pytest.param("asyncio's", marks=pytest.mark.loops("asyncio"))]
)
async def test_an_add_that_is_cancelled_when_its_turn_has_come(whose: str) -> None:
    """It is sent as a whole, or not at all; and its room is not lost."""
    async with full() as (queue, gate):
        cancels: list[Callable[[], Any]] = []
        done: list[int] = []

        async def add(number: int) -> None:
            with anyio.CancelScope() as scope:
                task = asyncio.current_task() if whose == "asyncio's" else None
                cancels.append(task.cancel if task else scope.cancel)
                await queue.add(b"%c" % (ord("a") + number))
                done.append(number)
                for cancel in cancels:  # those behind have been granted room, and have not run
                    cancel()

        async with anyio.create_task_group() as tg:
            for number in range(20):
                tg.start_soon(add, number)
                await waiting(queue, number + 1)
            gate.open.set()
        assert done
        assert sorted(await gate.took(len(done))) == sorted(ord("a") + n for n in done)
        await holds(lambda: queue.buffered == 0)
        assert queue._size == 0
    assert sum(map(len, gate.items)) == HIGH + len(done)


@pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")])
async def test_the_room_of_who_gives_up_goes_to_who_is_behind() -> None:
    """Also when nothing else is sent that would set things right."""

    class Cancelling(Gate):
        async def send(self, item: bytes) -> None:
            await super().send(item)
            asyncio.get_running_loop().call_soon(first.cancel)  # before it runs, behind the grant

    gate = Cancelling()
    async with ShardQueue(wrap_writer(gate)) as queue:
        await queue.add(bytes(HIGH))
        first = asyncio.create_task(queue.add(bytes(HIGH)))
        await waiting(queue, 1)
        second = asyncio.create_task(queue.add(b"x"))
        await waiting(queue, 2)
        gate.open.set()
        await within(second)
        assert first.cancelled()
        await holds(lambda: queue.buffered == 0)
        assert queue._size == 0
    assert gate.items == [bytes(HIGH), b"x"]


async def test_those_who_have_waited_are_sent_together() -> None:
    async with full() as (queue, gate), anyio.create_task_group() as tg:
        for _ in range(50):
            tg.start_soon(queue.add, b"x")
        await waiting(queue, 50)
        gate.open.set()
    assert gate.items == [bytes(HIGH), b"x" * 50]


async def test_callables_go_on_one_at_a_time() -> None:
    """Nobody knows before how much room they need."""
    room: list[int] = []

    async with full() as (queue, gate):

        def large() -> bytes:
            room.append(HIGH - queue.buffered)
            return bytes(HIGH)

        async with anyio.create_task_group() as tg:
            for _ in range(5):
                tg.start_soon(queue.add, large)
            await waiting(queue, 5)
            gate.open.set()
    assert len(room) == 5
    assert min(room) > 0


async def test_a_task_that_reads_does_not_wait_for_the_queue() -> None:
    """Else two ends that both wait for room would wait for each other."""
    async with narrow() as (conn, peer), anyio.create_task_group() as tg:
        async with ShardQueue(conn) as queue:
            await Flood.stopped(queue, tg)
            peer.send(b"input")
            assert await within(conn.next(5)) == b"input"
            assert queue.buffered >= HIGH
            tg.start_soon(read_to_end, peer)
        await conn.send_eof()


# --- one sender ----------------------------------------------------------------------------------


async def test_nobody_else_sends_meanwhile() -> None:
    async with opened() as (conn, peer):
        async with ShardQueue(conn) as queue:
            for call in (conn.send_eof, conn.writer.flush, conn.wait_writable):
                with pytest.raises(BusyResourceError):
                    await call()
            with pytest.raises(BusyResourceError):
                await conn.send(b"x")
            with pytest.raises(BusyResourceError):
                conn.detach()
            with pytest.raises(BusyResourceError):
                async with ShardQueue(conn):
                    pass
            await queue.add(b"queued ")
        await conn.send(b"sent ")
        async with ShardQueue(conn) as queue:
            await queue.add(b"queued again")
        assert await read_all(peer, 24) == b"queued sent queued again"


async def test_entering_while_another_task_sends() -> None:
    async with opened() as (conn, peer), anyio.create_task_group() as tg:
        data = pattern(8 * 1024 * KIB)
        tg.start_soon(conn.send, data)
        await holds(lambda: conn.statistics().buffered_output)
        queue = ShardQueue(conn)
        with pytest.raises(BusyResourceError):
            await queue.__aenter__()
        assert await read_all(peer, len(data)) == data


async def test_what_the_writer_has_pending_goes_first() -> None:
    async with opened() as (conn, peer):
        conn.writer.write(b"pending ")
        conn.writer.malloc(9)[:] = b"reserved "
        async with ShardQueue(conn) as queue:
            await queue.add(b"queued")
        assert await read_all(peer, 23) == b"pending reserved queued"


# --- the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        "normally",
        "an exception",
        "cancelled",
        "a cancelled close",
        pytest.param("asyncio's own cancellation", marks=pytest.mark.loops("asyncio")),
    ],
)
async def test_leaving_the_block_drains(how: str) -> None:
    """O23: without loss, and the connection stays open. All but the normal end wait for nothing:
    what is left is pending output.
    """
    ends = (ZeroDivisionError, asyncio.CancelledError) if "asyncio" in how else ZeroDivisionError
    got: list[bytes] = []

    async def read() -> None:
        await holds(lambda: flood.told)  # the drain has begun
        got.append(await read_to_end(peer))

    async with narrow() as (conn, peer), anyio.create_task_group() as tg:
        with anyio.CancelScope() as scope, suppress(ends):
            async with ShardQueue(conn) as queue:
                flood = await Flood.stopped(queue, tg)
                if how == "normally":
                    tg.start_soon(read)
                elif how == "an exception":
                    raise ZeroDivisionError
                elif how == "a cancelled close":
                    with anyio.CancelScope() as closing:
                        closing.cancel()
                        await queue.aclose()
                    assert closing.cancelled_caught
                else:
                    task = asyncio.current_task() if "asyncio" in how else None
                    (task or scope).cancel()
                    await anyio.sleep_forever()
        assert scope.cancelled_caught == (how == "cancelled")
        assert queue.buffered == 0
        if how != "normally":
            tg.start_soon(read)
        await conn.send(b"after")
        await conn.send_eof()
    assert isinstance(flood.told, ClosedResourceError)
    assert got == [bytes(flood.added) + b"after"]


async def test_adding_after_the_end() -> None:
    """L25, O23: it is refused, not dropped."""
    async with opened() as (conn, peer):
        async with ShardQueue(conn) as queue:
            await queue.add(b"x")
            await queue.aclose()
            with pytest.raises(ClosedResourceError):
                await queue.add(b"y")
        with pytest.raises(ClosedResourceError):
            await queue.add(b"z")
        with pytest.raises(ClosedResourceError):
            await queue.add(failing)
        assert await read_all(peer, 1) == b"x"
    assert conn.statistics().bytes_sent == 1


async def test_adding_while_it_drains() -> None:
    """L25: the end begins with the call; who waits is told, and what was queued is sent."""
    async with full() as (queue, gate):
        told: list[BaseException] = []

        async def add() -> None:
            with pytest.raises(ClosedResourceError) as caught:
                await queue.add(b"late")
            told.append(caught.value)

        async with anyio.create_task_group() as tg:
            for number in range(3):
                tg.start_soon(add)
                await waiting(queue, number + 1)
            tg.start_soon(queue.aclose)
            await holds(lambda: len(told) == 3)
            assert queue.buffered == HIGH
            await add()
            gate.open.set()
        assert len(set(map(id, told))) == 4
        assert await gate.took(0) == b""


async def test_closing_twice() -> None:
    """L25: one after the other, and both at once; the second waits for the same end."""
    async with full() as (queue, gate):
        ended = []

        async def close() -> None:
            await queue.aclose()
            ended.append(queue.buffered)

        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(close)
            await anyio.wait_all_tasks_blocked()
            assert ended == []
            gate.open.set()
        assert ended == [0, 0, 0]
        await queue.aclose()


async def test_closing_waits_for_an_event() -> None:
    """O23: while it drains no task runs, so that all are found blocked."""
    async with narrow() as (conn, peer), anyio.create_task_group() as tg:
        async with ShardQueue(conn) as queue:
            flood = await Flood.stopped(queue, tg)
            tg.start_soon(queue.aclose)
            await anyio.wait_all_tasks_blocked()
            assert queue.buffered
            assert flood.told
            tg.start_soon(read_to_end, peer)
        await conn.send_eof()


@pytest.mark.parametrize("aborted", [False, True])
async def test_leaving_by_an_exception_before_the_sender_has_begun(aborted: bool) -> None:
    """An aborted connection takes nothing any more."""
    async with opened() as (conn, peer):
        with suppress(ZeroDivisionError):
            async with ShardQueue(conn) as queue:
                at_once(queue.add(b"at once"))
                if aborted:
                    conn.abort()
                raise ZeroDivisionError
        assert arrived(peer) == (0 if aborted else 7)


async def test_adding_shielded_in_a_cancelled_block() -> None:
    """Cancelling the block does not end the sender before the block ends."""
    async with narrow() as (conn, peer):
        with anyio.CancelScope() as scope:
            async with ShardQueue(conn) as queue:
                scope.cancel()
                try:
                    await anyio.sleep_forever()
                finally:
                    with anyio.CancelScope(shield=True):
                        await holds(lambda: queue.buffered == 0)
                        await queue.add(b"goodbye" * HIGH)
                        got = await read_all(peer, 7 * HIGH)
        assert got == b"goodbye" * HIGH


def test_an_event_loop_that_ends_in_the_block(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    name, options = anyio_backend

    async def main() -> None:
        async with (
            narrow() as (conn, _peer),
            anyio.create_task_group() as tg,
            ShardQueue(conn) as queue,
        ):
            await Flood.stopped(queue, tg)
            conn.write_timeout = 0
            raise SystemExit(5)

    with pytest.raises(BaseException) as caught:
        anyio.run(main, backend=name, backend_options=options)
    assert "SystemExit(5)" in repr(caught.value)


# --- failure -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how", "error"),
    [
        ("tcp", "reset", BrokenResourceError),
        ("unix", "reset", BrokenResourceError),
        ("unix", "closed", ClosedResourceError),
        ("unix", "timeout", WriteTimeout),
    ],
)
async def test_a_break_is_told_to_everybody(kind: str, how: str, error: type[Exception]) -> None:
    """O23: to those who wait, to all who come later, and to the block. After a timeout what the
    kernel had not taken is still pending, as after any flush; the rest is dropped.
    """
    told: list[BaseException | None] = []
    added = 0

    async def add(queue: ShardQueue) -> None:
        nonlocal added
        flood = Flood(queue)
        await flood.run()
        told.append(flood.told)
        added += flood.added

    async def block(conn: anypoll.Connection, peer: socket.socket) -> None:
        async with ShardQueue(conn) as queue:
            async with anyio.create_task_group() as tg:
                conn.write_timeout = 0.05 if how == "timeout" else None
                for _ in range(5):
                    tg.start_soon(add, queue)
                if how != "timeout":
                    await waiting(queue, 5)
                if how == "reset":
                    reset(peer)
                elif how == "closed":
                    await conn.aclose()
            await add(queue)
            assert queue.buffered == 0

    async with narrow(kind) as (conn, peer):
        with pytest.raises(error) as caught:
            await block(conn, peer)
        told.append(caught.value)
        if how == "timeout":
            conn.write_timeout = None
            async with anyio.create_task_group() as tg:
                tg.start_soon(conn.aclose)
                got = await read_to_end(peer)
            assert 0 < len(got) <= added
            assert len(got) % 50_000 == 0
    assert len(set(map(id, told))) == 7
    assert {type(exc) for exc in told} == {error}
    if how == "reset":
        assert all(isinstance(exc.__cause__, ConnectionError) for exc in told if exc)


@pytest.mark.parametrize(
    ("how", "error"),
    [("reset", BrokenResourceError), ("closed", ClosedResourceError), ("idle", IdleTimeout)],
)
async def test_an_end_while_nothing_is_queued(how: str, error: type[Exception]) -> None:
    """It is told at once, and the end of the block, with nothing lost, does not raise."""
    async with opened("tcp") as (conn, peer), ShardQueue(conn) as queue:
        await queue.add(b"x")
        assert await read_all(peer, 1) == b"x"
        await holds(lambda: queue.buffered == 0)
        if how == "reset":
            reset(peer)
        elif how == "closed":
            await conn.aclose()
        else:
            conn.idle_timeout = 0.01
        await holds(lambda: not conn.is_active)
        with pytest.raises(error) as caught:
            await queue.add(b"never")
        if how == "reset":
            assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_a_peer_that_half_closes_still_gets_messages() -> None:
    async with opened("tcp") as (conn, peer), ShardQueue(conn) as queue:
        peer.shutdown(1)
        with pytest.raises(anyio.EndOfStream):
            await conn.receive()
        await queue.add(b"still")
        assert await read_all(peer, 5) == b"still"


@pytest.mark.parametrize("how", ["closed", "broken", "ended"])
async def test_entering_over_what_takes_nothing(how: str) -> None:
    async with opened("tcp") as (conn, peer):
        if how == "closed":
            await conn.aclose()
        elif how == "ended":
            await conn.send_eof()
        else:
            reset(peer)
            await holds(lambda: not conn.is_active)
        error = BrokenResourceError if how == "broken" else ClosedResourceError
        queue = ShardQueue(conn)
        with pytest.raises(error):
            async with queue:
                pytest.fail("entered")
        with pytest.raises(RuntimeError):
            await queue.add(b"x")
        if how == "ended":
            await conn.send_eof()  # nobody is in its way


async def test_a_connection_with_messages_is_refused(tmp_path: Path) -> None:
    """A merged message would be another message."""
    kind = socket.SOCK_SEQPACKET
    with socket.socket(socket.AF_UNIX, kind) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        async with await anypoll.connect_unix(tmp_path / "s", kind=kind) as conn:
            peer, _ = listening.accept()
            with peer:
                queue = ShardQueue(conn)
                with pytest.raises(ValueError, match="SEQPACKET"):
                    await queue.__aenter__()
                await conn.send(b"a message")
                assert peer.recv(100) == b"a message"


async def test_a_handler_that_is_told_of_its_peers_end_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It ends as one whose own send() has failed."""
    caplog.set_level(logging.INFO, "anypoll")

    async def handler(conn: anypoll.Connection) -> None:
        async with ShardQueue(conn) as queue:
            while True:
                await queue.add(bytes(10_000))

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        client = await anyio.connect_tcp("127.0.0.1", server.port)
        await client.receive()
        await client.aclose()
        await holds(lambda: server.statistics().closed)
        assert dict(server.statistics().closed) == {"broken": 1}
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


# --- misuse --------------------------------------------------------------------------------------


async def test_outside_of_the_block() -> None:
    async with opened() as (conn, _peer):
        queue = ShardQueue(conn)
        with pytest.raises(RuntimeError, match="async with"):
            await queue.add(b"x")
        async with queue:
            with pytest.raises(RuntimeError, match="once"):
                await queue.__aenter__()
        closed = ShardQueue(conn)
        await closed.aclose()
        await closed.aclose()
        with pytest.raises(ClosedResourceError):
            await closed.add(b"x")
        for ended in (queue, closed):
            with pytest.raises(RuntimeError, match="once"):
                await ended.__aenter__()
        await conn.send(b"x")


async def test_other_event_loops_are_refused(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    name, options = anyio_backend
    told: list[str] = []

    def refused(*call: Any) -> None:
        with pytest.raises(RuntimeError, match="event loop"):
            anyio.run(*call, backend=name, backend_options=options)
        told.append("told")

    def refused_elsewhere(*call: Any) -> None:
        thread = threading.Thread(target=refused, args=call)
        thread.start()
        thread.join()

    async with opened() as (conn, peer):
        fresh = ShardQueue(conn)
        async with ShardQueue(conn) as queue:
            refused_elsewhere(queue.add, b"x")
            refused_elsewhere(queue.aclose)
            await queue.add(b"still open")
        refused_elsewhere(fresh.__aenter__)
        assert len(told) == 3
        assert await read_all(peer, 10) == b"still open"


async def test_its_parameters_and_its_repr() -> None:
    for wrong in (None, 5, b"x", object()):
        with pytest.raises(TypeError, match="nocopy writer is required"):
            ShardQueue(wrong)  # type: ignore[arg-type]
    async with opened() as (conn, peer):
        for shards, error in (
            (0, ValueError),
            (-1, ValueError),
            (1.5, TypeError),
            ("4", TypeError),
        ):
            with pytest.raises(error, match="shards must be"):
                ShardQueue(conn, shards=shards)  # type: ignore[arg-type]
        async with ShardQueue(conn, shards=32) as queue:
            at_once(queue.add(b"12345"))
            assert repr(queue) == "<anypoll.mux.ShardQueue 5 bytes>"
        assert repr(queue) == "<anypoll.mux.ShardQueue closed>"
        assert await read_all(peer, 5) == b"12345"


# --- over other things ---------------------------------------------------------------------------


async def test_over_a_unix_connection() -> None:
    ours, peer = socket_pair("unix")
    peer.setblocking(False)
    with peer:
        async with await anypoll.UNIXConnection.from_socket(ours) as conn:
            async with ShardQueue(conn) as queue:
                await queue.add(b"hello")
                with pytest.raises(BusyResourceError):
                    await conn.send_fds(b"x", [0])
            await conn.send_fds(b"x", [peer.fileno()])
            assert await read_all(peer, 6) == b"hellox"


async def test_over_any_stream() -> None:
    gate = Gate()
    writer = wrap_writer(gate)
    async with ShardQueue(writer) as queue:
        await queue.add(b"first ")
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(BusyResourceError):
            await writer.flush()
        for _ in range(3):
            await queue.add(b"merged ")
        assert queue.buffered == 6 + 3 * 7
        gate.open.set()
    assert gate.items == [b"first ", b"merged " * 3]
    writer.write(b"after")
    await writer.flush()
    assert gate.items[-1] == b"after"


async def test_a_stream_that_fails() -> None:
    """Whatever it raises has broken it; what was queued behind is dropped."""
    gate = Gate()
    gate.failure = OSError("no route")
    writer = wrap_writer(gate)
    told: list[BaseException] = []

    async def block() -> None:
        async with ShardQueue(writer) as queue:
            await queue.add(b"x")
            await anyio.wait_all_tasks_blocked()
            await queue.add(b"behind")
            gate.open.set()
            await holds(lambda: queue._closed)
            with pytest.raises(BrokenResourceError) as caught:
                await queue.add(b"y")
            told.append(caught.value)

    with pytest.raises(BrokenResourceError) as caught:
        await block()
    assert [told[0].__cause__, caught.value.__cause__] == [gate.failure] * 2
    assert told[0] is not caught.value
    assert len(writer) == 0


@pytest.mark.parametrize("begun", [True, False])
async def test_leaving_a_stream_by_an_exception(begun: bool) -> None:
    """What it was not given is pending in the writer."""
    gate = Gate()
    writer = wrap_writer(gate)
    with suppress(ZeroDivisionError):
        async with ShardQueue(writer) as queue:
            if begun:
                await queue.add(b"given")
                await anyio.wait_all_tasks_blocked()
            at_once(queue.add(b"kept"))
            raise ZeroDivisionError
    assert len(writer) == 4
    gate.open.set()
    await writer.flush()
    assert gate.items == [b"kept"]


# --- against a model -----------------------------------------------------------------------------

SIZES = st.one_of(st.integers(0, 300), st.sampled_from([4096, 4097, 30_000, 300_000]))
KINDS = st.sampled_from(["bytes", "bytearray", "buffer", "callable", "failing"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 3), st.lists(st.tuples(KINDS, SIZES), max_size=3)),
        st.tuples(st.just("read"), st.integers(1, 400_000), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("rest"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


TOLD = (BrokenResourceError, ClosedResourceError)
ENDS = ["left", "closed", "aborted", "reset", "reset, and read"]


@asynccontextmanager
async def two(contexts: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Both ends of a connection, over TLS if there are contexts for that."""
    near, far = [await anypoll.Connection.from_socket(sock) for sock in socket_pair("tcp")]
    ends: list[Any] = [near, far]

    async def shake_hands(which: int, **options: Any) -> None:
        ends[which] = await anypoll.TLSConnection.wrap(ends[which], **options)

    try:
        if contexts is not None:
            async with anyio.create_task_group() as both:
                both.start_soon(partial(shake_hands, 1, server_side=True, ssl_context=contexts[0]))
                await shake_hands(0, hostname="anypoll.test", ssl_context=contexts[1])
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.abort()


class Model:
    """Callers that add what they are told, one message after the other, and what must arrive.
    They are told of the end; what has arrived until then begins what they were promised.
    """

    def __init__(self, queue: ShardQueue, near: Any, far: Any) -> None:
        self.queue, self.near, self.far = queue, near, far
        self.orders = [anyio.create_memory_object_stream[Any](100) for _ in range(4)]
        self.scopes = [anyio.CancelScope() for _ in range(4)]
        self.promised = [bytearray() for _ in range(4)]  # what add() has returned for
        self.told: list[Exception] = []
        self.ready = 0
        self.got = bytearray()

    @staticmethod
    def part(kind: str, size: int) -> tuple[Any, bytes]:
        data = pattern(size, seed=size)
        if kind == "failing":
            return failing, b""
        if kind == "callable":
            return lambda: data, data
        if kind == "buffer":
            buffer = LinkBuffer()
            buffer.write(data)
            return buffer, data
        return (bytearray(data) if kind == "bytearray" else data), data

    async def caller(self, name: int) -> None:
        async with self.orders[name][1] as orders:
            with suppress_and_note(self.told):
                async for number, parts in orders:
                    made = [self.part(*part) for part in parts]
                    body = b"".join(data for _, data in made)
                    header = struct.pack(">BHI", name, number, len(body))
                    with anyio.CancelScope() as self.scopes[name], suppress(ZeroDivisionError):
                        await self.queue.add(header, *[part for part, _ in made])
                        self.promised[name] += header + body
                        assert "failing" not in [kind for kind, _ in parts]

    async def step(self, what: str, which: int, parts: Any) -> None:
        if what == "add":
            self.orders[which][0].send_nowait((self.ready, parts))
            self.ready += 1
        elif what == "read":
            if len(self.far.reader):
                self.got += await self.far.receive(which)
        elif what == "cancel":
            self.scopes[which].cancel()
        else:
            await anyio.wait_all_tasks_blocked()

    async def read(self) -> None:
        with suppress(*TOLD):
            async for chunk in self.far:
                self.got += chunk

    async def learn(self) -> None:
        with pytest.raises(BrokenResourceError):
            await self.near.receive()

    async def end(self, how: str) -> None:
        if how == "closed":
            await self.queue.aclose()
        elif how == "aborted":
            self.near.abort()
        elif how != "left":
            self.far.abort()

    async def refused(self) -> None:
        """Every later add() is told, too."""
        with anyio.fail_after(60), suppress_and_note(self.told):
            while True:
                await self.queue.add(b"x")
                await anyio.sleep(0)

    def compare(self, *, complete: bool) -> None:
        """Each promised message is there once, whole, in its caller's order; and nothing else. At
        an early end they are the first, and the last one may be cut.
        """
        came = [bytearray() for _ in range(4)]
        position = 0
        while len(self.got) - position >= 7:
            name, _, size = struct.unpack_from(">BHI", self.got, position)
            came[name] += self.got[position : position + 7 + size]
            position += 7 + size
        if complete:
            assert came == self.promised
            assert position == len(self.got)
        for have, promised in zip(came, self.promised, strict=True):
            assert promised.startswith(have)


@contextmanager
def suppress_and_note(told: list[Exception]) -> Iterator[None]:
    try:
        yield
    except TOLD as exc:
        told.append(exc)


async def run_the_model(steps: list[Any], how: str, contexts: Any) -> None:
    async with two(contexts) as (near, far), anyio.create_task_group() as others:
        queue = ShardQueue(near)
        model = Model(queue, near, far)
        with suppress_and_note(model.told):  # what was queued has been lost
            async with queue, anyio.create_task_group() as tg:
                if how == "reset, and read":
                    others.start_soon(model.learn)
                for name in range(4):
                    tg.start_soon(model.caller, name)
                for step in steps:
                    await model.step(*step)
                if how in ("left", "closed"):
                    others.start_soon(model.read)
                await model.end(how)
                for orders, _ in model.orders:
                    orders.close()
                if how != "left":
                    await model.refused()
        assert queue.buffered == queue._size == 0
        if how in ("left", "closed"):
            await near.send_eof()
            await holds(lambda: far.at_eof)
        model.compare(complete=how in ("left", "closed"))
        error = BrokenResourceError if how.startswith("reset") else ClosedResourceError
        assert {type(exc) for exc in model.told} == (set() if how == "left" else {error})
        for exc in model.told:
            assert how == "closed" or exc.__cause__ is not None


@plain_or_tls
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, how=st.sampled_from(ENDS))
def test_any_callers_and_an_end(
    anyio_backend: tuple[str, dict[str, Any]],
    tls_contexts: Any,
    tls_way: str,
    steps: list[Any],
    how: str,
) -> None:
    name, options = anyio_backend
    contexts = None if tls_way == "plain" else tls_contexts
    anyio.run(run_the_model, steps, how, contexts, backend=name, backend_options=options)


# --- the text ------------------------------------------------------------------------------------


def test_the_example_of_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    assert mux.__doc__ is not None
    program = mux.__doc__.split("::\n", 1)[1].split("\nHow it works", 1)[0]
    exec(textwrap.dedent(program), {})
    assert sorted(capsys.readouterr().out.splitlines()) == [f"{n:03}: hello" for n in range(100)]
