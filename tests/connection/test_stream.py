"""The contract of AnyIO's socket streams: each operation, on each loop, over TCP and UNIX."""

from __future__ import annotations

import array
import asyncio
import contextlib
import functools
import gc
import inspect
import os
import random
import socket
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import pytest
from anyio import (
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
)
from anyio.abc import SocketAttribute
from peers import (
    KIB,
    MIB,
    arrive,
    arrived,
    blocked,
    fill_the_kernel,
    given_up,
    holds,
    opened,
    pattern,
    pollers_have_looked,
    read_all,
    read_to_end,
    reset,
    send_all,
    settle,
    socket_pair,
    stalled,
    within,
)

import anypoll
from anypoll import Connection, ReadTimeout, UNIXConnection, WriteTimeout, _epoll

pytestmark = pytest.mark.anyio

Pair = tuple[Connection, Connection]
Wire = tuple[Connection, socket.socket]

WRITING = "Another task is already writing to this resource"
#: More than the kernel's buffers of a connection hold.
HUGE = 16 * MIB
pattern = functools.lru_cache(maxsize=8)(pattern)


@pytest.fixture(params=["tcp", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@asynccontextmanager
async def connected(kind: str) -> AsyncIterator[Pair]:
    if kind == "unix":
        first, second = anypoll.socketpair()
    else:
        async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(SocketAttribute.local_port)
            first = await anypoll.connect_tcp("127.0.0.1", port)
            second = await listener.listeners[0].accept()
    async with first, second:
        yield first, second


@pytest.fixture
async def pair(kind: str) -> AsyncIterator[Pair]:
    """Two connections, connected to each other."""
    async with connected(kind) as both:
        yield both


@pytest.fixture
async def wire(kind: str) -> AsyncIterator[Wire]:
    """A connection, and the plain socket at its other end."""
    async with opened(kind) as both:
        yield both


async def cancelled(call: Callable[[], Awaitable[Any]]) -> None:
    """The call raises in a scope that is cancelled already."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        await call()
        pytest.fail("the call did not see the cancellation")
    assert scope.cancelled_caught


@types.coroutine
def _counted(coroutine: Any, suspensions: list[Any]) -> Generator[Any, Any, Any]:
    """Runs the coroutine as `await` would, and notes each suspension."""
    step: Callable[[], Any] = functools.partial(coroutine.send, None)
    while True:
        try:
            suspensions.append(step())
        except StopIteration as stop:
            return stop.value
        try:
            value = yield suspensions[-1]
        except BaseException as exc:  # noqa: BLE001 -- it is handed on
            step = functools.partial(coroutine.throw, exc)
        else:
            step = functools.partial(coroutine.send, value)


async def yields(call: Callable[[], Awaitable[Any]]) -> Any:
    """The call gives other tasks a turn before it returns, or raises."""
    suspensions: list[Any] = []
    coroutine = call()
    assert inspect.isawaitable(coroutine)
    try:
        return await _counted(coroutine, suspensions)
    finally:
        assert suspensions, "not a checkpoint"


async def all_of(conn: Connection) -> bytes:
    """What comes, to the end of the stream."""
    return b"".join([piece async for piece in conn])


async def rest_with(conn: Connection, peer: socket.socket, last: bytes) -> bytes:
    """Sends this as the last of all; what the peer gets of everything."""
    async with blocked(lambda: read_to_end(peer)) as outcome:
        await within(conn.send(last))
        await conn.send_eof()
    return outcome[0]  # type: ignore[no-any-return]


async def fill(conn: Connection) -> bytes:
    """Sends until neither side's buffers take more; the call was cancelled then."""
    data = pattern(HUGE, 99)
    await given_up(conn, conn.send, data)
    await stalled(conn)
    return data


# --- receive -------------------------------------------------------------------------------------


async def test_receive(wire: Wire) -> None:
    conn, peer = wire
    await arrive(conn, peer, b"hello, world")
    data = await conn.receive(5)
    assert data == b"hello"
    assert type(data) is bytes
    assert await conn.receive() == b", world"


async def test_receive_refuses_what_is_no_number_of_bytes(wire: Wire) -> None:
    """Before anything else, and what is there stays."""
    conn, peer = wire

    async def refused() -> None:
        for wrong in (0, -1, 1.5, 2.0, "1", None):
            error = ValueError if type(wrong) is int else TypeError
            with pytest.raises(error, match=r"^max_bytes must be a positive integer"):
                await within(conn.receive(wrong))  # type: ignore[arg-type]

    await refused()
    await arrive(conn, peer, b"abc")
    await refused()
    assert await conn.receive(2) == b"ab"
    assert await conn.receive(10**30) == b"c"
    await conn.aclose()
    await refused()


async def test_the_end_of_the_stream_stays(wire: Wire) -> None:
    conn, peer = wire
    await send_all(peer, b"last words")
    peer.shutdown(socket.SHUT_WR)
    assert await within(conn.next(10)) == b"last words"
    for _ in range(3):
        with pytest.raises(EndOfStream):
            await within(conn.receive())
    assert conn.at_eof
    assert conn.is_active


async def test_iteration(wire: Wire) -> None:
    conn, peer = wire
    data = pattern(200 * KIB)

    async def send() -> None:
        await send_all(peer, data)
        peer.shutdown(socket.SHUT_WR)

    got = bytearray()
    async with anyio.create_task_group() as group:
        group.start_soon(send)
        async for piece in conn:
            assert 0 < len(piece) <= 65536
            got += piece
    assert got == data
    assert [piece async for piece in conn] == []


# --- send ----------------------------------------------------------------------------------------


async def test_send_takes_what_is_like_bytes(wire: Wire) -> None:
    conn, peer = wire
    for item in (b"1", bytearray(b"2"), memoryview(b"-3-")[1:2], array.array("B", [52])):
        await conn.send(item)
    for wrong in ("text", None, 5, memoryview(b"a-b-")[::2]):
        with pytest.raises((TypeError, ValueError, BufferError)):
            await conn.send(wrong)  # type: ignore[arg-type]
    await conn.send(b"5")
    assert await read_all(peer, 5) == b"12345"


async def test_sending_nothing(wire: Wire) -> None:
    conn, _ = wire
    await yields(lambda: conn.send(b""))
    await cancelled(lambda: conn.send(b""))
    assert conn.statistics().writes == 0


@pytest.mark.parametrize("size", [1, 65537, 5 * MIB])
async def test_large_and_small_items_arrive(pair: Pair, size: int) -> None:
    first, second = pair
    data = pattern(size)

    async def send() -> None:
        await first.send(data)
        await first.send_eof()

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        assert await within(all_of(second)) == data


async def test_both_directions_at_once(pair: Pair) -> None:
    results: dict[Connection, bytes] = {}

    async def collect(conn: Connection) -> None:
        results[conn] = await all_of(conn)

    async def send(conn: Connection, data: bytes) -> None:
        await conn.send(data)
        await conn.send_eof()

    first, second = pair
    there, back = pattern(3 * MIB, 1), pattern(2 * MIB, 2)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for conn, data in ((first, there), (second, back)):
                group.start_soon(collect, conn)
                group.start_soon(send, conn, data)
    assert results == {first: back, second: there}


async def test_the_buffer_may_be_changed_after_the_send(wire: Wire) -> None:
    conn, peer = wire
    buffer = bytearray(pattern(HUGE))
    expected = bytes(buffer)
    got = bytearray()
    async with blocked(lambda: conn.send(buffer)) as outcome:
        with anyio.fail_after(120):
            while not outcome:
                with contextlib.suppress(BlockingIOError):
                    got += peer.recv(64 * KIB)
                await anyio.sleep(0)
    assert outcome == [None]
    buffer[:] = bytes(len(buffer))
    buffer.clear()  # nobody exports it any more
    got += await read_all(peer, len(expected) - len(got))
    assert got == expected


async def test_writer_output_goes_first(wire: Wire) -> None:
    conn, peer = wire
    conn.writer.write(b"first ")
    await conn.send(b"second ")
    conn.writer.write(b"third")
    await holds(lambda: arrived(peer) >= 13)
    assert arrived(peer) == 13
    await conn.writer.flush()
    assert await read_all(peer, 18) == b"first second third"


# --- send_eof ------------------------------------------------------------------------------------


async def test_send_eof(wire: Wire) -> None:
    conn, peer = wire
    conn.writer.write(b"pending ")
    await conn.send_eof()
    assert await within(read_to_end(peer)) == b"pending "
    await conn.send_eof()
    with pytest.raises(ClosedResourceError):
        await conn.send(b"x")
    with pytest.raises(ClosedResourceError):
        conn.writer.write(b"x")
    assert conn.is_active
    await send_all(peer, b"still readable")
    assert await conn.next(14) == b"still readable"


async def test_send_eof_sends_what_is_written_until_then(wire: Wire) -> None:
    conn, peer = wire
    data = pattern(8 * MIB)
    conn.writer.write(data)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(conn.send_eof)
        await holds(lambda: conn._core.number in conn._core.hub.writers)
        conn.writer.write(b"and this")
        assert await within(read_to_end(peer)) == data + b"and this"


async def test_send_eof_while_another_task_reads(wire: Wire) -> None:
    conn, peer = wire
    async with blocked(conn.receive) as outcome:
        await conn.send_eof()
        assert await within(read_to_end(peer)) == b""
        await send_all(peer, b"answer")
    assert outcome == [b"answer"]


async def test_half_close_in_both_orders(pair: Pair) -> None:
    first, second = pair
    await first.send(b"question")
    await first.send_eof()
    assert await all_of(second) == b"question"
    await second.send(b"answer")
    await second.send_eof()
    assert await all_of(first) == b"answer"


# --- peers that send and close at once -----------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 65537, 4 * MIB])
async def test_send_and_close_at_once(kind: str, size: int) -> None:
    """Every byte arrives, and then the end, whatever the poller has seen by then."""
    data = pattern(size)
    for _ in range(4):
        async with connected(kind) as (first, second):

            async def send(conn: Connection = first) -> None:
                await conn.send(data)
                await conn.aclose()

            async with anyio.create_task_group() as group:
                group.start_soon(send)
                assert await within(all_of(second)) == data


async def test_many_send_and_close_before_anybody_looks() -> None:
    for n in range(20):
        ours, peer = socket_pair("unix" if n % 2 else "tcp")
        data = pattern(n * 500, n)
        peer.sendall(data)
        peer.close()
        async with await Connection.from_socket(ours) as conn:
            assert await all_of(conn) == data


# --- aclose --------------------------------------------------------------------------------------


async def test_aclose(wire: Wire) -> None:
    conn, peer = wire
    fd = conn.fileno()
    assert fd >= 0
    os.fstat(fd)
    assert str(fd) in repr(conn)
    await yields(conn.aclose)
    assert conn.fileno() == -1
    assert "closed" in repr(conn)
    assert not conn.is_active
    assert not conn.at_eof
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert await within(read_to_end(peer)) == b""
    await yields(conn.aclose)
    for call in (
        conn.receive,
        lambda: conn.send(b"x"),
        conn.send_eof,
        conn.wait_writable,
        lambda: conn.next(1),
        lambda: conn.peek(1),
        lambda: conn.skip(1),
        lambda: conn.until(b"\n"),
        conn.writer.flush,
    ):
        with pytest.raises(ClosedResourceError):
            await call()
    for plain in (conn.detach, lambda: conn.writer.write(b"x"), lambda: conn.reader.next_nowait(1)):
        with pytest.raises(ClosedResourceError):
            plain()


async def test_aclose_in_a_cancelled_scope(wire: Wire) -> None:
    conn, _ = wire
    fd = conn.fileno()
    raw = conn.extra(SocketAttribute.raw_socket)
    conn.writer.write(bytes(HUGE))
    await cancelled(conn.aclose)
    assert conn.fileno() == raw.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    await cancelled(conn.aclose)
    await anyio.aclose_forcefully(conn)


async def test_concurrent_aclose(wire: Wire) -> None:
    conn, _ = wire
    raw = conn.extra(SocketAttribute.raw_socket)
    fds: list[int] = []

    async def close() -> None:
        await conn.aclose()
        fds.append(raw.fileno())

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(close)
    assert fds == [-1] * 5


async def test_aclose_drains_the_writer(wire: Wire) -> None:
    conn, peer = wire
    data = pattern(HUGE)
    conn.writer.write(data)
    async with blocked(conn.aclose) as outcome:
        for call in (conn.receive, lambda: conn.send(b"x"), conn.writer.flush):
            with pytest.raises(ClosedResourceError):
                await call()
        assert await within(read_to_end(peer)) == data
    assert outcome == [None]
    assert conn.statistics().bytes_sent == len(data)


@pytest.mark.parametrize("how", ["aclose", "abort", "cancel", "timeout", "reset"])
async def test_a_draining_aclose_can_be_ended(kind: str, how: str) -> None:
    async with opened("tcp" if how == "reset" else kind) as (conn, peer):
        raw = conn.extra(SocketAttribute.raw_socket)
        conn.writer.write(bytes(HUGE))
        if how == "timeout":
            conn.write_timeout = 0.02
            await within(conn.aclose())
        else:
            async with blocked(conn.aclose, cancel=how == "cancel"):
                assert raw.fileno() >= 0
                if how == "aclose":
                    await within(conn.aclose())
                elif how == "abort":
                    conn.abort()
                elif how == "reset":
                    reset(peer)
        assert raw.fileno() == -1


async def test_aclose_does_not_wait_for_a_send_that_was_given_up(wire: Wire) -> None:
    conn, _ = wire
    await fill(conn)
    await within(conn.aclose())
    assert conn.fileno() == -1


async def test_aclose_waits_for_what_comes_behind_a_send_that_was_given_up(wire: Wire) -> None:
    """However little of the rest is left by then."""
    conn, peer = wire
    core, later = conn._core, pattern(HUGE)  # more than the kernel takes while nobody looks
    data = await fill(conn)
    rest = core.queued()
    conn.writer.write(later)
    await given_up(conn, conn.writer.flush)
    taken = b""
    while core.queued() >= min(rest, len(later)):
        taken += await read_all(peer, 256 * KIB)
        await pollers_have_looked()
    assert core.queued() > 0
    async with anyio.create_task_group() as group:
        group.start_soon(conn.aclose)
        await settle()
        taken += await within(read_to_end(peer))
    assert len(taken) == len(data) + len(later)
    assert taken.startswith(data)
    assert taken.endswith(later)


async def test_aclose_waits_for_an_answer_after_a_send_that_was_given_up() -> None:
    """Of a busy loop the poller sends the answers, from copies: nothing else tells of them."""
    async with opened("unix") as wire:
        conn, peer = wire
        core = conn._core
        data = await fill(conn)
        assert await read_all(peer, len(data)) == data  # its rest goes out by itself
        await holds(lambda: core.number not in core.hub.outputs)
        full = await fill_the_kernel(conn)

        async def answer() -> None:
            await conn.receive()
            conn.writer.write(b"bye")
            with contextlib.suppress(ClosedResourceError):
                await conn.receive()

        async with contextlib.AsyncExitStack() as stack, anyio.create_task_group() as group:
            others = [await stack.enter_async_context(opened("unix")) for _ in range(4)]
            group.start_soon(answer)
            for other, _ in others:
                group.start_soon(other.receive)
            everyone = [core.number, *(other._core.number for other, _ in others)]
            await holds(lambda: all(map(core.hub.waits, everyone)))
            for one, end in [*others, wire]:
                before = one.statistics().bytes_received
                end.send(b"x")
                while one.statistics().bytes_received == before:
                    pass  # the loop is told of all together
            await holds(lambda: _epoll.conn_queued(core.handle) == 3)
            group.start_soon(conn.aclose)
            await settle()
            assert await within(read_to_end(peer)) == bytes(full) + b"bye"


# --- abort ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_raw", [False, True])
async def test_abort_drops_what_is_pending(wire: Wire, kind: str, with_raw: bool) -> None:
    """And is a RST, where there are any."""
    conn, peer = wire
    if with_raw:
        raw = conn.extra(SocketAttribute.raw_socket)
    conn.writer.write(b"dropped")
    conn.abort()
    conn.abort()
    assert conn.fileno() == -1
    if with_raw:
        assert raw.fileno() == -1
    if kind == "unix":
        assert await within(read_to_end(peer)) == b""
    else:
        with pytest.raises(ConnectionResetError):
            await within(read_to_end(peer))


# --- checkpoints and cancellation ----------------------------------------------------------------


async def test_every_operation_is_a_checkpoint(wire: Wire) -> None:
    conn, peer = wire
    await arrive(conn, peer, b"some bytes")
    assert await yields(lambda: conn.receive(4)) == b"some"
    assert await yields(lambda: conn.receive(4)) == b" byt"
    await yields(lambda: conn.send(b"x"))
    await yields(conn.wait_writable)
    await yields(conn.send_eof)
    await yields(conn.send_eof)
    await yields(conn.aclose)


async def test_a_cancelled_scope_consumes_and_sends_nothing(wire: Wire) -> None:
    conn, peer = wire
    await arrive(conn, peer, b"kept")
    for _ in range(3):
        await cancelled(conn.receive)
        await cancelled(lambda: conn.send(b"never"))
        await cancelled(conn.send_eof)
        await cancelled(conn.wait_writable)
    assert arrived(peer) == 0
    assert await conn.receive() == b"kept"
    await conn.send(b"only this")
    await conn.send_eof()
    assert await within(read_to_end(peer)) == b"only this"


async def test_send_looks_at_every_scope_up_to_a_shield(wire: Wire) -> None:
    conn, peer = wire
    with anyio.CancelScope() as outer:
        outer.cancel()
        with anyio.CancelScope(shield=True), anyio.CancelScope():
            await conn.send(b"shielded")
        with anyio.CancelScope(), anyio.CancelScope():
            await conn.send(b"never")
    assert outer.cancelled_caught
    assert await read_all(peer, 8) == b"shielded"
    assert conn.statistics().bytes_sent == 8


async def test_send_asks_anyio_itself_where_scopes_are_unknown(wire: Wire) -> None:
    conn, peer = wire
    hub = conn._core.hub
    states = hub._states
    try:
        hub._states = None
        await yields(lambda: conn.send(b"1"))
        await cancelled(lambda: conn.send(b"never"))
    finally:
        hub._states = states
    assert await read_all(peer, 1) == b"1"
    assert conn.statistics().bytes_sent == 1


async def test_send_writes_before_its_checkpoint(wire: Wire) -> None:
    conn, peer = wire
    sending: Any = conn.send(b"at once")
    sending.send(None)  # to where it yields
    assert await read_all(peer, 7) == b"at once"
    with pytest.raises(StopIteration):
        sending.send(None)


async def test_a_small_and_a_large_piece_are_one_system_call(wire: Wire) -> None:
    conn, peer = wire
    large = pattern(16 * KIB)
    for _ in range(5):
        conn.writer.write(b"head")
        conn.writer.write(large)
        await conn.writer.flush()
        assert await read_all(peer, 4 + len(large)) == b"head" + large
        conn.writer.write(b"head")
        await conn.send(memoryview(large).cast("B", (16, KIB)))
        assert await read_all(peer, 4 + len(large)) == b"head" + large
    assert conn.statistics().writes == 10


@pytest.mark.usefixtures("by_loops")  # a thread has read on before the block could begin anew
async def test_a_block_serves_for_many_messages_without_views(wire: Wire) -> None:
    conn, peer = wire
    message = pattern(1000)
    held = []
    for i in range(40):
        await send_all(peer, message)
        view = await conn.next(len(message))
        assert view == message
        if i % 4 == 0:
            held.append(view)
        del view
    assert all(view == message for view in held)
    del held
    wrappers = set()
    for _ in range(40):
        await send_all(peer, message)
        assert await conn.receive() == message
        wrappers.add(id(conn.reader._view.obj))
    assert len(wrappers) <= 2  # the last one with views, and the one that serves from then on


async def test_a_cancelled_receive_loses_nothing(wire: Wire) -> None:
    conn, peer = wire
    for n in range(20):
        async with anyio.create_task_group() as group:
            group.start_soon(conn.receive)
            await anyio.sleep(0)
            await anyio.sleep(0)
            group.cancel_scope.cancel()
        await send_all(peer, bytes([n]))
        assert await within(conn.receive()) == bytes([n])


@pytest.mark.loops("asyncio", "uvloop")
async def test_a_native_cancel_after_the_wake_up_loses_nothing(wire: Wire) -> None:
    """Plain asyncio cancels a task whose future is done already; what woke it must stay."""
    conn, peer = wire
    for n in range(20):
        task = asyncio.ensure_future(conn.receive())
        while not conn._core.hub.waits(conn._core.number):
            await asyncio.sleep(0)
        peer.send(bytes([n]))
        while conn._core.hub.waits(conn._core.number):
            await asyncio.sleep(0)
        task.cancel()
        try:
            got = await task  # the loop may have run it already
        except asyncio.CancelledError:
            got = await within(conn.receive())
        assert got == bytes([n])


@pytest.mark.loops("asyncio", "uvloop")
async def test_a_native_cancel_in_the_same_iteration_as_the_wake_up(wire: Wire) -> None:
    conn, peer = wire
    for n in range(20):
        task = asyncio.ensure_future(conn.receive())
        while not conn._core.hub.waits(conn._core.number):
            await asyncio.sleep(0)
        peer.send(bytes([n]))
        conn._core.hub.wake_reader(conn._core.number)  # as the poller's news does it
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await within(conn.receive()) == bytes([n])


async def test_a_send_that_did_not_start_sends_nothing(wire: Wire) -> None:
    """Cancelled while it waits for the rest of an earlier one: not a byte of its own goes out."""
    conn, peer = wire
    first = await fill(conn)
    for _ in range(3):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(conn.send, b"never")
                await settle()
                scope.cancel()
    assert await rest_with(conn, peer, b"the end") == first + b"the end"


def in_foreign_memory(data: bytes) -> memoryview:
    """As an extension with buffers like ours would hold it."""
    memory = memoryview(_epoll.ffi.buffer(_epoll.ffi.new("char[]", len(data))))
    memory[:] = data
    return memory


@pytest.mark.parametrize("item_of", [bytes, bytearray, in_foreign_memory])
async def test_the_rest_of_a_cancelled_send_goes_first(
    wire: Wire, item_of: Callable[[bytes], Any]
) -> None:
    conn, peer = wire
    data = pattern(HUGE)
    item = item_of(data)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(conn.send, item)
            await settle()
            got = await read_all(peer, 100 * KIB)  # some of it is certainly out
            scope.cancel()
    if item_of is not bytes:
        item[:] = bytes(len(item))
    assert got + await rest_with(conn, peer, b"behind it") == data + b"behind it"


@pytest.mark.parametrize("given_up_item", [pattern(HUGE), b""], ids=["the same", "nothing"])
async def test_only_the_item_that_was_given_up_is_taken_back(
    wire: Wire, given_up_item: bytes
) -> None:
    """Not the same bytes that were written before it."""
    conn, peer = wire
    data = pattern(HUGE)
    conn.writer.write(data)
    conn.writer.write(data)
    await given_up(conn, conn.send, given_up_item)
    assert await rest_with(conn, peer, b"end") == data + data + b"end"


async def test_a_given_up_rest_goes_out_by_itself(wire: Wire) -> None:
    conn, peer = wire
    data = await fill(conn)
    statistics = conn.statistics()
    assert statistics.buffered_output == len(data) - statistics.bytes_sent
    assert len(conn.writer) == statistics.buffered_output
    assert await read_all(peer, len(data)) == data
    await conn.send(b".")
    assert await read_all(peer, 1) == b"."


@pytest.mark.parametrize("seed", range(2))
async def test_cancellation_races_of_send(pair: Pair, seed: int) -> None:
    """Sends are cancelled at random moments. Each message goes out whole, or as a prefix whose rest
    follows, or not at all; and never out of order.
    """
    first, second = pair
    random_ = random.Random(seed)
    got = bytearray()
    sent: list[tuple[bytes, bool]] = []

    async def collect() -> None:
        while True:
            try:
                got.extend(await second.receive(random_.randint(1, 200 * KIB)))
            except EndOfStream:
                return
            if random_.random() < 0.2:
                await anyio.sleep(0.0005)

    async def send(number: int, scope: anyio.CancelScope) -> None:
        size = random_.choice([10, 1000, 50 * KIB, 600 * KIB])
        message = number.to_bytes(4, "big") + size.to_bytes(4, "big") + pattern(size, number)
        buffer = bytearray(message)
        done = False
        with scope:
            await first.send(buffer)
            done = True
        buffer[:] = bytes(len(buffer))
        sent.append((message, done))

    async with anyio.create_task_group() as group:
        group.start_soon(collect)
        with anyio.fail_after(30):
            for number in range(60):
                scope = anyio.CancelScope()
                async with anyio.create_task_group() as attempt:
                    attempt.start_soon(send, number, scope)
                    for _ in range(random_.randrange(6)):
                        await anyio.sleep(0)
                    if random_.random() < 0.6:
                        scope.cancel()
            await first.send_eof()
    rest = bytes(got)
    for message, done in sent:
        if rest.startswith(message):
            rest = rest[len(message) :]
        else:
            assert not done
    assert rest == b""


# --- timeouts ------------------------------------------------------------------------------------


async def test_an_outer_scope_wins_over_the_read_timeout(wire: Wire) -> None:
    conn, peer = wire
    conn.read_timeout = 30
    with anyio.move_on_after(0.01) as scope:
        await conn.receive()
    assert scope.cancelled_caught
    with pytest.raises(TimeoutError) as caught, anyio.fail_after(0.01):
        await conn.receive()
    assert not isinstance(caught.value, ReadTimeout)
    await send_all(peer, b"still usable")
    assert await within(conn.next(12)) == b"still usable"


async def test_write_timeout(wire: Wire) -> None:
    conn, peer = wire
    conn.write_timeout = 0.02
    assert conn.write_timeout == 0.02
    data = pattern(HUGE)
    buffer = bytearray(data)
    with pytest.raises(WriteTimeout):
        await within(conn.send(buffer))
    buffer[:] = bytes(len(buffer))
    with pytest.raises(WriteTimeout):
        await within(conn.send(b"never"))  # not a byte of it
    conn.write_timeout = None
    assert await rest_with(conn, peer, b"the end") == data + b"the end"


async def test_a_write_timeout_of_zero(wire: Wire) -> None:
    conn, peer = wire
    conn.write_timeout = 0
    await conn.send(b"the kernel takes this at once")
    assert await read_all(peer, 29) == b"the kernel takes this at once"
    with pytest.raises(WriteTimeout):
        await conn.send(bytes(HUGE))
    conn.write_timeout = 1000
    with anyio.move_on_after(0.02) as scope:
        await conn.send(b"more")
    assert scope.cancelled_caught


@pytest.mark.parametrize("name", ["read_timeout", "write_timeout"])
async def test_timeouts_refuse_nonsense(wire: Wire, name: str) -> None:
    conn, _ = wire
    assert getattr(conn, name) is None
    setattr(conn, name, 1)
    for wrong, error in ((-1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error):
            setattr(conn, name, wrong)
    assert getattr(conn, name) == 1
    setattr(conn, name, float("inf"))
    setattr(conn, name, None)


# --- what a connection knows ---------------------------------------------------------------------


async def test_state_and_server(wire: Wire) -> None:
    conn, _ = wire
    assert conn.state is None
    assert conn.server is None
    conn.state = thing = object()
    await conn.aclose()
    assert conn.state is thing


async def test_addresses_of_both_ends(pair: Pair) -> None:
    first, second = pair
    assert first.local_address == second.remote_address
    assert first.remote_address == second.local_address


async def test_statistics(wire: Wire) -> None:
    conn, peer = wire
    before = conn.statistics()
    assert before.bytes_received == before.bytes_sent == before.reads == before.writes == 0
    await arrive(conn, peer, b"12345")
    await conn.send(b"123")
    conn.writer.write(b"12")
    now = conn.statistics()
    assert (now.bytes_received, now.bytes_sent) == (5, 3)
    assert (now.buffered_input, now.buffered_output) == (5, 2)
    assert now.reads >= 1
    assert now.writes == 1
    assert now.created_at == before.created_at
    assert now.last_activity > before.created_at - 0.1  # it is a coarse clock's
    conn.abort()
    after = conn.statistics()
    assert (after.bytes_received, after.bytes_sent) == (5, 3)


async def test_wait_writable(wire: Wire) -> None:
    conn, peer = wire
    await within(conn.wait_writable())
    data = await fill(conn)
    async with blocked(conn.wait_writable) as outcome:
        with pytest.raises(BusyResourceError, match=f"^{WRITING}$"):
            await conn.send(b"x")
        assert await read_all(peer, len(data)) == data
    assert outcome == [None]


async def test_nodelay_is_set_and_can_be_changed() -> None:
    """L45."""
    async with opened("tcp") as (conn, _):
        raw = conn.extra(SocketAttribute.raw_socket)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        conn.set_nodelay(False)
        assert not raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        conn.set_nodelay(True)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    async with opened("unix") as (conn, _):
        conn.set_nodelay(True)


async def test_keepalive() -> None:
    async with opened("tcp") as (conn, _):
        raw = conn.extra(SocketAttribute.raw_socket)
        for value in (True, anypoll.Keepalive(idle=11, interval=7, count=3), False):
            conn.set_keepalive(value)
            assert bool(raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == bool(value)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [raw.getsockopt(socket.IPPROTO_TCP, o) for o in options] == [11, 7, 3]


# --- the raw socket and the attributes -----------------------------------------------------------


async def test_the_raw_socket(pair: Pair) -> None:
    for conn in pair:
        raw = conn.extra(SocketAttribute.raw_socket)
        assert type(raw) is socket.socket
        assert raw is conn.extra(SocketAttribute.raw_socket)
        assert raw.gettimeout() == 0
        assert raw.fileno() == conn.fileno() >= 0
        assert raw.type == socket.SOCK_STREAM
        assert not os.get_inheritable(raw.fileno())
        raw.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    first, second = pair
    await first.send(b"works as before")
    assert await second.next(15) == b"works as before"
    for conn in pair:
        raw = conn.extra(SocketAttribute.raw_socket)
        await conn.aclose()
        assert raw.fileno() == -1
        assert conn.extra(SocketAttribute.raw_socket) is raw


async def test_closing_tells_who_waits_for_the_raw_socket(wire: Wire) -> None:
    conn, _ = wire
    raw = conn.extra(SocketAttribute.raw_socket)
    async with blocked(lambda: anyio.wait_readable(raw)) as outcome:
        await conn.aclose()
    assert isinstance(outcome[0], ClosedResourceError)


async def test_waiting_for_the_raw_socket_does_not_disturb(wire: Wire) -> None:
    conn, peer = wire
    raw = conn.extra(SocketAttribute.raw_socket)
    await within(anyio.wait_writable(raw))
    await send_all(peer, b"x")
    assert await within(conn.receive()) == b"x"


async def test_attributes_are_anyios(kind: str) -> None:
    async with opened(kind) as (conn, _):
        theirs = anyio.abc.SocketStream.extra_attributes.fget(conn)  # type: ignore[attr-defined]
        ours = conn.extra_attributes  # there are our own beside them
        assert {k: ours[k]() for k in theirs} == {k: v() for k, v in theirs.items()}
        assert (SocketAttribute.local_port in ours) == (kind == "tcp")


# --- detach --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 100 * KIB])
async def test_detach(wire: Wire, size: int) -> None:
    """O24."""
    conn, peer = wire
    data = pattern(size)
    async with anyio.create_task_group() as group:
        group.start_soon(send_all, peer, b"head" + data)
        await holds(lambda: len(conn.reader) == 4 + size)
    assert await conn.next(4) == b"head"
    fd = conn.fileno()
    sock, rest = conn.detach()
    with sock:
        assert type(rest) is bytes
        assert rest == data
        assert sock.fileno() == fd
        assert sock.gettimeout() == 0
        assert conn.fileno() == -1
        assert not conn.is_active
        with pytest.raises(ClosedResourceError):
            await conn.receive()
        with pytest.raises(ClosedResourceError):
            conn.detach()
        await conn.aclose()
        conn.abort()
        assert sock.fileno() == fd
        await send_all(peer, b"for the new owner")
        await within(anyio.wait_readable(sock))
        assert sock.recv(100) == b"for the new owner"
        sock.send(b"back")
        assert await read_all(peer, 4) == b"back"


async def test_a_detached_socket_can_come_back(wire: Wire) -> None:
    conn, peer = wire
    sock, _ = conn.detach()
    async with await Connection.from_socket(sock) as again:
        await send_all(peer, b"again")
        assert await again.next(5) == b"again"


async def test_detach_before_it_was_told_that_all_is_sent(wire: Wire) -> None:
    """Nobody will tell afterwards: what was kept for that must go."""
    conn, peer = wire
    data = await fill(conn)
    core, rest = conn._core, len(data)
    peer.setblocking(True)
    while _epoll.conn_queued(core.handle) > 0:  # the event loop does not run meanwhile
        rest -= len(peer.recv(min(rest, MIB)))
    assert core.number in core.hub.outputs
    sock, _ = conn.detach()
    sock.close()
    assert core.number not in core.hub.outputs


async def test_detach_of_a_busy_connection(wire: Wire) -> None:
    conn, peer = wire
    conn.writer.write(b"pending")
    with pytest.raises(BusyResourceError, match=f"^{WRITING}$"):
        conn.detach()
    await conn.writer.flush()
    data = await fill(conn)
    with pytest.raises(BusyResourceError, match=f"^{WRITING}$"):
        conn.detach()
    assert await read_all(peer, 7 + len(data)) == b"pending" + data
    await within(conn.writer.flush())
    sock, rest = conn.detach()
    assert rest == b""
    sock.close()


# --- from_socket ---------------------------------------------------------------------------------


@pytest.mark.parametrize("as_fd", [False, True])
async def test_from_socket(kind: str, as_fd: bool) -> None:
    ours, peer = socket_pair(kind)
    with peer:
        fd = ours.fileno()
        given: Any = ours.detach() if as_fd else ours
        async with await Connection.from_socket(given) as conn:
            assert type(conn) is (UNIXConnection if kind == "unix" else Connection)
            assert conn.fileno() == fd
            await conn.send(b"x")
            assert peer.recv(1) == b"x"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@pytest.mark.parametrize(
    "cls", [Connection, UNIXConnection, anyio.abc.UNIXSocketStream], ids=["any", "unix", "AnyIO's"]
)
async def test_from_socket_refuses_what_is_no_connected_stream(cls: Any, tmp_path: Any) -> None:
    """L47. In the words of AnyIO, whose own class is asked the same; and leaves it open."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(tmp_path / "file", "wb"))
        tcp = [stack.enter_context(sock) for sock in socket_pair("tcp")]
        wrong: list[tuple[Any, str]] = [
            ("x", "expected an int or socket, got str instead"),
            (file.fileno(), "the file descriptor does not refer to a socket"),
        ]
        for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            pair = [stack.enter_context(s) for s in socket.socketpair(type=kind)]
            text = f"socket type mismatch: expected SOCK_STREAM, got {kind.name}"
            wrong.append((pair[0], text))
        unconnected = stack.enter_context(socket.socket(socket.AF_UNIX))
        wrong += [(s, "the socket must be connected") for s in (unconnected, unconnected.fileno())]
        if cls is not Connection:
            text = "address family mismatch: expected AF_UNIX, got AF_INET"
            wrong += [(sock, text) for sock in tcp]
        for given, text in wrong:
            with pytest.raises((TypeError, ValueError), match=f"^{text}$"):
                await cls.from_socket(given)
            if given != "x":
                os.fstat(given if isinstance(given, int) else given.fileno())


@pytest.mark.parametrize("fd", [-1, 10**30])
async def test_from_socket_refuses_what_no_descriptor_can_be(fd: int) -> None:
    for cls in (Connection, UNIXConnection, anypoll.SocketListener):
        with pytest.raises(ValueError):
            await cls.from_socket(fd)


async def test_socketpair() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        assert type(first) is type(second) is UNIXConnection
        await first.send(b"there")
        assert await second.next(5) == b"there"


# --- forgotten connections -----------------------------------------------------------------------


@pytest.mark.parametrize("with_raw", [False, True])
async def test_a_forgotten_connection_is_closed(kind: str, with_raw: bool) -> None:
    """O22."""
    ours, peer = socket_pair(kind)
    peer.setblocking(False)
    with peer:
        conn = await Connection.from_socket(ours if with_raw else ours.detach())
        del ours
        with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 -- they go together
            del conn
            gc.collect()
        assert await within(read_to_end(peer)) == b""


async def test_a_forgotten_connection_in_a_cycle(kind: str) -> None:
    async with connected(kind) as (_, second):
        ours, peer = socket_pair(kind)
        with peer:
            conn = await Connection.from_socket(ours)
            del ours
            conn.state = conn
            conn.writer.write(b"never sent")
            with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 -- they go together
                del conn
                gc.collect()
        assert second.is_active


async def test_a_connection_that_is_waited_for_is_not_forgotten(wire: Wire) -> None:
    """L01. The frame of the waiting task holds it, and nothing else needs to."""
    ours, peer = socket_pair("tcp")
    got: list[bytes] = []

    async def reader(sock: socket.socket) -> None:
        async with await Connection.from_socket(sock) as conn:
            got.append(await conn.receive())

    with peer:
        async with anyio.create_task_group() as group:
            group.start_soon(reader, ours)
            del ours
            await settle()
            gc.collect()
            peer.send(b"x")
    assert got == [b"x"]


async def test_output_that_is_being_sent_outlives_the_connection(kind: str) -> None:
    """The poller sends from Python's memory: a connection that is collected meanwhile must not
    take that away too early.
    """
    for _ in range(5):
        ours, peer = socket_pair(kind)
        peer.setblocking(False)
        with peer:
            conn = await Connection.from_socket(ours)
            del ours
            await fill(conn)
            with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 -- they go together
                del conn
                await anyio.sleep(0)  # the loop lets go of the exception
                gc.collect()
            await within(read_to_end(peer))


# --- with AnyIO's wrappers -----------------------------------------------------------------------


async def test_two_sends_that_were_given_up_do_not_deadlock(pair: Pair) -> None:
    """The rest of each is far above high water, and goes out while the other end reads."""
    size = 16 << 20
    for conn in pair:
        await given_up(conn, conn.send, bytes(size))
    for conn in pair:
        await stalled(conn)

    async def read(conn: Connection) -> None:
        left = size
        while left > 0:
            left -= len(await conn.receive(1 << 20))
        assert left == 0

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for conn in pair:
                group.start_soon(read, conn)
