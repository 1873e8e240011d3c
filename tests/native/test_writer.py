"""The native writer: small output is copied into a tail, larger output is kept in pieces."""

from __future__ import annotations

import gc
import random
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from peers import (
    arrive,
    fill_the_kernel,
    holds,
    is_waiting,
    opened,
    pattern,
    read_all,
    send_all,
    within,
)

from anypoll.nocopy import LinkBuffer

pytestmark = pytest.mark.anyio

SMALL, TAIL = 1024, 4032  # see csrc/python/writer.c
SIZES = [0, 1, 68, SMALL - 1, SMALL, SMALL + 1, TAIL - 1, TAIL, TAIL + 1, 20_000]
KINDS: list[Callable[[bytes], Any]] = [
    bytes,
    bytearray,
    memoryview,
    lambda data: memoryview(bytes(b for byte in data for b in (byte, 0)))[::2],
    lambda data: memoryview(data + b"." * (-len(data) % 4)).cast("I") if data else b"",
]


def outputs(seed: int) -> list[Any]:
    chance = random.Random(seed)
    return [chance.choice(KINDS)(pattern(chance.choice(SIZES), seed)) for _ in range(200)]


@pytest.mark.parametrize("seed", range(5))
async def test_every_size_and_kind_of_output_is_sent_in_order(seed: int) -> None:
    data = outputs(seed)
    whole = b"".join(piece.tobytes() if type(piece) is memoryview else piece for piece in data)
    async with opened("unix") as (conn, peer), anyio.create_task_group() as group:

        async def send() -> None:
            size = 0
            for number, piece in enumerate(data):
                length = piece.nbytes if type(piece) is memoryview else len(piece)
                assert conn.writer.write(piece) == length
                size += length
                assert len(conn.writer) == size
                if number % 7 == 0:
                    await conn.writer.flush()
                    size = 0
            await conn.writer.flush()

        group.start_soon(send)
        assert await within(read_all(peer, len(whole))) == whole


async def test_pieces_and_tail_are_one_sequence() -> None:
    """Whoever looks at the pieces in between."""
    data = outputs(1)
    whole = b"".join(piece.tobytes() if type(piece) is memoryview else piece for piece in data)
    async with opened("unix") as (conn, peer), anyio.create_task_group() as group:
        for number, piece in enumerate(data):
            conn.writer.write(piece)
            if number % 3 == 0:
                assert sum(map(len, conn.writer._pieces)) == conn.writer._size
        group.start_soon(conn.writer.flush)
        assert await within(read_all(peer, len(whole))) == whole


async def test_large_views_of_received_bytes_are_kept() -> None:
    """Not copied: a block does not change as long as there is a view of it."""
    data = pattern(20_000, 1)
    async with opened("unix") as (conn, peer):
        await arrive(conn, peer, data)
        view = await conn.next(len(data))
        writer = conn.writer
        assert writer.write(view) == len(data)
        assert writer.write(view.cast("I")) == len(data)
        assert writer.write(view[100:12_100]) == 12_000
        assert [type(piece) for piece in writer._pieces] == [memoryview] * 3
        assert [piece.format for piece in writer._pieces] == ["B"] * 3
        for copied in (view[:4096], view[::2], memoryview(bytearray(data))):
            writer.write(copied)
            assert type(writer._pieces[-1]) is bytes
        whole = data + data + data[100:12_100] + data[:4096] + data[::2] + data
        view.release()  # the writer has its own
        await send_all(peer, pattern(30_000, 2))
        assert await conn.reader.read_bytes(30_000) == pattern(30_000, 2)
        async with anyio.create_task_group() as group:
            group.start_soon(writer.flush)
            assert await within(read_all(peer, len(whole))) == whole
        assert conn.statistics().pinned == 0


