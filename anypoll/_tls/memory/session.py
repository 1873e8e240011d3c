"""The parts of such a session, together; see ``Session``."""

from __future__ import annotations

import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream

from ..._buffers.errors import IdleTimeout, ReadTimeout
from ..._connection.endpoint import LONG
from ..session import NO_HANDSHAKE, TLSHandshake, closing_time, reads_to_close, within
from .engine import Engine
from .input import Source
from .output import Sink

if TYPE_CHECKING:
    from anyio.abc import ByteStream

    from ..._buffers.reader import Reader
    from ..._buffers.writer import Writer
    from ..._connection.core import Core

#: Errors that end a closing handshake early: the peer has gone, or someone else has closed.
_GONE = (BrokenResourceError, ClosedResourceError, EndOfStream, IdleTimeout, ssl.SSLError)


class MemorySession:
    """OpenSSL between two memory BIOs; see ``Session``."""

    __slots__ = ("engine", "handshake", "sink", "source")

    native = False

    def __init__(
        self,
        core: Core,
        stream: ByteStream,
        ssl_object: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        standard_compatible: bool,
    ) -> None:
        self.engine = Engine(core, ssl_object, incoming, outgoing, standard_compatible)
        self.sink = Sink(self.engine, stream)
        self.source = Source(self.engine, self.sink, stream)

    @property
    def ssl(self) -> ssl.SSLObject:
        """The session's object, as it is."""
        return self.engine.ssl

    @property
    def reader(self) -> Reader:
        """See ``Session``."""
        return self.source.reader

    @property
    def writer(self) -> Writer:
        """See ``Session``."""
        return self.sink.writer

    @property
    def read_timeout(self) -> float | None:
        """Seconds for one reader call in all."""
        return self.source.timeout

    @read_timeout.setter
    def read_timeout(self, value: float | None) -> None:
        self.source.timeout = value

    @property
    def write_timeout(self) -> float | None:
        """Seconds for one ``send()`` or ``flush()``."""
        return self.sink.timeout

    @write_timeout.setter
    def write_timeout(self, value: float | None) -> None:
        self.sink.timeout = value

    @property
    def closed(self) -> bool:
        """See ``Session``."""
        return self.engine.closed

    @property
    def is_reading(self) -> bool:
        """See ``Session``."""
        return self.source.is_busy

    @property
    def is_broken(self) -> bool:
        """See ``Session``."""
        return self.engine.failure is not None

    @property
    def has_ended(self) -> bool:
        """See ``Session``."""
        return self.engine.ended

    async def shake_hands(self, timeout: float | None) -> None:
        """See ``Session``."""
        core = self.engine.core
        await within(core, timeout, self._shake_hands, ReadTimeout, NO_HANDSHAKE)

    async def _shake_hands(self) -> None:
        engine, began = self.engine, time.monotonic()
        await engine.run(engine.ssl.do_handshake)
        await engine.core.flush()
        engine.established = True
        self.handshake = TLSHandshake(time.monotonic() - began, bool(engine.ssl.session_reused))

    async def send_eof(self) -> None:
        """See ``Session``."""
        await self.sink.send_eof()

    async def to_the_end(self) -> None:
        """See ``Session``."""
        await self.source.to_the_end()

    async def part(self) -> bytes:
        """See ``Session``."""
        self.engine.core.draining = self.engine.ending
        return self.engine.leftover()

    async def close(self, *, wait: bool) -> None:
        """See ``Session``."""
        with reads_to_close(self.engine.core):
            await self._say_goodbye(closing_time(self.write_timeout), wait=wait)

    async def _say_goodbye(self, timeout: float, *, wait: bool) -> None:
        self.engine.closed = self.sink.writer._shut = True
        with anyio.move_on_after(min(timeout, LONG)), suppress(*_GONE):
            await self.sink.close(wait=wait)

    async def finish(self, timeout: float) -> None:
        """See ``Session``."""
        deadline = anyio.current_time() + timeout
        if not self.engine.closed:
            await self._say_goodbye(timeout, wait=False)
        await self.engine.core.finish(max(deadline - anyio.current_time(), 0))

    def shut(self) -> None:
        """See ``Session``."""
        self.engine.closed = True
        self.source.shut()
        self.sink.writer._close()
