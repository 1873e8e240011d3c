"""A connection as a Trio stream: Trio's own conformance suite, nurseries, plain pytest-trio."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio.abc import SocketAttribute

import anypoll
from anypoll import Connection

pytestmark = pytest.mark.trio


class TrioStream(trio.abc.HalfCloseableStream):
    """What a Trio user writes to hand a connection to code for Trio streams."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with _trios_errors():
            await self.conn.send(data)

    async def wait_send_all_might_not_block(self) -> None:
        with _trios_errors():
            await self.conn.wait_writable()

    async def send_eof(self) -> None:
        with _trios_errors():
            await self.conn.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and not isinstance(max_bytes, int):
            raise TypeError("max_bytes must be an integer")
        with _trios_errors():
            try:
                return await self.conn.receive(65536 if max_bytes is None else max_bytes)
            except anyio.EndOfStream:
                return b""

    async def aclose(self) -> None:
        await self.conn.aclose()


class _trios_errors:  # noqa: N801 -- it is used as a function
    """AnyIO's exceptions as Trio's."""

    def __enter__(self) -> None:
        return

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> None:
        if isinstance(exc, anyio.ClosedResourceError):
            raise trio.ClosedResourceError(*exc.args) from exc
        if isinstance(exc, anyio.BrokenResourceError):
            raise trio.BrokenResourceError(*exc.args) from exc
        if isinstance(exc, anyio.BusyResourceError):
            raise trio.BusyResourceError(*exc.args) from exc


async def unix_pair() -> tuple[TrioStream, TrioStream]:
    first, second = anypoll.socketpair()
    return TrioStream(first), TrioStream(second)


async def tcp_pair() -> tuple[TrioStream, TrioStream]:
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        port = multi.extra(SocketAttribute.local_port)
        first = await anypoll.connect_tcp("127.0.0.1", port)
        second = await multi.listeners[0].accept()
    return TrioStream(first), TrioStream(second)  # type: ignore[arg-type]


@asynccontextmanager
async def no_longer_than(seconds: float) -> AsyncIterator[None]:
    with trio.fail_after(seconds):
        yield


makers = pytest.mark.parametrize("make", [unix_pair, tcp_pair], ids=["unix", "tcp"])


@makers
async def test_conformance(make: Any) -> None:
    async with no_longer_than(40):
        await trio.testing.check_half_closeable_stream(make, None)


async def clog(stream: TrioStream) -> None:
    """Sends until no buffer takes any more: that of the kernel, and what the peer reads ahead."""

    async def send() -> None:
        await stream.send_all(bytes(16 << 20))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        history = [-1]
        while len(history) < 10 or history[-10] != history[-1]:
            history.append(stream.conn.statistics().bytes_sent)
            await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


def clogged_maker(make: Any) -> Any:
    async def maker() -> tuple[TrioStream, TrioStream]:
        first, second = await make()
        await clog(first)
        await clog(second)
        return first, second

    return maker


@makers
@pytest.mark.slow
async def test_conformance_with_clogged_streams(make: Any) -> None:
    async with no_longer_than(50):
        await trio.testing.check_half_closeable_stream(make, clogged_maker(make))


async def test_a_nursery() -> None:
    first, second = anypoll.socketpair()
    got: list[bytes] = []

    async def receive() -> None:
        got.extend([piece async for piece in second])

    async with first, second, trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await first.send(b"hello")
        await first.send_eof()
    assert b"".join(got) == b"hello"


async def test_a_cancelled_nursery() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.receive)
            nursery.start_soon(second.send, bytes(8 << 20))
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        assert first.is_active


async def echo(conn: Connection) -> None:
    async for piece in conn:
        await conn.send(piece)


async def test_serve_forever_in_a_nursery() -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            functools.partial(anypoll.serve_forever, echo, host="127.0.0.1", port=0)
        )
        assert isinstance(server, anypoll.Server)
        async with await anypoll.connect_tcp("127.0.0.1", server.port) as conn:
            await conn.send(b"ping")
            assert await conn.next(4) == b"ping"
        nursery.cancel_scope.cancel()
    assert server.shutting_down


async def test_trios_own_client() -> None:
    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with stream:
            await stream.send_all(b"from Trio's stream")
            await stream.send_eof()
            assert b"".join([piece async for piece in stream]) == b"from Trio's stream"


async def test_every_operation_is_a_checkpoint_of_trios() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        with trio.testing.assert_checkpoints():
            await first.send(b"x")
        while not len(second.reader):
            await trio.sleep(0.001)
        with trio.testing.assert_checkpoints():
            await second.receive()
        with trio.testing.assert_checkpoints():
            await first.send(b"")
        with trio.testing.assert_checkpoints():
            await first.wait_writable()
        with trio.testing.assert_checkpoints():
            await first.send_eof()
        with trio.testing.assert_checkpoints():
            await first.send_eof()
        with trio.testing.assert_checkpoints(), pytest.raises(anyio.EndOfStream):
            await second.receive()
        with trio.testing.assert_checkpoints():
            await first.aclose()
        with trio.testing.assert_checkpoints():
            await first.aclose()


async def test_timeouts_are_trios_scopes() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        with trio.move_on_after(0.01) as scope:
            await first.receive()
        assert scope.cancelled_caught
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.01):
            await first.receive()
        await second.send(b"x")
        assert await first.receive() == b"x"


async def test_the_read_timeout_is_real_time(autojump_clock: trio.testing.MockClock) -> None:
    """Trio's clock jumps ahead while tasks wait for a poller; our timeouts do not."""
    first, second = anypoll.socketpair()
    async with first, second:
        first.read_timeout = 0.02
        with pytest.raises(anypoll.ReadTimeout):
            await first.receive()
