"""UNIX socket connections: file descriptor passing (``SCM_RIGHTS``), and message sockets.

What the C side keeps of received descriptors, and for how long, is in csrc/fds.c. Here they are
sent, taken, and reported as passed over: when the reader is shown bytes that carry some, a token
follows in the next round of the event loop, and this code reports how far the reader has come.

A ``SOCK_SEQPACKET`` connection carries messages, not a stream, so its reader and writer refuse to
work: a message is received whole, in one call, or waits in the kernel.
"""

from __future__ import annotations

from errno import EBADF, EMSGSIZE
from operator import index
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex

from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import UNIXSocketStream

from .. import _epoll
from .._buffers.arguments import flat_view, positive
from .._buffers.errors import os_error, stream_error
from .._buffers.reader import SHUT
from .._epoll import FDS_MOST, MAIL_FDS, conn_report
from .core import Core
from .endpoint import AGAIN, deadline_after

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from typing_extensions import Buffer

    from .._buffers.chain import Piece


#: Message errors that no peer can cause: a descriptor to be sent is not open, or the message is
#: larger than the socket's buffer.
_CALLERS = frozenset({-EBADF, -EMSGSIZE})


class HasFileno(Protocol):
    """A file, a socket, or the like."""

    def fileno(self) -> int:
        """Its descriptor."""


def descriptors(fds: Iterable[Any]) -> list[int]:
    """The descriptor numbers to send, from integers or objects with a ``fileno()``.

    :raises TypeError: for anything else
    :raises ValueError: if there are none, one is closed, or there are more than a message can carry
    """
    try:
        numbers = [index(fd.fileno() if hasattr(fd, "fileno") else fd) for fd in fds]
    except TypeError as exc:
        raise TypeError(f"fds must be integers, or objects with a fileno(): {exc}") from None
    if not numbers:
        raise ValueError("fds must not be empty")
    if len(numbers) > FDS_MOST:
        raise ValueError(f"a message carries at most {FDS_MOST} fds, not {len(numbers)}")
    for number in numbers:
        if not 0 <= number < 2**31:
            raise ValueError(f"fds must be open file descriptors, not {number}")
    return numbers


def _is_at_least(least: int, value: object) -> bool:
    return isinstance(value, int) and value >= least


class UNIXCore(Core):
    """A UNIX stream connection."""

    __slots__ = ()

    def on_token(self, bits: int, value: int) -> None:
        """As for any connection; it also reports how far the reader has come."""
        if bits & MAIL_FDS and not self.closed:
            self._report()
        super().on_token(bits, value)

    def _report(self) -> None:
        if conn_report(self.handle, self.reader._start) > 0:
            self.reader._end = SHUT  # C is asked for the next bytes, and notifies again

    # --- receiving -------------------------------------------------------------------------------

    async def receive_fds(self, msglen: int, maxfds: int) -> tuple[bytes, list[int]]:
        """Takes the available bytes, and the descriptors that came with them. Always a checkpoint,
        before anything is taken.
        """
        self._check_plain("reading from")
        try:
            suspended = await self.fill(1)
        except EndOfStream:
            await self.hub.checkpoint()
            raise
        reader = self.reader
        if not suspended:
            self._reading, reader._end = True, SHUT
            try:
                await self.hub.checkpoint()
            finally:
                self._reading = False
            if self.closed:
                raise self._own(ClosedResourceError())
        message, fds = _epoll.take_fds(self.handle, reader._start, msglen, maxfds)
        reader._drop_view()
        return message, fds

    # --- sending ---------------------------------------------------------------------------------

    async def send_fds(self, message: Piece, fds: list[int]) -> None:
        """Sends the writer's pending output, then ``message`` with the descriptors."""
        self._check_plain("writing to")
        self._enter_writing()
        try:
            deadline = await self._begin_sending()
            self.writer._seal()
            if self.writer._size:
                left = self._send_pending()
                if left < 0:
                    raise self._write_error(left)
            try:
                sent = await self._send_once(message, fds, deadline)
            except BaseException:
                self._secure()  # the output that was pending
                raise
            if sent < len(message):
                await self._send_rest(message, sent, deadline)
        finally:
            self._writing = False

    async def _begin_sending(self) -> int:
        await self.hub.checkpoint()
        if self.closed:
            raise self._own(ClosedResourceError())
        return 0 if self.write_timeout is None else deadline_after(self.write_timeout)

    async def _send_once(self, message: Piece, fds: list[int], deadline: int) -> int:
        """Makes one system call, once all earlier output is gone and there is room."""
        while (sent := _epoll.send_fds(self.handle, message, fds)) == AGAIN:
            await self._drain(deadline, until_writable=True)
        if sent < 0:
            raise self._message_error(sent)
        return sent

    async def _send_rest(self, message: Piece, sent: int, deadline: int) -> None:
        """Sends the rest of a partly sent message, even if nobody waits any more. It is copied
        beforehand if the caller might change its memory then.
        """
        rest = memoryview(message)[sent:] if type(message) is bytes else bytes(message)[sent:]
        left = self._send([rest])
        if left < 0:
            raise self._write_error(left)
        if left:
            try:
                await self._drain(deadline)
            except BaseException:
                self._withdraw(b"")  # takes nothing back, but lets reading go on without it
                raise

    def _message_error(self, code: int) -> Exception:
        """The error to raise; the connection stays usable if only this message was at fault."""
        ended = _epoll.IS_CLOSED | _epoll.IS_BROKEN | _epoll.IS_SHUT
        if self.closed or _epoll.conn_status(self.handle) & ended:
            return self._write_error(code)
        if code not in _CALLERS:
            return self._own(stream_error(code))
        error = BrokenResourceError()
        error.__cause__ = os_error(code)
        return error


