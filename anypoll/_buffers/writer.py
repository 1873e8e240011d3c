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
        """The number of the connection that the bytes go to, if that is known."""

    async def flush(self) -> None:
        """See :meth:`Writer.flush`."""

    async def send(self, item: Piece) -> None:
        """Sends what the writer has pending, then ``item``."""

    def claim(self) -> None:
        """Makes the caller the only one who sends: others are told that it is busy.

        :raises BusyResourceError: if another one is sending
        """

    async def flush_claimed(self) -> None:
        """A ``flush()`` of the one who has claimed it."""

    def release(self) -> None:
        """Ends the claim. What is pending goes out as far as that needs no waiting."""

    def why_broken(self) -> Exception | None:
        """What a write would raise, if that is known without trying."""

    async def aclose(self) -> None:
        """Closes it."""

    def queued(self) -> int:
        """Bytes that were taken from the writer, and that the kernel has not taken yet."""

    def stand_high(self) -> None:
        """The writer has reached its high-water mark."""

    def why_unwritable(self) -> Exception:
        """What a write raises after the end."""


class Writer(BaseWriter):
    """The nocopy output of a connection: ``conn.writer``.

    Writes are plain functions into a buffer; nothing is sent before :meth:`flush`, or before the
    connection's reader has to wait, or the handler ends, or ``aclose()``. After the connection was
    closed or has broken every call raises what its streams raise.
    """

    __slots__ = ("_core",)

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
        """What may be sent, in one piece, and not pending any more."""
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
        """Bytes written and not yet taken by the kernel, an open reservation included."""
        return self._size + self._reserved_size + self._core.queued()

    def __bool__(self) -> bool:
        return True

    @property
    def buffered(self) -> int:
        """The same as ``len(writer)``."""
        return len(self)

    async def flush(self) -> None:
        """Returns when the kernel has everything that was written.

        :raises WriteTimeout: if that took longer than ``write_timeout``; what is left is pending
        :raises BrokenResourceError: with the ``OSError`` as its cause
        :raises ClosedResourceError: if the connection was or is closed
        :raises BusyResourceError: while another task is sending
        """
        await self._core.flush()
