"""The nocopy writer, over any sink for bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, Protocol

from .linkbuffer import BaseWriter

if TYPE_CHECKING:
    from .arguments import Limits
    from .chain import Piece


class Sink(Protocol):
    """Where a writer's bytes go: a connection's ``Core``, or a wrapped stream."""

    limits: Limits

    @property
    def origin(self) -> int | None:
        """The number of the connection that the bytes go to, if known."""

    async def flush(self) -> None:
        """See :meth:`Writer.flush`."""

    async def send(self, item: Piece) -> None:
        """Sends the writer's pending output, then ``item``."""

    def claim(self) -> None:
        """Makes the caller the only sender: to others the sink is busy.

        :raises BusyResourceError: if another task is sending
        """

    async def flush_claimed(self) -> None:
        """``flush()`` for the holder of the claim."""

    def release(self) -> None:
        """Ends the claim. Pending output goes out as far as possible without waiting."""

    def why_broken(self) -> Exception | None:
        """What a write would raise, if known without trying."""

    async def aclose(self) -> None:
        """Closes the sink."""

    def queued(self) -> int:
        """Bytes taken from the writer that the kernel has not taken yet."""

    def stand_high(self) -> None:
        """The writer has reached its high-water mark."""

    def why_unwritable(self) -> Exception:
        """What a write raises after the end."""


class Writer(BaseWriter):
    """The nocopy output of a connection: ``conn.writer``.

    Writes are plain functions that fill a buffer. Nothing is sent until :meth:`flush`, until the
    connection's reader has to wait, until the handler ends, or until ``aclose()``. Once the
    connection is closed or broken, every call raises what its streams raise.
    """

    __slots__ = ()

    _core: Sink

    def __init__(self, core: Sink) -> None:
        if not hasattr(core, "limits"):
            kind = type(core).__name__
            raise TypeError(f"a writer is a connection's, or made by wrap_writer(), not of {kind}")
        super().__init__(core.limits.write_high_water)
        self._core = core

    def _refuse(self) -> NoReturn:
        raise self._core.why_unwritable()

    def _stands_high(self) -> None:
        self._core.stand_high()

    def _take_joined(self) -> bytes:
        """Removes and returns the output that may be sent, in one piece."""
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces = []
        self._size = 0
        if len(pieces) == 1:
            piece = pieces[0]
            return piece if type(piece) is bytes else bytes(piece)
        return b"".join(pieces)

    def __len__(self) -> int:
        """Bytes written and not yet taken by the kernel, including an open reservation."""
        return self._size + self._reserved_size + self._core.queued()

    def __bool__(self) -> bool:
        return True

    @property
    def buffered(self) -> int:
        """The same as ``len(writer)``."""
        return len(self)

    if TYPE_CHECKING:  # it is native

        async def flush(self) -> None:
            """See csrc/python/writer.c."""
