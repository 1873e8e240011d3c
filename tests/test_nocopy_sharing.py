"""Blocks that move between connections and buffers without being copied."""

from __future__ import annotations

import gc
import queue
import sys
import threading

import anyio
import pytest
from anyio import ClosedResourceError, IncompleteRead
from peers import (
    KIB,
    MIB,
    holds,
    opened,
    pattern,
    read_all,
    send_all,
    settle,
    stalled,
    within,
)

import anypoll
from anypoll import MessageTooLarge, WriteTimeout
from anypoll._loop import runtime as _runtime
from anypoll.nocopy import LinkBuffer

pytestmark = pytest.mark.anyio


def pinned() -> int:
    _runtime.nudge()
    return sum(p.bytes_pinned for p in anypoll.statistics().pollers)


# --- slice ---------------------------------------------------------------------------------------


async def test_a_slice_outlives_the_connection() -> None:
    data = pattern(200 * KIB)
    async with opened() as (conn, peer):
        async with anyio.create_task_group() as group:
            group.start_soon(send_all, peer, data)
            head = await conn.next(10)
            piece = await conn.reader.slice(150 * KIB)
        assert len(piece.parts()) > 1
        rest = await conn.reader.read_bytes(len(data) - 150 * KIB - 10)
        await conn.aclose()
        assert head == data[:10]
        assert piece.to_bytes() == data[10 : 150 * KIB + 10]
        assert rest == data[150 * KIB + 10 :]
        assert piece.until(data[500:520]) == data[10:520]
        piece.close()


async def test_a_slice_is_visible_as_pinned_memory() -> None:
    """A few bytes can keep a large block: that must be seen."""
    async with opened() as (conn, peer):
        async with anyio.create_task_group() as group:
            group.start_soon(send_all, peer, pattern(100 * KIB))
            await conn.reader.skip(100 * KIB - 5)
        piece = await conn.reader.slice(5)
        conn.reader.release()
        await send_all(peer, b"x" * 1000)
        await conn.reader.skip(1000)
        async with anyio.create_task_group() as group:
            group.start_soon(conn.reader.peek, 1)
            await settle()
            group.cancel_scope.cancel()
        await holds(lambda: pinned() > 0 and conn.statistics().pinned > 0)
        assert len(piece) == 5
        piece.close()
        gc.collect()
        await holds(lambda: pinned() == conn.statistics().pinned == 0)


async def test_a_slice_that_cannot_be_had() -> None:
    async with opened() as (conn, peer):
        peer.send(b"abc")
        peer.close()
        with pytest.raises(IncompleteRead):
            await within(conn.reader.slice(4))
        with pytest.raises(MessageTooLarge):
            await conn.reader.slice(65 * MIB)
        for n in (-1, "1", None):
            with pytest.raises((TypeError, ValueError), match="n must be"):
                await conn.reader.slice(n)  # type: ignore[arg-type]
        assert len(await conn.reader.slice(0)) == 0
        assert (await conn.reader.slice(3)).to_bytes() == b"abc"


# --- append --------------------------------------------------------------------------------------


async def test_a_proxy_moves_blocks() -> None:
    """What was received on one connection goes out on another one, and nobody has copied it."""
    data = pattern(3 * MIB)
    async with opened() as (source, client), opened() as (target, server):

        async def forward() -> None:
            left = len(data)
            while left:
                n = min(left, 100_000)
                piece = await source.reader.slice(n)
                target.writer.append(piece)
                assert len(piece) == 0
                await target.writer.flush()
                left -= n

        async with anyio.create_task_group() as group:
            group.start_soon(send_all, client, data)
            group.start_soon(forward)
            assert await read_all(server, len(data)) == data


async def test_thousands_of_pieces_go_out_in_few_calls() -> None:
    """More than IOV_MAX, and more than lie in one call of the core."""
    pieces = [pattern(5 + i % 40, i) for i in range(5000)]
    buffer = LinkBuffer(8)
    for piece in pieces:
        buffer.write(piece)
        buffer.flush()
    async with opened() as (conn, peer):
        conn.writer.write(b"head")
        assert conn.writer.append(buffer) == sum(map(len, pieces))
        conn.writer.write(b"tail")
        async with anyio.create_task_group() as group:
            group.start_soon(conn.writer.flush)
            expected = b"head" + b"".join(pieces) + b"tail"
            assert await read_all(peer, len(expected)) == expected
        assert conn.statistics().writes <= 5000 / 60 + 20


