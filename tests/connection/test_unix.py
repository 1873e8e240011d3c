"""UNIX sockets: descriptors that travel with bytes, sockets with messages, names and addresses."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import select
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import calls
import pytest
from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
)
from anyio.abc import SocketAttribute
from peers import KIB, MIB, blocked, given_up, holds, pattern, read_all, suspends, within

import anypoll
from anypoll import ReadTimeout, UNIXConnection, WriteTimeout, _epoll
from anypoll._buffers.errors import normal_end
from anypoll._connection.stream import open_socket

pytestmark = pytest.mark.anyio

STREAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_SEQPACKET


class Probe:
    """A pipe whose write end is sent away: tells when no copy of it is open any more."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def sent(self) -> None:
        os.close(self.writing)

    @property
    def gone(self) -> bool:
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    def end(self) -> None:
        assert self.gone
        os.close(self.reading)


def push(peer: socket.socket, data: bytes, count: int = 1) -> Probe:
    """Sends `data` with copies of a descriptor that only they keep open."""
    probe = Probe()
    socket.send_fds(peer, [data], [probe.writing] * count)
    probe.sent()
    return probe


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


async def taken(conn: Any, most: int, most_fds: int) -> tuple[bytes, int]:
    """What is received: bytes, and how many descriptors, which are closed."""
    message, fds = await conn.receive_fds(most, most_fds)
    close_all(fds)
    return message, len(fds)


def same_file(a: int, b: int) -> bool:
    return os.path.sameopenfile(a, b)


async def unix(kind: int = STREAM) -> tuple[UNIXConnection, socket.socket]:
    ours, peer = socket.socketpair(socket.AF_UNIX, kind)
    peer.setblocking(False)
    if kind == STREAM:
        return await UNIXConnection.from_socket(ours), peer
    ours.setblocking(False)
    connection: Any = open_socket(ours)
    return connection, peer


@asynccontextmanager
async def pair(kind: int = STREAM) -> AsyncIterator[tuple[UNIXConnection, socket.socket]]:
    conn, peer = await unix(kind)
    with peer:
        async with conn:
            yield conn, peer


async def buffered(conn: UNIXConnection, size: int) -> None:
    await holds(lambda: len(conn.reader) == size)


# --- what descriptors go with --------------------------------------------------------------------


async def test_descriptors_arrive_with_their_message() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        assert isinstance(first, UNIXConnection)
        assert isinstance(second, UNIXConnection)
        with open(__file__) as file, socket.socket() as sock:
            sent = [file.fileno(), file, sock]
            await first.send_fds(b"three", sent)
            message, fds = await second.receive_fds(100, 10)
            assert message == b"three"
            expected = [file.fileno(), file.fileno(), sock.fileno()]
            assert [os.fstat(fd) for fd in fds] == [os.fstat(fd) for fd in expected]
            assert all(not os.get_inheritable(fd) for fd in fds)
            close_all(fds)


@pytest.mark.parametrize("ours_sends", [False, True])
async def test_descriptors_to_and_from_anyio(tmp_path: Path, ours_sends: bool) -> None:
    path = tmp_path / "socket"
    async with (
        await anypoll.create_unix_listener(path) as listener,
        await anyio.connect_unix(path) as theirs,
        await within(listener.accept()) as ours,
    ):
        assert isinstance(ours, UNIXConnection)
        sender, receiver = (ours, theirs) if ours_sends else (theirs, ours)
        with open(__file__) as file:
            await sender.send_fds(b"message", [file])  # type: ignore[list-item]
            message, fds = await receiver.receive_fds(100, 3)
            assert message == b"message"
            [fd] = fds
            assert same_file(fd, file.fileno())
            close_all(fds)


async def test_they_belong_to_all_bytes_that_came_with_them() -> None:
    async with pair() as (conn, peer):
        await conn.send(b"x")  # so that reading begins in the poller
        peer.send(b"plain")
        await buffered(conn, 5)
        probe = push(peer, b"carrying", 2)
        await buffered(conn, 13)
        assert await conn.receive_fds(3, 9) == (b"pla", [])
        assert await taken(conn, 4, 9) == (b"inca", 2)
        assert await conn.receive_fds(100, 9) == (b"rrying", [])
        probe.end()


async def test_bytes_end_behind_those_with_descriptors() -> None:
    async with pair() as (conn, peer):
        probes = [push(peer, b"one"), push(peer, b"two")]
        peer.send(b"three")
        for text in (b"one", b"two"):
            assert await taken(conn, 100, 9) == (text, 1)
        assert await conn.receive_fds(100, 9) == (b"three", [])
        for probe in probes:
            probe.end()


