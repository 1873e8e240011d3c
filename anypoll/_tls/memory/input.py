"""A TLS connection's receive path: waiting for plaintext or a delimiter, with a timeout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, SupportsIndex

import anyio
from anyio import BrokenResourceError, BusyResourceError, EndOfStream, WouldBlock

from ..._buffers.arguments import flat_view, positive, shown
from ..._buffers.errors import IdleTimeout, MessageTooLarge, ReadTimeout, about
from ..._buffers.reader import SCATTER, SHUT, Reader
from ..._buffers.wrapped import StreamSource
from ..._connection.endpoint import LONG

if TYPE_CHECKING:
    from anyio.abc import ByteStream
    from typing_extensions import Buffer

    from .engine import Engine
    from .output import Sink

#: Errors that mean no more input can be examined; idle in request mode, a connection is busy.
_NOTHING_THERE = (BrokenResourceError, BusyResourceError, EndOfStream, IdleTimeout, WouldBlock)


class Source(StreamSource):
    """Waits for plaintext; see the module, and ``Source`` of ``_buffers/reader.py``."""

    __slots__ = ("_engine", "_sink", "timeout")

    timeout: float | None
    """seconds for one call in all"""

    def __init__(self, engine: Engine, sink: Sink, stream: ByteStream) -> None:
        super().__init__(stream, engine.core.budget)
        self._engine = engine
        self._sink = sink
        self._chain = engine.chain
        self.timeout = None
        self.limits = engine.core.limits
        self.reader = sink.reader = Reader(self)

    # --- waiting ---------------------------------------------------------------------------------

    async def _before_reading(self) -> bool:
        self._engine.check()
        suspended = await self._checkpoint_if_due()
        if self._sink.stands_high:
            await self._sink.drain()
            suspended = True
        if suspended:
            self._engine.check()
        return suspended

    async def _wait(self, ready: Callable[[], int]) -> tuple[int, bool]:
        """Waits for a result; returns it, and whether the task was suspended."""
        if self._reading:
            raise BusyResourceError("reading from")
        self._reading = True
        reader, engine, writer = self.reader, self._engine, self._sink.writer
        try:
            self._settle()
            reader._end = SHUT  # keeps others out while this task waits
            suspended = await self._before_reading()
            while not (result := ready()):
                if engine.decrypt():
                    self._check_end(ready)
                    continue
                if writer._size:
                    self._sink.push()
                suspended = await engine.pull() or suspended
                engine.check()
            reader._budget = self.budget if suspended else reader._budget - 1
            return result, suspended
        finally:
            self._reading = False
            reader._end = max(reader._end, 0)

    def _check_end(self, ready: Callable[[], int]) -> None:
        if self._engine.ended and not ready():
            self._sink.push()  # answers to earlier input must not be lost
            self._engine.send_collected()
            raise self._end_of_stream()

    async def _within(self, ready: Callable[[], int]) -> tuple[int, bool]:
        timeout = self.timeout
        if timeout is None or timeout > LONG:
            return await self._wait(ready)
        with anyio.move_on_after(timeout):
            return await self._wait(ready)
        if self._sink.stands_high:
            raise self._engine.core._own(ReadTimeout(f"output not drained within {timeout} s"))
        with suppress(WouldBlock):  # data that came just as time ran out is returned
            return self._look(ready), True
        raise self._engine.core._own(ReadTimeout(f"not received within {timeout} s"))

    def _look(self, ready: Callable[[], int]) -> int:
        """Like :meth:`_wait`, but without waiting: raises ``WouldBlock``."""
        with self._entered():
            self._engine.check()
            while not (result := ready()):
                if not self._engine.arrived():
                    raise self._missing()
            return result

    async def receive(self, max_bytes: SupportsIndex) -> bytes:
        """At least one byte, copied; always a checkpoint."""
        most = positive(max_bytes, "max_bytes")
        hub = self._engine.core.hub
        try:
            suspended = await self.fill(1)
        except EndOfStream:  # a success, to code that turns it into b""
            await hub.checkpoint()
            raise
        if not suspended:
            with self._entered():  # before anything is taken: if cancelled, the input stays
                await hub.checkpoint()
            self._engine.check()
            self._open(1)
        reader = self.reader
        start = reader._start
        stop = min(start + most, reader._end)
        reader._start = stop
        return bytes(reader._view[start:stop])

    async def send(self, item: Buffer) -> None:
        """See ``Sink``: a stream asks the source of its reader."""
        await self._sink.send(item if type(item) is bytes else flat_view(item, "item"))

    # --- for the reader --------------------------------------------------------------------------

    def check_request(self, n: int) -> None:
        """:raises MessageTooLarge: if ``n`` exceeds the limit for a single request"""
        limit = self.limits.read_limit
        if n > limit:
            text = f"{shown(n)} bytes asked for; read_limit is {limit}"
            raise self._engine.core._own(MessageTooLarge(text))

    async def fill(self, n: int, flags: int = 0) -> bool:
        """See ``Source``."""
        _, suspended = await self._within(lambda: len(self._chain) >= n)
        if n and not flags & SCATTER:
            self._open(n)
        return suspended

    def fill_nowait(self, n: int, flags: int = 0) -> None:
        """See ``Source``."""
        self._look(lambda: len(self._chain) >= n)
        if n and not flags & SCATTER:
            self._open(n)

    async def find(self, delimiter: bytes, max_bytes: int) -> int:
        """See ``Source``."""
        length, _ = await self._within(lambda: self._found(delimiter, max_bytes))
        self._open(length)
        return length

    def find_nowait(self, delimiter: bytes, max_bytes: int) -> int:
        """See ``Source``."""
        length = self._look(lambda: self._found(delimiter, max_bytes))
        self._open(length)
        return length

    def _missing(self) -> Exception:
        return self._end_of_stream() if self._engine.ended else about(WouldBlock(), self.origin)

    @property
    def origin(self) -> int:
        """See ``Source``."""
        return self._engine.core.number

    def buffered(self) -> int:
        """Bytes not consumed, including those that have arrived and are not decrypted yet, as far
        as memory for them is allowed.
        """
        if self.closed or self._engine.core.closed:
            return 0
        if not self._reading:
            with suppress(*_NOTHING_THERE):
                while self._may_grow() and self._engine.arrived():
                    pass
        return super().buffered()

    def _may_grow(self) -> bool:
        high = len(self._chain) >= self.limits.read_high_water
        return not high and not self._sink.stands_high  # with what OpenSSL answers on its own

    @property
    def is_busy(self) -> bool:
        """Whether a task is reading."""
        return self._reading

    async def to_the_end(self) -> None:
        """Reads ahead until the peer has ended its side.

        :raises MessageTooLarge: if that is more than ``read_limit`` bytes
        """
        with self._entered():
            while not self._engine.ended:
                self._engine.check()
                self.check_request(len(self._chain))
                if not self._engine.decrypt():
                    await self._engine.pull()

    def shut(self) -> None:
        """From now on no call finds anything."""
        self.closed = True
        self._chain.clear()
        self.reader._close()
