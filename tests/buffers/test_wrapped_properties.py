"""A reader and a writer over other streams against a model of plain bytes, with chunks, and so
blocks, of 8 to 64 bytes: everything lies across some.
"""

from __future__ import annotations

from typing import Any

import anyio
from anyio import DelimiterNotFound, EndOfStream, IncompleteRead, WouldBlock
from anyio.abc import ByteReceiveStream, ByteSendStream
from hypothesis import HealthCheck, given, settings, strategies as st

from anypoll.nocopy import LinkBuffer, Reader, wrap_reader, wrap_writer

CHUNKS = st.lists(st.text("ab", min_size=8, max_size=64).map(str.encode), max_size=30)
SIZES = st.one_of(st.integers(0, 20), st.integers(0, 300))
DELIMITERS = st.sampled_from([b"a", b"ab", b"aab", b"abab", b"bbbbb", b"a" * 20])
READS = st.one_of(
    st.tuples(
        st.sampled_from(["peek", "next", "skip", "next_parts", "slice", "read_bytes", "readinto"]),
        SIZES,
    ),
    st.tuples(st.sampled_from(["peek_nowait", "next_nowait", "skip_nowait"]), SIZES),
    st.tuples(st.sampled_from(["until", "until_nowait"]), st.tuples(DELIMITERS, SIZES)),
    st.tuples(st.just("release"), st.just(0)),
)

quick = settings(
    max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


class Chunks(ByteReceiveStream):
    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = list(chunks)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        if not self.chunks:
            raise EndOfStream
        return self.chunks.pop(0)

    async def aclose(self) -> None:
        pass


class Model:
    def __init__(self, reader: Reader, data: bytes) -> None:
        self.reader, self.data = reader, data
        self.taken = 0
        self.views: list[tuple[memoryview, bytes]] = []

    def expect(self, view: memoryview, data: bytes) -> None:
        assert view.readonly
        assert view == data
        self.views.append((view, data))

    async def step(self, method: str, argument: Any) -> None:
        if method == "release":
            self.reader.release()
        elif method.startswith("until"):
            await self.until(method, *argument)
        else:
            await self.read(method, argument)
        assert len(self.reader) <= len(self.data) - self.taken
        for view, data in self.views:
            assert view == data

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        result = getattr(self.reader, method)(*arguments, **options)
        return result if method.endswith("_nowait") else await result

    async def read(self, method: str, n: int) -> None:
        if method == "readinto":
            into = bytearray(n)
            got = await self.reader.readinto(into)
            assert (1 if n and self.taken < len(self.data) else 0) <= got <= n
            assert into[:got] == self.data[self.taken : self.taken + got]
            self.taken += got
            return
        data = self.data[self.taken : self.taken + n]
        try:
            result = await self.call(method, n)
        except WouldBlock:
            assert method.endswith("_nowait")
            assert n > len(self.reader)
            return
        except IncompleteRead:
            assert 0 < len(data) < n
            return
        except EndOfStream:
            assert data == b""
            assert n > 0
            return
        self.check(method.removesuffix("_nowait"), result, data, n)

    def check(self, method: str, result: Any, data: bytes, n: int) -> None:
        assert len(data) == n
        if method in ("peek", "next"):
            self.expect(result, data)
        elif method in ("next_parts", "slice"):
            parts = result.parts() if isinstance(result, LinkBuffer) else result
            assert b"".join(parts) == data
            for part in parts:
                self.expect(part, bytes(part))
        else:
            assert result == (None if method == "skip" else data)
        self.taken += 0 if method == "peek" else n

    async def until(self, method: str, delimiter: bytes, most: int) -> None:
        rest = self.data[self.taken :]
        at = rest[:most].find(delimiter)
        try:
            view = await self.call(method, delimiter, max_bytes=most)
        except WouldBlock:
            assert method == "until_nowait"
            there = rest[: min(len(self.reader), most)]
            assert there.find(delimiter) < 0
            assert len(there) < most
        except DelimiterNotFound:
            assert at < 0
            assert len(rest) >= most
        except (EndOfStream, IncompleteRead):
            assert at < 0
            assert len(rest) < most
        else:
            self.expect(view, rest[: at + len(delimiter)])
            self.taken += len(view)


@quick
@given(chunks=CHUNKS, steps=st.lists(READS, max_size=40))
def test_reading(chunks: list[bytes], steps: list[tuple[str, Any]]) -> None:
    async def main() -> None:
        model = Model(wrap_reader(Chunks(chunks)), b"".join(chunks))
        for method, argument in steps:
            await model.step(method, argument)
        left = len(model.data) - model.taken
        await model.read("read_bytes", left)
        await model.read("next", 1)

    anyio.run(main)


class Collected(ByteSendStream):
    def __init__(self) -> None:
        self.data = bytearray()

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        self.data += item

    async def aclose(self) -> None:
        pass


@quick
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.binary(max_size=100)),
            st.tuples(st.just("malloc"), st.binary(max_size=100)),
            st.tuples(st.just("append"), st.lists(st.binary(min_size=8, max_size=64), max_size=9)),
            st.tuples(st.just("write_direct"), st.binary(max_size=5000)),
            st.tuples(st.just("flush"), st.none()),
        ),
        max_size=30,
    )
)
def test_writing(steps: list[tuple[str, Any]]) -> None:
    async def main() -> None:
        sink = Collected()
        writer = wrap_writer(sink)
        expected = bytearray()
        for method, argument in steps:
            if method == "write":
                writer.write(argument)
            elif method == "malloc":
                writer.malloc(len(argument))[:] = argument
            elif method == "append":
                buffer = LinkBuffer(8)
                for piece in argument:
                    buffer.write(piece)
                    buffer.flush()
                writer.append(buffer)
                argument = b"".join(argument)
            elif method == "write_direct":
                writer.write_direct(argument, 0)
            else:
                await writer.flush()
                assert sink.data == expected
                continue
            expected += argument
            assert len(writer) == len(expected) - len(sink.data)
        await writer.flush()
        assert sink.data == expected

    anyio.run(main)