class MessageCore(UNIXCore):
    """A ``SOCK_SEQPACKET`` connection: messages instead of a stream."""

    __slots__ = ()

    async def receive(self, max_bytes: SupportsIndex) -> bytes:
        """The next message, truncated to ``max_bytes``."""
        message, _ = await self._receive_message(positive(max_bytes, "max_bytes"), 0)
        if not message:
            raise self._own(EndOfStream())
        return message

    async def receive_fds(self, msglen: int, maxfds: int) -> tuple[bytes, list[int]]:
        """The next message, with its descriptors."""
        return await self._receive_message(msglen, maxfds)

    async def _receive_message(self, size: int, most: int) -> tuple[bytes, list[int]]:
        self._enter_reading()
        deadline = 0 if self.read_timeout is None else deadline_after(self.read_timeout)
        try:
            await self.hub.checkpoint()
            while not self.closed:
                result = _epoll.receive_message(self.handle, size, most, deadline)
                if not isinstance(result, int):
                    return result
                if result != AGAIN:
                    raise self._read_error(result)
                if self.draining:
                    self._end_if_drained()
                try:
                    await self.hub.wait_read(self.number)
                except BaseException:
                    self._stop_waiting()
                    raise
            raise self._own(ClosedResourceError())
        finally:
            self._reading = False

    async def send(self, item: Buffer) -> None:
        """Sends a message; like AnyIO's streams, does not send an empty one."""
        await self.send_fds(flat_view(item, "item"), [])

    async def send_fds(self, message: Piece, fds: list[int]) -> None:
        """Sends a message: all of it, or nothing."""
        self._enter_writing()
        try:
            deadline = await self._begin_sending()
            if len(message):
                await self._send_once(message, fds, deadline)
        finally:
            self._writing = False

    # --- stream operations -----------------------------------------------------------------------

    def check_request(self, _n: int) -> None:
        """:raises ValueError: always"""
        raise _no_stream()

    async def fill(self, _n: int, _flags: int = 0) -> bool:
        """:raises ValueError: always"""
        raise _no_stream()

    def fill_nowait(self, _n: int, _flags: int = 0) -> None:
        """:raises ValueError: always"""
        raise _no_stream()

    async def find(self, _delimiter: bytes, _max_bytes: int) -> int:
        """:raises ValueError: always"""
        raise _no_stream()

    def find_nowait(self, _delimiter: bytes, _max_bytes: int) -> int:
        """:raises ValueError: always"""
        raise _no_stream()

    def why_unwritable(self) -> Exception:
        """The writer is shut from the beginning."""
        ended = self.closed or self.failure or _epoll.conn_status(self.handle) & _epoll.IS_SHUT
        return super().why_unwritable() if ended else _no_stream()


def _no_stream() -> ValueError:
    return ValueError(
        "a SOCK_SEQPACKET connection has messages, not a stream: use receive() and send()"
    )


class DescriptorStream(UNIXSocketStream):
    """What a UNIX socket connection has beyond other connections."""

    __slots__ = ()

    _core: Any  # a UNIXCore

    async def send_fds(self, message: Buffer, fds: Collection[int | HasFileno]) -> None:
        """Sends the writer's pending output, then ``message`` with copies of file descriptors. A
        checkpoint.

        Returns when the kernel has everything. The descriptors travel with the first bytes; if the
        call is cancelled or times out after those, the rest of ``message`` still goes out.

        :param message: bytes, or anything bytes-like
        :param fds: numbers, or objects with a ``fileno()``; at most 253 (unix(7)). They must stay
            open until the call returns
        :raises ValueError: if ``message`` or ``fds`` is empty, or one of ``fds`` is not open
        :raises TypeError: if one of ``fds`` is anything else
        :raises BrokenResourceError: as :meth:`Connection.send`; also, with the connection still
            usable, if the kernel refuses the descriptors (``EBADF``, ``ETOOMANYREFS``) or the size
            of a message (``EMSGSIZE``), which is the cause
        :raises WriteTimeout, ClosedResourceError, BusyResourceError: as :meth:`Connection.send`
        """
        if type(message) is not bytes:
            message = flat_view(message, "message")
        if not message:
            raise ValueError("message must not be empty")
        if not fds:
            raise ValueError("fds must not be empty")
        await self._core.send_fds(message, descriptors(fds))

    async def receive_fds(self, msglen: int, maxfds: int) -> tuple[bytes, list[int]]:
        """Receives bytes as soon as there are any, and the file descriptors that came with them.
        The caller must close those; they are close-on-exec. A checkpoint.

        The bytes returned end with those that descriptors came with. Descriptors whose bytes were
        taken by any other call have been closed.

        :param msglen: how many bytes at most; with 0 it still waits, and takes none
        :param maxfds: how many descriptors at most; any others are closed
        :raises ValueError: if ``msglen`` is negative, or ``maxfds`` is not positive
        :raises EndOfStream: when the peer has ended its side
        :raises ReadTimeout, BrokenResourceError, ClosedResourceError: as :meth:`Connection.receive`
        :raises BusyResourceError: while another task is reading
        """
        if not _is_at_least(0, msglen):
            raise ValueError("msglen must be a non-negative integer")
        if not _is_at_least(1, maxfds):
            raise ValueError("maxfds must be a positive integer")
        result: tuple[bytes, list[int]] = await self._core.receive_fds(msglen, maxfds)
        return result
