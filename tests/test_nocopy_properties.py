"""The reader and the writer against a model of plain bytes: random segments, requests,
cancellations and timeouts. Whatever happens, no byte is lost, repeated or moved, and no view
changes.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio import DelimiterNotFound, EndOfStream, IncompleteRead, WouldBlock
from hypothesis import HealthCheck, given, settings, strategies as st
from peers import holds

import anypoll
from anypoll import ReadTimeout, WriteTimeout
from anypoll.nocopy import LinkBuffer

quick = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)

SIZES = st.one_of(
    st.integers(0, 20), st.integers(0, 3000), st.sampled_from([2016, 4096, 40_000, 100_000])
)
DELIMITERS = st.sampled_from([b"a", b"ab", b"aab", b"abab", b"bbbbb", b"a" * 40])


def stream(size: int) -> bytes:
    """Two letters only, so that delimiters are found, and nearly found, all over."""
    return bytes(random.Random(size).choices(b"ab", k=size))


STREAM = stream(3_000_000)


# --- reading -------------------------------------------------------------------------------------

READS = st.one_of(
    st.tuples(st.just("feed"), SIZES),
    st.tuples(
        st.sampled_from(
            [
                "peek",
                "next",
                "skip",
                "next_parts",
                "slice",
                "read_bytes",
                "receive",
                "readinto",
                "peek_nowait",
                "next_nowait",
                "skip_nowait",
            ]
        ),
        SIZES,
    ),
    st.tuples(st.sampled_from(["until", "until_nowait"]), st.tuples(DELIMITERS, SIZES)),
    st.tuples(st.just("release"), st.just(0)),
    st.tuples(st.just("settle"), st.just(0)),
    st.tuples(st.just("budget"), st.integers(1, 70)),
)

#: What becomes of a request whose bytes are not all there.
ENDINGS = st.sampled_from(["feed", "drip", "cancel", "timeout", "cancel and feed"])


class ReadModel:
    """What was sent and what was consumed, as two places in the stream."""

    def __init__(self, conn: anypoll.Connection, peer: anypoll.Connection) -> None:
        self.conn, self.peer = conn, peer
        self.fed = self.taken = 0
        self.ended = False
        self.views: list[tuple[int, memoryview]] = []

    async def feed(self, n: int) -> None:
        await self.peer.send(STREAM[self.fed : self.fed + n])
        self.fed += n

    def missing(self, method: str, argument: Any) -> int:
        """How many bytes must still come before the request is answered."""
        if method.startswith("until"):
            delimiter, most = argument
            found = STREAM.find(delimiter, self.taken, self.taken + most)
            end = found + len(delimiter) if found >= 0 else self.taken + most
        elif method in ("receive", "readinto"):
            end = self.taken + (1 if argument else 0)
        else:
            end = self.taken + argument
        return max(end - self.fed, 0)

    def call(self, method: str, argument: Any) -> Awaitable[Any]:
        reader = self.conn.reader
        if method == "until":
            return reader.until(argument[0], max_bytes=argument[1])
        if method == "receive":
            return self.conn.receive(max(argument, 1))
        if method == "readinto":
            return reader.readinto(self.buffer)
        return getattr(reader, method)(argument)  # type: ignore[no-any-return]

    def expect(self, place: int, view: memoryview, size: int) -> None:
        assert isinstance(view, memoryview)
        assert len(view) == size
        assert view == STREAM[place : place + size]
        self.views.append((place, view))

    def check(self, method: str, argument: Any, result: Any) -> None:
        """The result of a request that was answered."""
        place, n = self.taken, argument
        method = method.removesuffix("_nowait")
        if method == "peek":
            self.expect(place, result, n)
            return
        if method == "next":
            self.expect(place, result, n)
        elif method in ("next_parts", "slice"):
            parts = result.parts() if method == "slice" else result
            assert sum(map(len, parts)) == n
            for part in parts:
                self.expect(place, part, len(part))
                place += len(part)
        elif method == "read_bytes":
            assert type(result) is bytes
            assert result == STREAM[place : place + n]
        elif method == "receive":
            assert 1 <= len(result) <= max(n, 1)
            assert result == STREAM[place : place + len(result)]
            n = len(result)
        elif method == "readinto":
            assert (1 if n else 0) <= result <= n
            assert self.buffer[:result] == STREAM[place : place + result]
            n = result
        elif method == "until":
            delimiter, most = argument
            n = STREAM.index(delimiter, place, place + most) + len(delimiter) - place
            self.expect(place, result, n)
        self.taken += n

    def absent(self, method: str, argument: Any) -> bool:
        """Whether the delimiter is known not to come within its limit."""
        if not method.startswith("until"):
            return False
        delimiter, most = argument
        return STREAM.find(delimiter, self.taken, self.taken + most) < 0

    async def request(self, method: str, argument: Any, ending: str) -> None:
        self.buffer = bytearray(argument if isinstance(argument, int) else 0)
        if method == "receive":
            argument = max(argument, 1)
        if method.endswith("_nowait"):
            await self.nowait(method, argument)
            return
        missing = self.missing(method, argument)
        if not missing:
            await self.answered(method, argument)
            return
        if ending == "timeout":
            self.conn.read_timeout = 0.001
            try:
                await self.call(method, argument)
            except ReadTimeout:
                return
            finally:
                self.conn.read_timeout = None
            pytest.fail("bytes that were never sent")
        async with anyio.create_task_group() as group:
            done: list[bool] = []

            async def run() -> None:
                await self.answered(method, argument)
                done.append(True)

            group.start_soon(run)
            await anyio.lowlevel.checkpoint()
            if ending == "feed":
                await self.feed(missing)
            elif ending == "drip":
                step = max(missing // 5, 1)
                while missing > 0:
                    await self.feed(min(step, missing))
                    missing -= step
                    await anyio.lowlevel.checkpoint()
            else:
                if ending == "cancel and feed":  # either may come first
                    await self.feed(missing)
                group.cancel_scope.cancel()
        assert done or ending.startswith("cancel")

    async def answered(self, method: str, argument: Any) -> None:
        if self.absent(method, argument):
            with pytest.raises(DelimiterNotFound):
                await self.call(method, argument)
        else:
            self.check(method, argument, await self.call(method, argument))

    async def nowait(self, method: str, argument: Any) -> None:
        there = len(self.conn.reader)
        call: Callable[[], Any] = lambda: getattr(self.conn.reader, method)(argument)  # noqa: E731
        if method == "until_nowait":
            delimiter, most = argument
            call = lambda: self.conn.reader.until_nowait(delimiter, max_bytes=most)  # noqa: E731
        try:
            result = call()
        except WouldBlock:
            # what the poller has not read is not there, even if it was sent
            assert self.missing(method, argument) + self.fed - self.taken > there
            return
        except DelimiterNotFound:
            assert self.absent(method, argument)
            return
        self.check(method, argument, result)

    async def step(self, method: str, argument: Any, ending: str) -> None:
        if method == "feed":
            if self.fed - self.taken < 250_000:  # within high water, so that nobody waits
                await self.feed(argument)
        elif method == "release":
            self.conn.reader.release()
        elif method == "settle":
            level = min(self.fed - self.taken, 200_000)
            await holds(lambda: len(self.conn.reader) >= level)
        elif method == "budget":
            for _ in range(argument):
                await self.request("peek", min(1, self.fed - self.taken), ending)
        else:
            await self.request(method, argument, ending)
        assert len(self.conn.reader) <= self.fed - self.taken

    async def finish(self) -> None:
        """The end of the stream: what is left, then nothing."""
        await self.peer.send_eof()
        left = self.fed - self.taken
        with pytest.raises(IncompleteRead if left else EndOfStream):
            await self.conn.reader.next(left + 1)
        assert await self.conn.reader.read_bytes(left) == STREAM[self.taken : self.fed]
        with pytest.raises(EndOfStream):
            await self.conn.reader.peek(1)
        assert self.conn.at_eof
        for place, view in self.views:
            assert view == STREAM[place : place + len(view)]


@quick
@given(steps=st.lists(st.tuples(READS, ENDINGS), max_size=40))
def test_reading(
    anyio_backend: tuple[str, dict[str, Any]], steps: list[tuple[tuple[str, Any], str]]
) -> None:
    async def main() -> None:
        conn, peer = anypoll.socketpair()
        async with conn, peer:
            with anyio.fail_after(60):
                model = ReadModel(conn, peer)
                for (method, argument), ending in steps:
                    await model.step(method, argument, ending)
                await model.finish()
        for place, view in model.views:
            assert view == STREAM[place : place + len(view)]

    backend, options = anyio_backend
    anyio.run(main, backend=backend, backend_options=options)


# --- writing -------------------------------------------------------------------------------------

WRITE_SIZES = st.one_of(
    st.integers(0, 20),
    st.integers(0, 9000),
    st.sampled_from([4096, 4097, 16_384, 300_000]),
)
WRITES = st.one_of(
    st.tuples(st.sampled_from(["write", "bytearray", "memoryview", "write_str"]), WRITE_SIZES),
    st.tuples(st.just("write_byte"), st.integers(0, 255)),
    st.tuples(st.sampled_from(["malloc"]), WRITE_SIZES),
    st.tuples(st.just("malloc_ack"), st.floats(0, 1)),
    st.tuples(st.just("append"), st.lists(st.integers(1, 5000), max_size=20)),
    st.tuples(st.just("write_direct"), st.tuples(st.floats(0, 1), WRITE_SIZES, st.booleans())),
    st.tuples(st.sampled_from(["flush", "cancelled flush", "timed out flush"]), st.just(0)),
    st.tuples(st.sampled_from(["send", "cancelled send", "timed out send"]), WRITE_SIZES),
    st.tuples(st.sampled_from(["read", "waiting read"]), st.just(0)),
    st.tuples(st.just("drain"), st.integers(0, 500_000)),
)


class WriteModel:
    """What must arrive; the peer is not read unless it is said, so that output stalls."""

    def __init__(self, conn: anypoll.Connection, peer: anypoll.Connection) -> None:
        self.conn, self.peer, self.writer = conn, peer, conn.writer
        self.expected = bytearray()
        self.open = bytearray()
        self.direct: list[bytearray] = []
        self.counter = 0
        self.read = 0

    def data(self, size: int) -> bytes:
        self.counter += 1
        return random.Random(self.counter).randbytes(size)

    def seal(self) -> None:
        self.expected += self.open
        self.open = bytearray()

    def total(self) -> int:
        """All that was sent or will be, in one look: the poller goes on meanwhile."""
        statistics = self.conn.statistics()
        return statistics.bytes_sent + statistics.buffered_output

    def write(self, data: bytes) -> None:
        self.seal()
        self.expected += data

    async def check(self, n: int) -> None:
        """Reads from the other end what must have come."""
        n = min(n, len(self.expected) - self.read)
        got = await self.peer.reader.read_bytes(n)
        assert got == self.expected[self.read : self.read + n]
        self.read += n

    async def beside(self, call: Callable[[], Awaitable[None]]) -> None:
        """A call that may only end when the other end reads."""
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await self.check(1 << 40)

    async def given_up(self, how: str, call: Callable[[], Awaitable[None]]) -> bool:
        """Whether it had been done before it was given up."""
        if how.startswith("cancelled"):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:

                    async def cancel() -> None:
                        await anyio.lowlevel.checkpoint()
                        scope.cancel()

                    group.start_soon(cancel)
                    await call()
                    return True
            return False
        self.conn.write_timeout = 0.001
        try:
            await call()
        except WriteTimeout:
            return False
        finally:
            self.conn.write_timeout = None
        return True

    async def send(self, how: str, size: int) -> None:
        data = self.data(size)
        buffer = bytearray(data)
        before = self.total()
        sealed, self.open = bytes(self.open), bytearray()
        if how == "send":
            self.expected += sealed
            self.expected += data
            await self.beside(lambda: self.conn.send(buffer))
            return
        done = await self.given_up(how, lambda: self.conn.send(buffer))
        buffer[:] = bytes(size)  # it is the caller's again
        if self.writer.malloc_len:  # it had not even begun
            self.open = bytearray(sealed)
            return
        self.expected += sealed
        # All of it, or nothing; a part only if the rest is still pending.
        taken = self.total() - before - len(sealed)
        assert taken in (0, size)
        assert taken == size or not done
        if taken:
            self.expected += data

    def append(self, sizes: list[int]) -> None:
        buffer = LinkBuffer(block_size=8 + len(sizes))
        for i, size in enumerate(sizes):
            data = self.data(size)
            if i % 3 == 2:
                buffer.malloc(size)[:] = data
            else:
                buffer.write(data)
            if i % 2:
                buffer.flush()
            self.write(data)
        assert self.writer.append(buffer) == sum(sizes)
        assert len(buffer) == 0
        self.seal()

    def write_direct(self, place: float, size: int, mutable: bool) -> None:
        data: Any = self.data(size)
        remain = int(place * len(self.open))
        at = len(self.open) - remain
        self.open[at:at] = data
        if mutable:
            data = bytearray(data)
            self.direct.append(data)
        assert self.writer.write_direct(data, remain) == size

    async def flush(self, how: str) -> None:
        self.seal()
        if how == "flush":
            await self.beside(self.writer.flush)
            assert len(self.writer) == 0
        else:
            await self.given_up(how, self.writer.flush)
        for data in self.direct:  # sent or copied: it is the caller's again
            data[:] = bytes(len(data))
        self.direct.clear()

    async def step(self, method: str, argument: Any) -> None:
        writer = self.writer
        match method:
            case "write" | "bytearray" | "memoryview":
                data = self.data(argument)
                given: Any = {"write": data, "bytearray": bytearray(data)}.get(
                    method, memoryview(bytearray(data))
                )
                assert writer.write(given) == len(data)
                if method != "write":
                    given[:] = bytes(argument)
                self.write(data)
            case "write_str":
                text = "é" * argument
                assert writer.write_str(text) == 2 * argument
                self.write(text.encode())
            case "write_byte":
                writer.write_byte(argument)
                self.write(bytes([argument]))
            case "malloc":
                memory = writer.malloc(argument)
                assert memory == bytes(argument)
                data = self.data(argument)
                memory[:] = data
                self.open += data
            case "malloc_ack":
                keep = int(argument * len(self.open))
                assert writer.malloc_len == len(self.open)
                writer.malloc_ack(keep)
                self.open = self.open[:keep]
                self.seal()
            case "append":
                self.append(argument)
            case "write_direct":
                self.write_direct(*argument)
            case "flush" | "cancelled flush" | "timed out flush":
                await self.flush(method)
            case "send" | "cancelled send" | "timed out send":
                await self.send(method, argument)
            case "read":
                async with anyio.create_task_group() as group:
                    group.start_soon(self.conn.reader.skip, 1)
                    await self.check(1 << 40)
                    await self.peer.send(b"x")
            case "waiting read":
                with anyio.move_on_after(0.001):
                    await self.conn.reader.peek(1)
            case "drain":
                pending = len(writer) - writer.malloc_len
                await self.check(min(argument, len(self.expected) - self.read - pending))
        assert writer.malloc_len == len(self.open)
        assert len(writer) <= len(self.expected) - self.read + len(self.open)

    async def finish(self, how: str) -> None:
        if how == "aclose":
            # the rest of a send that was given up is only waited for if something else is pending
            await self.step("write", 1)
            await self.step("malloc", 5)  # and an open reservation is not sent
            await self.beside(self.conn.aclose)
        else:
            self.seal()
            await self.beside(self.conn.send_eof)
        with pytest.raises(EndOfStream):
            await self.peer.reader.next(1)
        assert self.read == len(self.expected)


@quick
@given(steps=st.lists(WRITES, max_size=30), end=st.sampled_from(["aclose", "send_eof"]))
def test_writing(
    anyio_backend: tuple[str, dict[str, Any]], steps: list[tuple[str, Any]], end: str
) -> None:
    async def main() -> None:
        conn, peer = anypoll.socketpair()
        async with conn, peer:
            with anyio.fail_after(60):
                model = WriteModel(conn, peer)
                for method, argument in steps:
                    await model.step(method, argument)
                await model.finish(end)

    backend, options = anyio_backend
    anyio.run(main, backend=backend, backend_options=options)