async def test_more_than_wanted_are_closed() -> None:
    async with pair() as (conn, peer):
        probe = push(peer, b"many", 253)
        assert await taken(conn, 100, 2) == (b"many", 2)
        probe.end()


async def test_no_bytes_wanted() -> None:
    async with pair() as (conn, peer):
        peer.send(b"ab")
        assert await conn.receive_fds(0, 1) == (b"", [])
        assert await conn.receive_fds(2**40, 2**40) == (b"ab", [])
        probe = push(peer, b"c")
        assert await taken(conn, 0, 1) == (b"", 1)
        assert await conn.receive() == b"c"
        probe.end()


async def test_a_message_across_blocks_is_taken_whole() -> None:
    data = pattern(30 * KIB)
    async with pair() as (conn, peer):
        peer.send(b"x" * 1000)
        await buffered(conn, 1000)
        probe = push(peer, data)
        await buffered(conn, 1000 + len(data))
        assert await conn.next(1000) == b"x" * 1000
        assert await conn.peek(1) == data[:1]
        assert conn.reader._end - conn.reader._start < len(data)  # they lie in two blocks
        message, fds = await conn.receive_fds(MIB, 1)
        assert message == data
        close_all(fds)
        probe.end()


# --- calls that do not ask -----------------------------------------------------------------------


async def piecemeal(conn: UNIXConnection) -> None:
    for _ in range(4):
        await conn.next(1)


async def peek_and_next(conn: UNIXConnection) -> None:
    await conn.peek(4)
    await anyio.sleep(0)
    await conn.next(4)


async def receive_and_next(conn: UNIXConnection) -> None:
    await conn.receive(1)
    await conn.next(3)


