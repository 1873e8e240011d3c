"""What a reader and a writer have for a source and a sink while they have no connection."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, SupportsIndex

from anyio import BusyResourceError, ClosedResourceError

from .._buffers.arguments import positive
from .._buffers.errors import about
from .._buffers.wrapped import StreamSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Buffer

    from .._buffers.reader import Reader
    from .._buffers.writer import Writer
    from .._connection.core import Core
    from .._connection.stream import Connection


class _Unwritable:
    """The base class of sinks that take nothing; see ``Sink``. The writer is shut."""

    __slots__ = ()

    def why_unwritable(self) -> Exception:
        """What a write raises."""
        raise NotImplementedError

    async def send(self, _item: Buffer) -> None:
        """Refuses."""
        raise self.why_unwritable()

    async def flush(self) -> None:
        """Refuses."""
        raise self.why_unwritable()

    def claim(self) -> None:
        """Refuses."""
        raise self.why_unwritable()

    async def flush_claimed(self) -> None:
        """Refuses."""
        raise self.why_unwritable()

    def release(self) -> None:
        """Does nothing: nobody can have claimed it since."""

    def why_broken(self) -> Exception | None:
        """What a write raises."""
        return self.why_unwritable()

    def queued(self) -> int:
        """0: nothing was taken."""
        return 0

    def stand_high(self) -> None:
        """Does nothing: nothing is written."""


class Parked(_Unwritable):
    """For the reader and the writer of a connection while its core has a TLS session: it refuses
    all use. The timeouts are only kept.
    """

    __slots__ = ("_core", "budget", "limits", "read_timeout", "write_timeout")

    read_timeout: float | None
    write_timeout: float | None

    def __init__(self, core: Core) -> None:
        self._core = core
        self.budget = core.budget
        self.limits = core.limits
        self.read_timeout = self.write_timeout = None

    @property
    def closed(self) -> bool:
        """Whether the connection is closed."""
        return self._core.closed

    @property
    def origin(self) -> int:
        """See ``Source``."""
        return self._core.number

    def _busy(self, action: str) -> Exception:
        return self._core._closed_error() if self._core.closed else BusyResourceError(action)

    def why_unwritable(self) -> Exception:
        """The session writes there."""
        return self._busy("writing to")

    async def fill(self, _n: int, _flags: int = 0) -> bool:
        """Refuses."""
        raise self._busy("reading from")

    def fill_nowait(self, _n: int, _flags: int = 0) -> None:
        """Refuses."""
        raise self._busy("reading from")

    async def find(self, _delimiter: bytes, _max_bytes: int) -> int:
        """Refuses."""
        raise self._busy("reading from")

    def find_nowait(self, _delimiter: bytes, _max_bytes: int) -> int:
        """Refuses."""
        raise self._busy("reading from")

    async def receive(self, _max_bytes: SupportsIndex) -> bytes:
        """Refuses."""
        raise self._busy("reading from")

    def take_parts(self, _n: int) -> list[memoryview]:
        """Refuses."""
        raise self._busy("reading from")

    def consume(self, n: int) -> None:
        """Nothing is there, so nothing is consumed."""

    def buffered(self) -> int:
        """0: what has come is the session's."""
        return 0

    def check_request(self, n: int) -> None:
        """:raises MessageTooLarge: as the connection does"""
        self._core.check_request(n)

    async def aclose(self) -> None:
        """Closes the connection."""
        await self._core.aclose()


class Left(_Unwritable, StreamSource):
    """For the reader and the writer of a TLS connection after the end of its session: what was not
    read by then can still be.
    """

    __slots__ = ("read_timeout", "write_timeout")

    def __init__(
        self, connection: Connection, reader: Reader, writer: Writer, unread: Iterable[memoryview]
    ) -> None:
        core = connection._core
        super().__init__(connection, core.budget)
        for view in unread:
            self._chain.append(view)
        self._ended = True
        self.limits = core.limits
        self.read_timeout = core.read_timeout
        self.write_timeout = core.write_timeout
        self.reader = reader
        reader._core = self
        self._settle()
        writer._close()
        writer._core = self

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if self.closed:
            raise self.why_unwritable()
        with super()._entered():
            yield

    def why_unwritable(self) -> Exception:
        """This side has ended, if nothing else."""
        return about(ClosedResourceError(), self.origin)

    async def receive(self, max_bytes: SupportsIndex) -> bytes:
        """See AnyIO's streams."""
        most = positive(max_bytes, "max_bytes")
        self.reader._budget = 0  # a checkpoint is due
        await self.fill(1)
        reader = self.reader
        start = reader._start
        reader._start = stop = min(start + most, reader._end)
        return bytes(reader._view[start:stop])

    def shut(self, writer: Writer) -> None:
        """From now on nothing is found."""
        self.closed = True
        self._chain.clear()
        self.reader._close()
        writer._close()