async def test_a_small_part_of_a_large_block_is_copied() -> None:
    """It would pin the whole block."""
    async with opened("unix") as (conn, peer):
        await arrive(conn, peer, pattern(200_000, 1))
        view = await conn.next(200_000)
        conn.writer.write(view[:5000])
        conn.writer.write(view[:100_000])
        assert [type(piece) for piece in conn.writer._pieces] == [bytes, memoryview]
        buffer = LinkBuffer()
        buffer.write(view)  # it has blocks of its own
        assert all(type(piece) is bytes for piece in buffer._pieces)


async def test_a_view_that_is_queued_pins_its_block() -> None:
    data = pattern(60_000, 3)
    async with opened("unix") as (conn, peer), anyio.create_task_group() as group:
        zeros = await fill_the_kernel(conn)
        await arrive(conn, peer, data)
        conn.writer.write(await conn.next(len(data)))
        group.start_soon(conn.writer.flush)
        await holds(lambda: conn._core.hub.outputs)
        for seed in range(3):
            await arrive(conn, peer, pattern(60_000, seed))
            assert await conn.next(60_000) == pattern(60_000, seed)
        assert await within(read_all(peer, zeros + len(data))) == bytes(zeros) + data


async def test_small_output_that_is_queued_is_not_written_over() -> None:
    """What the kernel had no room for stays where it is, while others write."""
    async with opened("unix") as (conn, peer), opened("unix") as (other, its_peer):
        full = await fill_the_kernel(conn)
        async with anyio.create_task_group() as group:
            conn.writer.write(b"reply")
            group.start_soon(conn.reader.peek, 1)  # it takes the output along
            await holds(lambda: is_waiting(conn))
            assert conn._core.queued() == len(b"reply")
            for _ in range(100):
                other.writer.write(b"other")
                conn.writer.write(b"later")
                await other.writer.flush()
            assert await within(read_all(its_peer, 500)) == b"other" * 100
            assert await within(read_all(peer, full + 5)) == bytes(full) + b"reply"
            peer.send(b"x")
        await conn.writer.flush()
        assert await within(read_all(peer, 500)) == b"later" * 100


@pytest.mark.parametrize("small", [True, False])
async def test_queued_output_is_held_before_anything_is_interpreted(
    small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may raise an exception in any frame of Python's, while the core sends."""
    output = b"reply" if small else b"reply" * 2000
    frames: list[str] = []

    def interrupted(frame: Any, event: str, _arg: object) -> None:
        if event == "call" and frame.f_code.co_name in ("_keep", "_drop_sent"):
            frames.append(frame.f_code.co_name)
            raise InterruptedError

    async with opened("unix") as (conn, peer):
        full = await fill_the_kernel(conn)
        conn.writer.write(output)
        sys.setprofile(interrupted)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(conn.reader.peek, 1)  # it takes the output along
                await holds(lambda: is_waiting(conn))
                sys.setprofile(None)
                number, outputs = conn._core.number, conn._core.hub.outputs
                assert sum(map(len, outputs[number])) == len(output)
                assert await within(read_all(peer, full + len(output))) == bytes(full) + output
                peer.send(b"x")
        finally:
            sys.setprofile(None)
    assert not frames


async def test_a_writer_with_nothing_pending_has_no_tail() -> None:
    """An idle connection has no memory for output, whatever was written before."""
    async with AsyncExitStack() as stack:
        conns = [(await stack.enter_async_context(opened("unix")))[0] for _ in range(200)]

        async def use(conn: Any) -> None:
            conn.writer.write(b"small")
            conn.writer.write(bytes(5000))
            conn.writer.write(b"")
            with anyio.move_on_after(0):
                await conn.next(1)
            await conn.writer.flush()
            conn.writer.write(b"")

        await use(conns[0])
        tracemalloc.start()
        try:
            for conn in conns:
                await use(conn)
            gc.collect()
            tails = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, __file__)])
            large = [t for t in tails.traces if t.size > TAIL]
        finally:
            tracemalloc.stop()
    assert len(large) < 100  # some are kept for the next writers
