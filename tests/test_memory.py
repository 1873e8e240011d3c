"""What memory connections take, and that they give it back. Counted, never timed."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from peers import (
    KIB,
    MIB,
    arrive,
    holds,
    opened,
    pattern,
    read_all,
    send_all,
    settle,
    within,
)

import anypoll
from anypoll import _native
from anypoll._connection.core import Core
from anypoll._loop import runtime as _runtime

pytestmark = pytest.mark.anyio


def in_use() -> int:
    """Bytes of blocks that something refers to."""
    _runtime.nudge()
    return sum(p.bytes_in_use for p in anypoll.statistics().pollers)


def pinned() -> int:
    _runtime.nudge()
    return sum(p.bytes_pinned for p in anypoll.statistics().pollers)


def free() -> int:
    _runtime.nudge()
    return sum(p.bytes_free for p in anypoll.statistics().pollers)


async def test_peeks_across_blocks_take_constant_memory() -> None:
    """L37: merging for a peek must not allocate each time, nor leave anything behind."""
    data = pattern(20_000)
    async with opened() as (conn, peer):
        before = in_use()
        for first in range(0, len(data), 500):
            await arrive(conn, peer, data[first : first + 500])
        view = await conn.reader.peek(15_000)
        most = in_use()
        for i in range(1000):
            view = await conn.reader.peek(14_000 + i % 1000)
        assert view == data[: len(view)]
        assert in_use() <= most
        for round_ in range(300):  # and while it goes on
            n = 997 + round_
            await conn.reader.skip(n)
            data = data[n:] + pattern(n, round_)
            await arrive(conn, peer, pattern(n, round_))
            assert await conn.reader.peek(15_000) == data[:15_000]
            assert in_use() - before <= 4 * len(data) + 64 * KIB
        del view
        await conn.reader.skip(20_000)
        conn.reader.release()
        await holds(lambda: in_use() - before <= 64 * KIB)
    await holds(lambda: in_use() <= before)


async def test_views_pin_their_blocks_and_nothing_else() -> None:
    data = pattern(4 * MIB)
    async with opened() as (conn, peer), anyio.create_task_group() as group:
        before = in_use()
        group.start_soon(send_all, peer, data)
        held = []
        for place in range(0, len(data), 64 * KIB):
            view = await within(conn.reader.next(64 * KIB))
            if place % MIB == 0:
                held.append((place, view[:100]))
        del view
        conn.reader.release()
        await holds(lambda: 0 < in_use() - before <= 4 * (512 * KIB) + MIB)
        for place, view in held:
            assert view == data[place : place + 100]
        del view
        held.clear()
        await holds(lambda: in_use() - before <= 512 * KIB)
    await holds(lambda: in_use() <= before)


async def test_pinned_memory_is_counted() -> None:
    async with opened() as (conn, peer):
        before, in_all = conn.statistics().pinned, pinned()
        await arrive(conn, peer, bytes(1000))
        view = await conn.reader.next(1000)
        assert conn.statistics().pinned == before  # the reader has not left the block
        await arrive(conn, peer, bytes(30_000))
        await conn.reader.skip(30_000)
        conn.reader.release()
        assert conn.statistics().pinned > before
        assert pinned() > in_all
        del view
        await holds(lambda: conn.statistics().pinned == before)
        await holds(lambda: pinned() == in_all)


@pytest.mark.slow
async def test_idle_connections_give_their_blocks_back() -> None:
    """L28, O25: after about a second of waiting with nothing buffered."""
    count, size = 50, 100_000
    pairs = [anypoll.socketpair() for _ in range(count)]
    before = in_use()
    try:
        async with anyio.create_task_group() as group:

            async def wait(conn: anypoll.Connection, got: list[bytes]) -> None:
                got.append(await conn.reader.read_bytes(size))
                got.append(await conn.reader.read_bytes(1))

            async def send(conn: anypoll.Connection) -> None:
                await conn.send(pattern(size))

            outcomes: list[list[bytes]] = []
            for ours, theirs in pairs:
                outcomes.append([])
                group.start_soon(wait, ours, outcomes[-1])
                group.start_soon(send, theirs)
            await holds(lambda: all(len(got) == 1 for got in outcomes))
            await holds(lambda: in_use() <= before)
            await holds(lambda: free() <= 2 * MIB)  # and the burst does not stay, either
            for _, theirs in pairs:
                await theirs.send(b"x")  # they still work
        assert all(got == [pattern(size), b"x"] for got in outcomes)
    finally:
        for pair in pairs:
            for conn in pair:
                await conn.aclose()


async def test_a_block_that_was_read_to_its_end_does_not_stay() -> None:
    """L28: such a block has left the chain, and only the reader's window still keeps it."""
    before = in_use()
    async with opened() as (conn, peer), anyio.create_task_group() as group:
        group.start_soon(send_all, peer, pattern(4 * MIB))
        assert await conn.reader.next(4 * MIB) == pattern(4 * MIB)
        group.start_soon(conn.reader.skip, 1)
        await holds(lambda: in_use() <= before)
        peer.send(b"x")