READS: dict[str, Callable[[UNIXConnection], Awaitable[Any]]] = {
    "next": lambda conn: conn.next(4),
    "receive": lambda conn: conn.receive(),
    "skip": lambda conn: conn.skip(4),
    "until": lambda conn: conn.until(b"\n"),
    "next_parts": lambda conn: conn.reader.next_parts(4),
    "read_bytes": lambda conn: conn.reader.read_bytes(4),
    "readinto": lambda conn: conn.reader.readinto(bytearray(10)),
    "piecemeal": piecemeal,
    "peek_and_next": peek_and_next,
    "receive_and_next": receive_and_next,
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("waits", [False, True])
async def test_every_read_closes_what_it_passes_over(read: str, waits: bool) -> None:
    """At the latest when the event loop comes round: nothing further has to be asked for."""
    async with pair() as (conn, peer), anyio.create_task_group() as group:
        if waits:
            group.start_soon(READS[read], conn)
            await holds(lambda: conn._core.hub.waits(conn._core.number))
            probe = push(peer, b"abc\n")
        else:
            probe = push(peer, b"abc\n")
            await buffered(conn, 4)
            await READS[read](conn)
        await holds(lambda: probe.gone)
        probe.end()


async def test_a_peek_does_not() -> None:
    async with pair() as (conn, peer):
        probe = push(peer, b"abcd")
        assert await conn.peek(4) == b"abcd"
        for _ in range(5):
            await anyio.sleep(0)
        assert not probe.gone
        assert await taken(conn, 100, 1) == (b"abcd", 1)
        probe.end()


async def test_a_flood_of_descriptors_is_bounded() -> None:
    async with pair() as (conn, peer):
        before = len(os.listdir("/proc/self/fd"))
        [read, write] = os.pipe()
        for _ in range(50):
            socket.send_fds(peer, [b"x"], [read, write])
        os.close(read)
        os.close(write)
        await holds(lambda: len(conn.reader) == 1)
        assert len(os.listdir("/proc/self/fd")) == before + 2
        for _ in range(50):
            assert await conn.receive() == b"x"
        assert len(os.listdir("/proc/self/fd")) == before


async def test_a_request_across_messages_with_descriptors_ends() -> None:
    async with pair() as (conn, peer):
        probes = [push(peer, b"ab") for _ in range(10)]
        assert await within(conn.next(19)) == b"ab" * 9 + b"a"
        assert [probe.gone for probe in probes] == [True] * 9 + [False]
        assert await taken(conn, 9, 9) == (b"b", 1)
        for probe in probes:
            probe.end()


async def test_a_view_stays_while_descriptors_come_and_go() -> None:
    data = pattern(64 * KIB)
    async with pair() as (conn, peer):
        peer.send(data[:1000])
        views = [await conn.next(1000)]
        for at in range(1000, len(data), 1000):
            probe = push(peer, data[at : at + 1000])
            if at % 3000:
                views.append(await conn.next(len(data[at : at + 1000])))
                await holds(lambda probe=probe: probe.gone)  # type: ignore[misc]
            else:
                message, fds = await conn.receive_fds(1000, 1)
                views.append(memoryview(message))
                close_all(fds)
            probe.end()
        assert b"".join(views) == data


# --- the ends of a connection --------------------------------------------------------------------


@pytest.mark.parametrize("end", ["aclose", "abort", "detach"])
async def test_every_end_closes_descriptors(end: str) -> None:
    conn, peer = await unix()
    with peer:
        probe = push(peer, b"abc")
        await buffered(conn, 3)
        if end == "aclose":
            await conn.aclose()
        elif end == "abort":
            conn.abort()
        else:
            sock, rest = conn.detach()
            assert rest == b"abc"
            sock.close()
        probe.end()


def test_the_end_of_the_loop_closes_descriptors() -> None:
    kept: list[Any] = []

    async def main() -> None:
        conn, peer = await unix()
        kept.extend((conn, peer, push(peer, b"abc")))
        await buffered(conn, 3)

    asyncio.run(main())
    _, peer, probe = kept
    probe.end()
    peer.close()


async def test_a_forgotten_connection_closes_descriptors() -> None:
    conn, peer = await unix()
    with peer:
        probe = push(peer, b"abc")
        await buffered(conn, 3)
        with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 -- they go together
            del conn
            gc.collect()
        probe.end()


@pytest.mark.unsanitized
async def test_the_child_of_a_fork_closes_descriptors() -> None:
    async with pair() as (conn, peer):
        probe = push(peer, b"abc")
        await buffered(conn, 3)
        ready, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(ready, 1)  # lives until the parent has closed its own
            os._exit(0)
        os.close(ready)
        try:
            message, fds = await conn.receive_fds(9, 9)
            assert message == b"abc"
            close_all(fds)
            await holds(lambda: probe.gone)
        finally:
            os.close(go)
            os.waitpid(child, 0)
        probe.end()


# --- receiving: waiting --------------------------------------------------------------------------


async def test_receiving_at_the_end_of_the_stream() -> None:
    async with pair() as (conn, peer):
        probe = push(peer, b"last")
        peer.shutdown(socket.SHUT_WR)
        assert await taken(conn, 9, 9) == (b"last", 1)
        for _ in range(2):
            with pytest.raises(EndOfStream):
                await conn.receive_fds(9, 9)
        probe.end()


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
async def test_a_cancelled_receive_takes_nothing(kind: int) -> None:
    async with pair(kind) as (conn, peer):
        with anyio.move_on_after(0.01):
            await conn.receive_fds(9, 9)
        probe = push(peer, b"abc")
        if kind == STREAM:
            await buffered(conn, 3)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await conn.receive_fds(9, 9)
            pytest.fail("it is a checkpoint")
        assert await taken(conn, 9, 9) == (b"abc", 1)
        probe.end()


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
async def test_both_are_checkpoints(kind: int) -> None:
    async with pair(kind) as (conn, peer):
        peer.send(b"abc")
        if kind == STREAM:
            await buffered(conn, 3)
        assert suspends(conn.receive_fds(9, 9))
        assert suspends(conn.send_fds(b"x", [0]))
        assert await conn.receive_fds(9, 9) == (b"abc", [])
        with pytest.raises(BlockingIOError):
            peer.recv(1)


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
async def test_a_read_timeout(kind: int) -> None:
    async with pair(kind) as (conn, peer):
        conn.read_timeout = 0.01
        for _ in range(2):
            with pytest.raises(ReadTimeout):
                await conn.receive_fds(9, 9)
        with pytest.raises(ReadTimeout):
            await conn.receive()
        conn.read_timeout = None
        peer.send(b"there")
        assert await conn.receive_fds(9, 9) == (b"there", [])


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
async def test_two_that_receive_and_a_close(kind: int) -> None:
    async with pair(kind) as (conn, _):
        async with blocked(lambda: conn.receive_fds(9, 9)) as outcome:
            for call in (lambda: conn.receive_fds(9, 9), conn.receive):
                with pytest.raises(BusyResourceError, match="reading from"):
                    await call()
            await conn.aclose()
        assert type(outcome[0]) is ClosedResourceError
        for call in (lambda: conn.receive_fds(9, 9), lambda: conn.send_fds(b"x", [0])):
            with pytest.raises(ClosedResourceError):
                await call()


@pytest.mark.loops("asyncio", "uvloop")
@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
async def test_a_native_cancel_after_the_wake_up_loses_nothing(kind: int) -> None:
    async with pair(kind) as (conn, peer):
        task = asyncio.ensure_future(taken(conn, 9, 9))
        await holds(lambda: conn._core.hub.waits(conn._core.number))
        probe = push(peer, b"abc")
        await holds(lambda: not conn._core.hub.waits(conn._core.number) or task.done())
        task.cancel()
        try:
            got = await task
        except asyncio.CancelledError:
            got = await taken(conn, 9, 9)
        assert got == (b"abc", 1)
        probe.end()


# --- sending -------------------------------------------------------------------------------------


def received(peer: socket.socket, size: int) -> tuple[bytes, int]:
    """One recvmsg of the plain socket: bytes, and how many descriptors, which are closed."""
    data, fds, _, _ = socket.recv_fds(peer, size, 253)
    close_all(fds)
    return data, len(fds)


async def test_a_big_message_is_sent_whole_with_descriptors_in_front() -> None:
    data = pattern(4 * MIB)
    async with pair() as (conn, peer), anyio.create_task_group() as group:
        group.start_soon(conn.send_fds, bytearray(data), [0, 1])
        got, counts = bytearray(), []
        while len(got) < len(data):
            await anyio.wait_readable(peer)
            part, count = received(peer, 64 * KIB)
            got += part
            counts.append(count)
        assert got == data
        assert counts == [2] + [0] * (len(counts) - 1)


async def test_pending_output_goes_first() -> None:
    async with pair() as (conn, peer):
        conn.writer.write(b"first ")
        await conn.send_fds(b"second", [0])
        conn.writer.malloc(2)[:] = b"ab"
        await conn.send_fds(memoryview(b"third"), [0])
        data, counts = b"", []
        while len(data) < 19:
            part, count = received(peer, 100)
            data += part
            counts.append(count)
        assert data == b"first secondabthird"
        assert sum(counts) == 2


async def test_a_cancelled_send_that_had_not_begun_leaves_nothing() -> None:
    async with pair() as (conn, peer):
        await given_up(conn, conn.send, b"x" * 8 * MIB)
        probe = Probe()
        await given_up(conn, conn.send_fds, b"never", [probe.writing])
        probe.sent()
        probe.end()
        data = bytearray()
        async with anyio.create_task_group() as group:
            group.start_soon(conn.send, b"end")
            while not data.endswith(b"end"):
                await anyio.wait_readable(peer)
                data += peer.recv(MIB)
        assert data == b"x" * (len(data) - 3) + b"end"


async def test_what_was_pending_may_be_changed_when_a_send_was_given_up() -> None:
    data = bytearray(pattern(4 * MIB))
    want = b"01" + bytes(data) + b"end"
    async with pair() as (conn, peer):
        conn.writer.malloc(2)[:] = b"01"
        conn.writer.write_direct(data, 0)
        await given_up(conn, conn.send_fds, b"never", [0])
        data[:] = bytes(len(data))
        async with anyio.create_task_group() as group:
            group.start_soon(conn.send, b"end")
            assert await read_all(peer, len(want)) == want


@pytest.mark.parametrize("timed", [False, True])
async def test_the_rest_of_a_message_that_was_given_up_goes_out(timed: bool) -> None:
    data = bytearray(pattern(4 * MIB))
    want = bytes(data) + b"next"
    async with pair() as (conn, peer):
        if timed:
            conn.write_timeout = 0.05
            with pytest.raises(WriteTimeout):
                await conn.send_fds(data, [0])
            conn.write_timeout = None
        else:
            await given_up(conn, conn.send_fds, data, [0])
        data[:] = bytes(len(data))  # it is the caller's again
        async with anyio.create_task_group() as group:
            group.start_soon(conn.send, b"next")
            first, count = received(peer, 64 * KIB)
            assert count == 1
            assert first + await read_all(peer, len(want) - len(first)) == want


async def test_two_that_send_and_a_close() -> None:
    async with pair() as (conn, _):
        async with blocked(lambda: conn.send_fds(b"x" * 8 * MIB, [0])) as outcome:
            with pytest.raises(BusyResourceError, match="writing to"):
                await conn.send_fds(b"x", [0])
            await conn.aclose()
        assert type(outcome[0]) is ClosedResourceError


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
async def test_a_peer_that_has_gone(kind: int) -> None:
    async with pair(kind) as (conn, peer):
        peer.close()
        for _ in range(2):
            with pytest.raises(BrokenResourceError) as caught:
                await conn.send_fds(b"x", [0])
            assert isinstance(caught.value.__cause__, BrokenPipeError)
        assert not conn.is_active


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
async def test_after_the_own_end(kind: int) -> None:
    async with pair(kind) as (conn, peer):
        await conn.send(b"x")
        await conn.send_eof()
        for _ in range(2):
            with pytest.raises(ClosedResourceError):
                await conn.send_fds(b"x", [0])
            with pytest.raises(ClosedResourceError):
                conn.writer.write(b"x")
        assert peer.recv(9) == b"x"
        assert peer.recv(9) == b""
        peer.send(b"still")
        assert await conn.receive() == b"still"


async def test_a_send_in_a_cancelled_scope_sends_nothing() -> None:
    async with pair() as (conn, peer):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await conn.send_fds(b"x", [0])
            pytest.fail("it is a checkpoint")
        await conn.send(b"y")
        assert received(peer, 9) == (b"y", 0)


# --- bad input -----------------------------------------------------------------------------------


async def test_errors_are_anyios() -> None:
    async with pair() as (conn, peer):
        theirs = await anyio.abc.UNIXSocketStream.from_socket(peer.dup())
        async with theirs:
            receiving: list[tuple[Any, Any]] = [(-1, 1), ("x", 1), (1.5, 1), (None, 1)]
            receiving += [(1, 0), (1, -1), (1, "x"), (1, None), (-1, 0)]
            for args in receiving:
                with pytest.raises(ValueError, match="must be") as ours:
                    await conn.receive_fds(*args)
                with pytest.raises(ValueError, match="must be") as expected:
                    await theirs.receive_fds(*args)
                assert str(ours.value) == str(expected.value)
            for message, fds in ((b"", [0]), (b"x", []), (b"", [])):
                with pytest.raises(ValueError, match="must not be empty") as ours:
                    await conn.send_fds(message, fds)
                with pytest.raises(ValueError, match="must not be empty") as expected:
                    await theirs.send_fds(message, fds)
                assert str(ours.value) == str(expected.value)


@pytest.mark.parametrize(
    ("fds", "error", "text"),
    [
        ([-1], ValueError, "must be open file descriptors, not -1"),
        ([2**40], ValueError, "must be open file descriptors, not"),
        ([0] * 254, ValueError, "at most 253 fds, not 254"),
        (["x"], TypeError, "str"),
        ([1.5], TypeError, "float"),
        ([None], TypeError, "NoneType"),
    ],
)
async def test_descriptors_that_are_none(fds: Any, error: type[Exception], text: str) -> None:
    async with pair() as (conn, peer):
        with pytest.raises(error, match=text):
            await conn.send_fds(b"x", fds)
        with socket.socket() as sock:
            sock.close()
            with pytest.raises(ValueError, match="not -1"):
                await conn.send_fds(b"x", [sock])
        with pytest.raises(TypeError):
            await conn.send_fds("text", [0])  # type: ignore[arg-type]
        await conn.send_fds(b"y", [0])
        assert received(peer, 9) == (b"y", 1)


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
async def test_a_number_that_is_not_open(kind: int) -> None:
    """As AnyIO has it; the connection goes on."""
    async with pair(kind) as (conn, peer):
        with pytest.raises(BrokenResourceError) as caught:
            await conn.send_fds(b"x", [1_000_000])
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EBADF
        assert conn.is_active
        await conn.send_fds(b"y", [0])
        assert received(peer, 9) == (b"y", 1)


# --- faults --------------------------------------------------------------------------------------


@pytest.fixture
def faults() -> Any:
    yield _epoll.set_fault
    _epoll.clear_faults()


async def test_no_memory_for_descriptors(faults: Callable[..., None]) -> None:
    async with pair() as (conn, peer):
        peer.send(b"ab")
        await buffered(conn, 2)
        faults("ALLOC", errno.ENOMEM)
        probe = push(peer, b"cd")
        await holds(lambda: probe.gone)
        _epoll.clear_faults()
        probe.end()
        assert await conn.next(2) == b"ab"


@pytest.mark.parametrize("call", ["READ", "WRITE"])
async def test_interruptions(call: str, faults: Callable[..., None]) -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        assert isinstance(first, UNIXConnection)
        assert isinstance(second, UNIXConnection)
        faults(call, errno.EINTR, times=20)
        await first.send_fds(b"abc", [0])
        assert await taken(second, 9, 9) == (b"abc", 1)


async def test_short_writes_and_no_room(faults: Callable[..., None]) -> None:
    async with pair() as (conn, peer):
        faults("WRITE", errno.EAGAIN, times=3)
        await within(conn.send_fds(b"abc", [0]))
        assert received(peer, 9) == (b"abc", 1)
        faults("WRITE", limit=1, times=4)
        await within(conn.send_fds(b"abcdefg", [0, 1]))
        assert received(peer, 9) == (b"a", 2)
        assert await read_all(peer, 6) == b"bcdefg"


async def test_a_broken_write(faults: Callable[..., None]) -> None:
    async with pair() as (conn, _):
        faults("WRITE", errno.ECONNRESET)
        with pytest.raises(BrokenResourceError) as caught:
            await conn.send_fds(b"abc", [0])
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        with pytest.raises(BrokenResourceError):
            await conn.send(b"x")


# --- messages ------------------------------------------------------------------------------------


@asynccontextmanager
async def message_pair(
    tmp_path: Path,
) -> AsyncIterator[tuple[UNIXConnection, UNIXConnection]]:
    """A client and what a listener has accepted."""
    path = tmp_path / "messages"
    async with (
        await anypoll.create_unix_listener(path, kind=SEQPACKET) as listener,
        await anypoll.connect_unix(path, SEQPACKET) as client,
        await within(listener.accept()) as accepted,
    ):
        assert isinstance(accepted, UNIXConnection)
        yield client, accepted


async def test_messages_keep_their_boundaries(tmp_path: Path) -> None:
    messages = [b"a", b"bc" * 500, pattern(100 * KIB), b"d"]
    async with message_pair(tmp_path) as ends:
        for sender, receiver in (ends, ends[::-1]):
            for message in messages:
                await sender.send(message)
            assert [await receiver.receive(MIB) for _ in messages] == messages
        await ends[0].send_eof()
        with pytest.raises(EndOfStream):
            await ends[1].receive()
        await ends[1].send(bytearray(b"half closed"))
        assert await ends[0].receive() == b"half closed"


async def test_messages_to_and_from_anyio(tmp_path: Path) -> None:
    path = tmp_path / "messages"
    async with (
        await anyio.create_unix_listener(path, kind=SEQPACKET) as listener,
        await anypoll.connect_unix(path, kind=SEQPACKET) as ours,
        await listener.accept() as theirs,
    ):
        for sender, receiver in ((ours, theirs), (theirs, ours)):
            await sender.send(b"one")
            await sender.send(b"too long")
            await sender.send(b"")  # is no message
            await sender.send(b"three")
            assert await receiver.receive() == b"one"
            assert await receiver.receive(3) == b"too"
            assert await receiver.receive() == b"three"
        await theirs.aclose()
        for _ in range(2):
            with pytest.raises(EndOfStream):
                await ours.receive()
        assert ours.at_eof


async def test_messages_are_never_read_ahead(tmp_path: Path) -> None:
    async with message_pair(tmp_path) as (client, accepted):
        async with blocked(client.receive) as outcome:
            for message in (b"first", b"second", b"third"):
                await accepted.send(message)
        assert outcome == [b"first"]
        assert len(client.reader) == 0
        sock, rest = client.detach()
        with sock:
            assert rest == b""
            assert [sock.recv(99), sock.recv(99)] == [b"second", b"third"]


async def test_descriptors_with_messages() -> None:
    async with pair(SEQPACKET) as (conn, peer):
        probes = [push(peer, b"one", 3), push(peer, b"two"), push(peer, b"", 1), push(peer, b"4")]
        assert await taken(conn, 2, 2) == (b"on", 2)
        probes[0].end()
        assert await conn.receive() == b"two"
        probes[1].end()
        assert await taken(conn, 9, 9) == (b"", 1)
        probes[2].end()
        assert await taken(conn, 0, 9) == (b"", 1)
        probes[3].end()
        await conn.send_fds(b"back", [0, 1])
        assert received(peer, 99) == (b"back", 2)


async def test_messages_nobody_received_close_their_descriptors() -> None:
    async with pair(SEQPACKET) as (_, peer):
        probe = push(peer, b"never")
    probe.end()


async def test_a_message_that_is_too_large() -> None:
    async with pair(SEQPACKET) as (conn, peer):
        with pytest.raises(BrokenResourceError) as caught:
            await conn.send(bytes(16 * MIB))
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EMSGSIZE
        assert normal_end(caught.value, conn._core.number) is None  # no peer can cause it
        assert conn.is_active
        await conn.send(b"fits")
        assert peer.recv(99) == b"fits"


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_a_message_that_found_no_room_is_not_sent(how: str) -> None:
    async with pair(SEQPACKET) as (conn, peer):
        sent = 0

        async def send_on() -> None:
            nonlocal sent
            while True:
                await conn.send(b"%08d" % sent + bytes(20 * KIB))
                sent += 1

        await given_up(conn, send_on)
        if how == "timed out":
            conn.write_timeout = 0.01
            with pytest.raises(WriteTimeout):
                await conn.send(b"never")
            conn.write_timeout = None
        async with anyio.create_task_group() as group:
            group.start_soon(conn.send, b"%08d" % sent)
            for number in range(sent + 1):
                await anyio.wait_readable(peer)
                assert peer.recv(MIB)[:8] == b"%08d" % number
        with pytest.raises(BlockingIOError):
            peer.recv(1)


async def test_what_came_before_a_reset_is_readable() -> None:
    async with pair(SEQPACKET) as (conn, peer):
        await conn.send(b"unread")
        peer.send(b"one")
        peer.send(b"two")
        peer.close()
        assert [await conn.receive(), await conn.receive()] == [b"one", b"two"]
        for _ in range(2):
            with pytest.raises(BrokenResourceError) as caught:
                await conn.receive()
            assert isinstance(caught.value.__cause__, ConnectionResetError)
        assert not conn.is_active


async def test_an_empty_message_is_the_end_once() -> None:
    """As AnyIO has it: recvmsg says 0 to both."""
    async with pair(SEQPACKET) as (conn, peer):
        peer.send(b"")
        peer.send(b"more")
        with pytest.raises(EndOfStream):
            await conn.receive()
        assert not conn.at_eof
        assert await conn.receive() == b"more"


async def test_reader_and_writer_refuse_messages() -> None:
    async with pair(SEQPACKET) as (conn, peer):
        peer.send(b"message")
        refused = calls.READS | calls.NOWAIT
        refused |= {name: calls.SENDS[name] for name in ("write", "write_str", "malloc")}
        del refused["receive"], refused["iteration"]
        await calls.all_raise(refused, ValueError, conn, match="SOCK_SEQPACKET")
        await conn.writer.flush()
        assert await conn.receive() == b"message"
        await conn.send(b"answer")
        assert peer.recv(99) == b"answer"
        with pytest.raises(ValueError, match="max_bytes"):
            await conn.receive(0)


async def test_a_server_of_messages(tmp_path: Path) -> None:
    path = tmp_path / "messages"
    ends: list[type[BaseException]] = []

    async def handler(conn: anypoll.Connection) -> None:
        try:
            async for message in conn:
                await conn.send(message.upper())
        finally:
            ends.append(EndOfStream)

    listener = await anypoll.create_unix_listener(path, kind=SEQPACKET)
    async with (
        anypoll.serve(handler, listeners=[listener]) as server,
        await anypoll.connect_unix(path, SEQPACKET) as client,
    ):
        for message in (b"one", b"two"):
            await client.send(message)
        assert [await client.receive(), await client.receive()] == [b"ONE", b"TWO"]
        await within(server.shutdown(), 5)  # an idle connection ends by itself
        with pytest.raises(EndOfStream):
            await client.receive()
    assert ends == [EndOfStream]


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, 99, "x", None])
async def test_other_kinds_are_refused(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(ValueError, match="kind must be SOCK_STREAM or SOCK_SEQPACKET, not"):
        await anypoll.connect_unix(tmp_path / "socket", kind)
    with pytest.raises(ValueError, match="kind must be SOCK_STREAM or SOCK_SEQPACKET, not"):
        await anypoll.create_unix_listener(tmp_path / "socket", kind=kind)
    assert not (tmp_path / "socket").exists()


async def test_the_wrong_kind_for_the_listener(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with await anypoll.create_unix_listener(path, kind=SEQPACKET):
        with pytest.raises(OSError, match="wrong type") as ours:
            await anypoll.connect_unix(path)
        assert ours.value.errno == errno.EPROTOTYPE


# --- names and addresses -------------------------------------------------------------------------


def names(tmp_path: Path) -> list[bytes]:
    unique = b"anypoll-%d-%s" % (os.getpid(), os.urandom(4).hex().encode())
    return [
        os.fsencode(tmp_path) + b"/plain",
        os.fsencode(tmp_path) + b"/\xff\xfe",
        b"\0" + unique,
        b"\0\xff\0" + unique,
    ]


FORMS: dict[str, Callable[[bytes], Any]] = {"bytes": bytes, "str": os.fsdecode}


@pytest.mark.parametrize(("form", "kind"), [("bytes", STREAM), ("str", SEQPACKET)])
@pytest.mark.parametrize("which", range(4))
async def test_addresses_are_anyios(tmp_path: Path, which: int, form: str, kind: int) -> None:
    name = FORMS[form](names(tmp_path)[which])
    path: Any = Path(os.fsdecode(name)) if which == 0 else name
    local, remote = SocketAttribute.local_address, SocketAttribute.remote_address
    raw = names(tmp_path)[which] if which < 2 else os.fsencode(name)
    async with (
        await anypoll.create_unix_listener(path, kind=kind) as listener,
        await anyio.connect_unix(raw, kind) as theirs,
        await within(listener.accept()) as ours,
        await anypoll.connect_unix(path, kind) as client,
        await within(listener.accept()),
    ):
        expected = theirs.extra(remote)
        assert type(expected) is (str if which < 2 else bytes)
        for address in (
            listener.extra(local), client.extra(remote), client.remote_address,
            ours.extra(local), ours.local_address,
        ):  # fmt: skip
            assert (type(address), address) == (type(expected), expected)
        assert client.local_address == theirs.extra(local) == ""
        assert ours.remote_address == ours.extra(remote) == ""


@pytest.mark.parametrize("which", range(4))
async def test_the_name_of_a_client(tmp_path: Path, which: int) -> None:
    name = names(tmp_path)[which]
    async with await anypoll.create_unix_listener(tmp_path / "socket") as listener:
        with socket.socket(socket.AF_UNIX) as client:
            client.bind(name)
            client.connect(os.fsencode(tmp_path / "socket"))
            async with await within(listener.accept()) as conn:
                expected = name if which >= 2 else os.fsdecode(name)
                assert conn.remote_address == conn.extra(SocketAttribute.remote_address) == expected


@pytest.mark.parametrize("which", range(4))
async def test_a_server_with_any_name(tmp_path: Path, which: int) -> None:
    name = names(tmp_path)[which]

    async def handler(conn: anypoll.Connection) -> None:
        assert isinstance(conn, UNIXConnection)
        message, fds = await conn.receive_fds(100, 1)
        await conn.send_fds(message, fds)
        close_all(fds)

    async with anypoll.serve(handler, path=name) as server:
        assert server.addresses == (name if which >= 2 else os.fsdecode(name),)
        async with await anypoll.connect_unix(name) as client:
            await client.send_fds(b"there and back", [0])
            message, fds = await client.receive_fds(100, 1)
            assert message == b"there and back"
            assert same_file(fds[0], 0)
            close_all(fds)


async def opened_at(path: Any, how: str) -> Any:
    if how == "connect":
        return await anypoll.connect_unix(path)
    if how == "listen":
        return await anypoll.create_unix_listener(path)
    async with anypoll.serve(lambda _: anyio.sleep(0), path=path):
        pytest.fail("it was entered")


@pytest.mark.parametrize("how", ["connect", "listen", "serve"])
@pytest.mark.parametrize("path", ["a\0b", b"a\0b", "a\0"])
async def test_a_nul_inside_of_a_path(path: Any, how: str) -> None:
    """The kernel would end the path there: another file than was meant."""
    with pytest.raises(ValueError, match="must not contain a NUL"):
        await opened_at(path, how)


@pytest.mark.parametrize("how", ["connect", "listen"])
@pytest.mark.parametrize("path", [None, 3, object()])
async def test_what_is_no_path(path: Any, how: str) -> None:
    with pytest.raises(TypeError):
        await opened_at(path, how)


@pytest.mark.parametrize("how", ["connect", "listen", "serve"])
async def test_a_path_that_is_too_long(tmp_path: Path, how: str) -> None:
    with pytest.raises(OSError, match="too long"):
        await opened_at(tmp_path / ("x" * 120), how)


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
async def test_nobody_there(tmp_path: Path, kind: int) -> None:
    with pytest.raises(FileNotFoundError):
        await anypoll.connect_unix(tmp_path / "nothing", kind)
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(os.fsencode(tmp_path / "stale"))
    with pytest.raises(ConnectionRefusedError):
        await anypoll.connect_unix(tmp_path / "stale", kind)
    with pytest.raises(ConnectionRefusedError):
        await anypoll.connect_unix(b"\0anypoll-nobody", kind)


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
@pytest.mark.parametrize("name", [b"socket", b"\xff\xfe"])
async def test_stale_files_and_modes(tmp_path: Path, kind: int, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    for mode in (0o600, 0o644):
        async with await anypoll.create_unix_listener(path, mode=mode, kind=kind):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
        assert stat.S_ISSOCK(os.stat(path).st_mode)  # left behind, as AnyIO does


async def test_a_link_to_a_socket_is_left_alone(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    async with await anypoll.create_unix_listener(target):
        link.symlink_to(target)
        with pytest.raises(OSError, match="in use"):
            await anypoll.create_unix_listener(link)
        assert link.is_symlink()
        async with await anypoll.connect_unix(link):
            pass
