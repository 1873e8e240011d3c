"""Connections to a plain socket, so that a test controls every segment."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest

import anypoll
from anypoll import _epoll
from anypoll._connection.stream import open_socket
from anypoll._loop import runtime as _runtime

T = TypeVar("T")

KIB = 1024
MIB = 1024 * KIB


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes that tell when any of them are lost, repeated or moved."""
    return random.Random(seed).randbytes(size)


def resident() -> int:
    """Bytes of memory this process really has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


async def holds(condition: Callable[[], object], *, within: float = 60) -> None:
    """Until the condition is true. `within` only keeps a failure from hanging."""
    with anyio.fail_after(within):
        while not condition():
            await anyio.sleep(0.001)


async def within(awaitable: Awaitable[T], seconds: float = 60) -> T:
    """What is awaited, without hanging for ever if it never comes."""
    with anyio.fail_after(seconds):
        return await awaitable


async def settle() -> None:
    """Until the other tasks have come to where they wait for something from outside. (AnyIO's
    `wait_all_tasks_blocked()` takes 0.1 s on asyncio.)
    """
    for _ in range(20):
        await anyio.sleep(0)


def is_waiting(conn: anypoll.Connection) -> bool:
    """Whether a reader call of the connection waits."""
    return conn._core.hub.waits(conn._core.number)


async def pollers_have_looked() -> None:
    """Until the pollers have served once more whatever the kernel had for them."""
    before = [poller.polls for poller in anypoll.statistics().pollers]

    def looked() -> bool:
        _runtime.nudge()
        now = [poller.polls for poller in anypoll.statistics().pollers]
        return all(polls >= old + 3 for old, polls in zip(before, now, strict=False))

    await holds(looked)


def has_room(sock: socket.socket | int) -> bool:
    """Whether the kernel takes more output of the socket."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))


async def stalled(conn: anypoll.Connection) -> None:
    """Until no more of the connection's output moves, for the other end does not read."""
    with anyio.fail_after(60):
        while True:
            before = conn.statistics().bytes_sent
            await pollers_have_looked()
            if not has_room(conn.fileno()) and conn.statistics().bytes_sent == before:
                return


async def given_up(
    conn: anypoll.Connection, function: Callable[..., Awaitable[Any]], *args: Any
) -> None:
    """Begins to send, and cancels that when it waits for room."""
    async with anyio.create_task_group() as group:
        group.start_soon(function, *args)
        await holds(lambda: conn._core.number in conn._core.hub.writers)
        group.cancel_scope.cancel()


@asynccontextmanager
async def blocked(
    call: Callable[[], Awaitable[Any]], *, cancel: bool = False
) -> AsyncIterator[list[Any]]:
    """Runs the call in a task. The block begins when that waits, and behind it the task has ended;
    the list gets its result or exception. With ``cancel``, it is given up at the end of the block.
    """
    outcome: list[Any] = []

    async def run() -> None:
        try:
            outcome.append(await call())
        except Exception as exc:  # noqa: BLE001 -- the test looks at it
            outcome.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await settle()
        assert outcome == []
        yield outcome
        if cancel:
            group.cancel_scope.cancel()
        else:
            await holds(lambda: outcome)


def at_once(awaitable: Awaitable[T]) -> T:
    """What the coroutine returns, or raises, without suspending its task."""
    assert isinstance(awaitable, Coroutine)
    try:
        awaitable.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    awaitable.close()
    pytest.fail("the call suspended its task")


def suspends(awaitable: Awaitable[Any]) -> bool:
    """Whether the coroutine suspends its task; it is given up then."""
    assert isinstance(awaitable, Coroutine)
    try:
        awaitable.send(None)
    except StopIteration:
        return False
    awaitable.close()
    return True


def socket_pair(kind: str) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets: "tcp", "unix", or "messages" (UNIX sockets that keep them apart)."""
    if kind != "tcp":
        return socket.socketpair(
            type=socket.SOCK_SEQPACKET if kind == "messages" else socket.SOCK_STREAM
        )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        first = socket.create_connection(listening.getsockname())
        second, _ = listening.accept()
    second.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return first, second


@asynccontextmanager
async def opened(
    kind: str = "unix",
) -> AsyncIterator[tuple[anypoll.Connection, socket.socket]]:
    """A connection, and the non-blocking socket at its other end."""
    ours, peer = socket_pair(kind)
    ours.setblocking(False)
    peer.setblocking(False)
    with peer:
        async with open_socket(ours) as conn:
            yield conn, peer


@asynccontextmanager
async def served(
    *, path: str | None = None, **options: Any
) -> AsyncIterator[tuple[anypoll.Connection, socket.socket]]:
    """The same, with the options of a server: it lends its connection to the test."""
    lent: list[anypoll.Connection] = []
    given_back = anyio.Event()

    async def handler(conn: anypoll.Connection) -> None:
        lent.append(conn)
        await given_back.wait()

    async with anypoll.serve(handler, host="127.0.0.1", port=0, **options) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setblocking(False)
            await holds(lambda: lent)
            try:
                yield lent[0], peer
                peer.close()
            finally:
                given_back.set()


async def send_all(peer: socket.socket, data: bytes) -> None:
    """As much as it takes, as the other end reads."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[peer.send(rest) :]
        except BlockingIOError:
            await anyio.wait_writable(peer)


async def send_until_full(conn: anypoll.Connection, peer: socket.socket, data: bytes) -> int:
    """Sends until neither the kernel nor the connection, which nobody reads, takes more; returns
    how much that was.
    """
    sent = 0
    with anyio.fail_after(60):
        while sent < len(data):
            try:
                sent += peer.send(memoryview(data)[sent : sent + 64 * KIB])
            except BlockingIOError:
                before = conn.statistics().bytes_received
                await pollers_have_looked()
                paused = len(conn.reader) >= conn._core.limits.read_high_water
                still = conn.statistics().bytes_received == before
                if paused and still and not has_room(peer):
                    break
    return sent


async def arrive(conn: anypoll.Connection, peer: socket.socket, data: bytes) -> None:
    """Sends a segment and returns when it has been read ahead, as one of its own."""
    after = conn.statistics().bytes_received + len(data)
    await send_all(peer, data)
    await holds(lambda: conn.statistics().bytes_received == after)


async def fill_the_kernel(conn: anypoll.Connection) -> int:
    """Zeros, past the poller, which believes that there is room."""
    fd = _epoll.conn_fd(conn._core.handle, 0)
    full = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            full += os.write(fd, bytes(MIB))
    return full


async def read_all(peer: socket.socket, size: int) -> bytes:
    """Exactly so many bytes; fewer if the stream ends."""
    got = bytearray()
    with anyio.fail_after(60):
        while len(got) < size:
            try:
                piece = peer.recv(min(size - len(got), 256 * KIB))
            except BlockingIOError:
                await anyio.wait_readable(peer)
                continue
            if not piece:
                break
            got += piece
    return bytes(got)


async def read_to_end(peer: socket.socket) -> bytes:
    """All bytes up to the end of the stream."""
    return await read_all(peer, 1 << 62)


def arrived(peer: socket.socket) -> int:
    """How many bytes wait to be read by the plain socket."""
    import array
    import fcntl
    import termios

    count = array.array("i", [0])
    fcntl.ioctl(peer, termios.FIONREAD, count)
    return count[0]


def reset(peer: socket.socket) -> None:
    """Closes a TCP socket with a RST."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