async def test_a_connection_takes_no_block_before_it_receives() -> None:
    """O25."""
    before = in_use()
    pairs = [anypoll.socketpair() for _ in range(100)]
    async with anyio.create_task_group() as group:
        for ours, _ in pairs:
            group.start_soon(ours.reader.peek, 1)
        await settle()
        assert in_use() <= before
        group.cancel_scope.cancel()
    for pair in pairs:
        for conn in pair:
            await conn.aclose()


async def test_reading_and_writing_for_long_leaves_nothing() -> None:
    """No view, piece, token or frame stays behind: Python's memory, too, is what it was."""

    async def rounds(count: int) -> None:
        for i in range(count):
            conn.writer.write(b"request %d\n" % i)
            conn.writer.malloc(10)[:] = b"0123456789"
            await conn.writer.flush()
            assert await read_all(peer, 19 + len(str(i))) == b"request %d\n0123456789" % i
            await send_all(peer, b"answer %d\n" % i)
            view = await conn.until(b"\n")
            assert view == b"answer %d\n" % i
            await send_all(peer, bytes(3000))
            await conn.receive(1)
            await conn.reader.next_parts(2000)
            await conn.reader.skip(999)
            with anyio.move_on_after(0):
                await conn.reader.next(1 << 20)

    async with opened() as (conn, peer):
        await rounds(100)
        gc.collect()
        before = in_use()
        tracemalloc.start()
        try:
            await rounds(100)
            gc.collect()
            first, _ = tracemalloc.get_traced_memory()
            await rounds(400)
            gc.collect()
            second, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert second - first < 50 * KIB
        assert in_use() - before <= 512 * KIB


async def test_connections_leave_nothing() -> None:
    """L11. Also those that ended in the middle of something."""
    before = in_use()
    for end in range(60):
        async with opened("tcp" if end % 2 else "unix") as (conn, peer):
            async with anyio.create_task_group() as group:
                await arrive(conn, peer, pattern(10_000))
                kept = await conn.reader.next(5000)
                conn.writer.write(bytes(MIB))
                group.start_soon(conn.writer.flush)
                await settle()
                group.cancel_scope.cancel()
            conn.abort()
        assert kept == pattern(10_000)[:5000]
    del kept
    gc.collect()
    await holds(lambda: in_use() <= before)
    await holds(lambda: sum(p.bytes_pinned for p in anypoll.statistics().pollers) == 0)