async def test_append_ends_a_reservation_and_checks_its_argument() -> None:
    buffer = LinkBuffer()
    buffer.write(b"b")
    async with opened() as (conn, peer):
        conn.writer.malloc(1)[:] = b"a"
        with pytest.raises(TypeError, match="a LinkBuffer is required"):
            conn.writer.append(b"b")  # type: ignore[arg-type]
        assert conn.writer.malloc_len == 1
        conn.writer.append(buffer)
        assert conn.writer.malloc_len == 0
        await conn.writer.flush()
        assert await read_all(peer, 2) == b"ab"
        await conn.aclose()
        buffer.write(b"kept")
        for call in (
            lambda: conn.writer.append(buffer),
            lambda: conn.writer.write_direct(b"x", 0),
        ):
            with pytest.raises(ClosedResourceError):
                call()
        buffer.flush()
        assert buffer.to_bytes() == b"kept"


# --- by reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["write", "write_direct", "append", "send"])
async def test_references_go_when_the_kernel_has_the_bytes(how: str) -> None:
    """L15: nothing keeps the user's memory after that."""
    data = pattern(MIB)
    baseline = sys.getrefcount(data)
    async with opened() as (conn, peer):
        writer = conn.writer
        if how == "append":
            buffer = LinkBuffer()
            buffer.write(data)
            writer.append(buffer)
        elif how == "write_direct":
            writer.malloc(2)
            writer.write_direct(data, 1)
        elif how == "write":
            writer.write(data)
        async with anyio.create_task_group() as group:
            if how == "send":
                group.start_soon(conn.send, data)
            else:
                group.start_soon(writer.flush)
            await holds(lambda: conn.statistics().bytes_sent > 0)
            assert sys.getrefcount(data) > baseline
            await read_all(peer, MIB + (2 if how == "write_direct" else 0))
        await holds(lambda: sys.getrefcount(data) == baseline)


async def test_a_queue_that_is_never_empty_lets_go_of_what_was_sent() -> None:
    """Else the references of a steady stream of output would grow for ever."""
    async with opened() as (conn, peer):
        core = conn._core
        outputs = core.hub.outputs
        for _ in range(30):
            while core.queued() < 400 * KIB:
                conn.writer.write(pattern(20 * KIB))
                assert core._send(conn.writer._take()) >= 0
            await stalled(conn)
            conn.writer.write(b"x")
            assert core._send(conn.writer._take()) >= 0
            assert sum(map(len, outputs[core.number])) < core.queued() + 100 * KIB
            while core.queued() > 300 * KIB:
                await within(read_all(peer, 10 * KIB))
        conn.abort()


async def test_write_direct_memory_is_copied_when_a_flush_is_given_up() -> None:
    data = bytearray(pattern(MIB))
    expected = b"<" + bytes(data) + b">"
    async with opened() as (conn, peer):
        memory = conn.writer.malloc(2)
        memory[:] = b"<>"
        conn.writer.write_direct(data, 1)
        conn.write_timeout = 0.01
        with pytest.raises(WriteTimeout):
            await conn.writer.flush()
        data[:] = bytes(len(data))
        conn.write_timeout = None
        assert await read_all(peer, len(expected)) == expected


async def test_a_view_that_was_sent_by_reference_survives_its_buffer() -> None:
    """The registry keeps it, not the connection or the buffer."""
    async with opened() as (conn, peer):
        buffer = LinkBuffer()
        buffer.write(pattern(2 * MIB))
        conn.writer.append(buffer)
        async with anyio.create_task_group() as group:
            group.start_soon(conn.reader.peek, 1)
            await holds(lambda: conn._core.number in conn._core.hub.outputs)
            group.cancel_scope.cancel()
        buffer.close()
        del buffer
        gc.collect()
        assert await read_all(peer, 2 * MIB) == pattern(2 * MIB)


async def test_slices_are_read_and_dropped_in_another_thread() -> None:
    """While the connection goes on: blocks come back to their poller from anywhere."""
    total, step = 2 * MIB, 10_007
    data = pattern(total)
    pieces: queue.Queue[LinkBuffer | None] = queue.Queue(8)
    got = bytearray()

    def consume() -> None:
        while (piece := pieces.get()) is not None:
            while len(piece):
                n = min(len(piece), 997)
                got.extend(piece.next(n))
            piece.close()

    thread = threading.Thread(target=consume)
    thread.start()
    try:
        async with opened() as (conn, peer), anyio.create_task_group() as group:
            group.start_soon(send_all, peer, data)
            for begin in range(0, total, step):
                piece = await within(conn.reader.slice(min(step, total - begin)))
                await anyio.to_thread.run_sync(pieces.put, piece)
                del piece
    finally:
        pieces.put(None)
        thread.join()
    assert got == data
    gc.collect()
    await holds(lambda: pinned() == 0)