async def test_a_raw_socket_in_a_garbage_cycle_outlives_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of finalising is arbitrary there: the socket's finaliser, if it came first, would
    close the descriptor while a poller reads from it.
    """
    seen: list[bool] = []

    def watched(core: Core, reset: bool, keep_fd: bool) -> int:
        seen.append(os.path.exists(f"/proc/self/fd/{fd}"))
        return _native.Core._end(core, reset, keep_fd)

    monkeypatch.setattr(Core, "_end", watched)
    ours, peer = socket.socketpair()
    with peer:
        ours.setblocking(False)
        conn = await anypoll.Connection.from_socket(ours)
        fd = conn.fileno()
        cycle: list[Any] = [ours, conn]
        cycle.append(cycle)
        del ours, conn, cycle
        with pytest.warns(ResourceWarning, match="unclosed"):
            gc.collect()
        assert seen == [True]
        assert not os.path.exists(f"/proc/self/fd/{fd}")
        assert not _runtime.raw_sockets


@pytest.mark.parametrize("with_raw", [False, True])
async def test_the_slot_of_a_connection_in_a_garbage_cycle_outlives_it(
    monkeypatch: pytest.MonkeyPatch, with_raw: bool
) -> None:
    """L06, O8. If the slot were given back first, the close that follows would be that of whoever
    has the slot by then, and the socket would stay open.
    """
    seen: list[int] = []

    def watched(core: Core, reset: bool, keep_fd: bool) -> int:
        seen.append(_native.Core._end(core, reset, keep_fd))
        return seen[-1]

    monkeypatch.setattr(Core, "_end", watched)
    conn, peer = anypoll.socketpair()
    async with peer:
        if with_raw:
            conn.extra(anyio.abc.SocketAttribute.raw_socket)
        fd, first = conn.fileno(), conn._core
        gc.collect()  # moves what only `conn` leads to behind what `first` leads to
        del first, conn
        with pytest.warns(ResourceWarning, match="unclosed"):
            gc.collect()
        assert len(seen) == 1
        assert seen[0] >= 0
        assert not os.path.exists(f"/proc/self/fd/{fd}")
        assert not _runtime.raw_sockets
        assert peer._core.hub._cores() == [peer._core]
    assert not peer._core.hub._cores()


# --- of a real process, as the kernel counts it --------------------------------------------------

SERVER = """
import gc, resource, sys
import anyio, anypoll

_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

def rss():
    gc.collect()
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

async def on_request(conn):
    size = int.from_bytes(await conn.next(4), "big")
    conn.writer.write(b"%08d" % len(await conn.next(size)))

async def handler(conn):
    while True:
        await on_request(conn)

async def main():
    mode = {sys.argv[2]: globals()[sys.argv[2]]}
    async with anypoll.serve(host="127.0.0.1", port=0, **mode) as server:
        print(server.port, flush=True)
        while await anyio.to_thread.run_sync(sys.stdin.readline):
            print(rss(), flush=True)

backend, options = {
    "asyncio": ("asyncio", {}), "uvloop": ("asyncio", {"use_uvloop": True}), "trio": ("trio", {})
}[sys.argv[1]]
anyio.run(main, backend=backend, backend_options=options)
"""


def ask(sock: socket.socket, size: int) -> None:
    sock.sendall(size.to_bytes(4, "big") + bytes(size))
    assert int(sock.recv(8, socket.MSG_WAITALL)) == size


@contextlib.contextmanager
def measured(loop: str, mode: str) -> Iterator[tuple[Callable[[], int], Callable[[], Any]]]:
    """A server in a process of its own: what says how many KiB it takes, and what connects to it,
    with a request of 64 bytes.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", SERVER, loop, mode],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(server.kill)
        stdin, stdout = server.stdin, server.stdout
        assert stdin is not None
        assert stdout is not None
        port = int(stdout.readline())

        def rss() -> int:
            stdin.write("\n")
            stdin.flush()
            return int(stdout.readline())

        def connect() -> socket.socket:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            ask(sock, 64)
            return sock

        rss()  # the first time costs more
        yield rss, connect


each_loop = pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
from_outside = pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {}), id="")])


@pytest.mark.slow
@pytest.mark.unsanitized
@each_loop
@from_outside
async def test_a_burst_does_not_stay(loop: str) -> None:
    """L28: 100 connections that each got 4 MiB once. What is above a process without connections
    must come back to twice what the idle ones took, at most.
    """
    with measured(loop, "handler") as (rss, connect):
        base = rss()
        clients = [connect() for _ in range(100)]
        idle = rss() - base
        for client in clients:
            ask(client, 4 * MIB)
        await holds(lambda: rss() - base <= 2 * idle)
        for client in clients:
            ask(client, 64)


@pytest.mark.slow
@pytest.mark.unsanitized
@each_loop
@from_outside
async def test_an_idle_connection_in_request_mode_takes_two_kib(loop: str) -> None:
    """The least of three processes: what an allocator happens to keep free comes on top."""
    count = 5000
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < count + 500:
        pytest.skip("no right to so many descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    taken = []
    try:
        for _ in range(3):
            with measured(loop, "on_request") as (rss, connect):
                for _ in range(100):
                    connect()
                base = rss()
                for _ in range(count):
                    connect()
                taken.append((rss() - base) / count)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert min(taken) <= 2.0, f"{min(taken):.2f} KiB"
