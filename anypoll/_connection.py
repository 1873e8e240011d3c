"""One registered descriptor: filling the reader, flushing the writer, and the order of closing.

:class:`Core` is what a connection is made of without its public surface: the handle of the C side,
the guards, the waits. The classes in ``streams`` and ``nocopy`` are faces of it.

Reading. The reader walks in a window of the C side's first block without calling C. When the window
does not do, :meth:`Core.fill` asks C, which looks at what is buffered, reads the socket if that is
known to be readable, and otherwise arms a wait. The question is asked again after the wake-up, from
the start, until it is answered: so cancellation loses nothing, a wake-up needs no payload, and a
timeout that has come together with the data gives the data.

The gate. A waiting reader, a close, output above high water and a spent checkpoint budget must all
stop the reader's fast path. They do it by ``reader._end = SHUT``, which no request can meet; the
next call of C opens it again.

Output. What the writer has pending is handed to C together with the wait, in one call. What the
kernel does not take at once stays in C's queue by reference; ``hub.outputs`` keeps the objects.
"""

from __future__ import annotations

import socket
import struct
import time
import warnings
import weakref
from errno import EAGAIN, EBADF, ECONNRESET, EPIPE, ETIMEDOUT
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import (
    BusyResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
)

from . import _epoll, _runtime
from ._epoll import (
    EDELIM,
    EEOF,
    EIDLE,
    EQUEUED,
    MAIL_IDLE,
    MAIL_TRIM,
    NEW_BLOCK,
    NOWAIT,
    SCATTER,
    conn_buffered,
    conn_find,
    conn_queued,
    conn_read,
    conn_want,
    conn_write,
)
from ._errors import IdleTimeout, MessageTooLarge, ReadTimeout, WriteTimeout, os_error, stream_error

if TYPE_CHECKING:
    from ._config import Limits
    from ._epoll import Conn, Piece
    from ._hub import Hub
    from .nocopy import Reader, Writer

_AGAIN = -EAGAIN
_WAITING = frozenset({_AGAIN, EQUEUED})  # the wait is armed
SHUT = -1  # an end of the window that no request can meet
_VECTORED = 16 * 1024  # output from here on is sent piece by piece instead of being joined


#: The attribute that says which connection an exception is about.
ORIGIN = "_anypoll_connection"

_E = TypeVar("_E", bound=Exception)


def deadline_after(timeout: float | None) -> int:
    """The nanosecond of ``CLOCK_MONOTONIC`` at which ``timeout`` seconds are over; 0: never."""
    if timeout is None or timeout > 1e9:
        return 0
    return time.monotonic_ns() + int(timeout * 1e9)


class Core:
    """See the module. ``fd`` is owned from the call on, also if it fails."""

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_flushing",
        "_owner",
        "_reading",
        "_writing",
        "budget",
        "closed",
        "draining",
        "failure",
        "handle",
        "hub",
        "kind",
        "limits",
        "name",
        "number",
        "on_end",
        "peer",
        "raw",
        "read_timeout",
        "reader",
        "write_timeout",
        "writer",
    )

    reader: Reader
    writer: Writer
    hub: Hub
    handle: Conn
    number: int
    """by which tokens name the connection"""
    kind: int
    limits: Limits
    budget: int
    read_timeout: float | None
    write_timeout: float | None
    peer: bytes | None
    """the peer's address, if accept4 has told it"""
    raw: socket.socket | None
    """the descriptor as a Python socket, which owns it then"""
    closed: bool
    draining: bool
    """a wait with nothing buffered ends as if the peer had ended"""
    failure: int
    """the first error of the socket that was seen"""
    name: str

    def __init__(self, fd: int, kind: int, limits: Limits, *, peer: bytes | None = None) -> None:
        self.closed = True  # until there is something to close
        try:
            hub = self.hub = _runtime.current_hub()
            self._owner = _epoll.open_connection(
                _runtime.pick_poller(), hub.handle, fd, kind, limits.read_high_water
            )
        except BaseException:
            _epoll.fd_close(fd)
            raise
        self.handle = _epoll.bare(self._owner)
        self.kind = kind
        self.limits = limits
        self.number = _epoll.conn_id(self.handle)
        self.budget = _runtime.settings().checkpoint_budget
        self.read_timeout = limits.read_timeout
        self.write_timeout = limits.write_timeout
        self.peer = peer
        self.raw = None
        self.closed = self.draining = False
        self.failure = 0
        self.name = ""
        self._reading = self._writing = self._flushing = False
        self._abandoned = False  # what is queued is the rest of a send that was given up
        hub.endpoints[self.number] = weakref.ref(self)

    def register(self) -> None:
        """Has the descriptor watched.

        :raises OSError: ``ENOSPC``, ``ENOMEM``; the connection is closed then
        """
        [result] = _epoll.register([self.handle])
        if result < 0:
            self.close()
            raise os_error(result)

    def __del__(self) -> None:
        if not self.closed:
            what = self.name or "connection"
            warnings.warn(f"unclosed {what}", ResourceWarning, stacklevel=1, source=self)
            self.close()

    # --- what the hub tells ----------------------------------------------------------------------

    def on_token(self, bits: int, _error: int) -> None:
        """Called by the hub for what is not the end of a wait."""
        if bits & MAIL_TRIM and not self.closed:
            self.reader._drop_view()
        if bits & MAIL_IDLE:
            self.reader._end = SHUT
            self.hub.wake_writers(self.number)

    def on_hub_end(self) -> None:
        """The event loop has ended: C has closed the descriptor, unless Python owned it."""
        self.closed = True
        self.reader._end = SHUT
        self._close_raw()

    # --- errors ----------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self.closed:
            raise self._own(ClosedResourceError())
        self.hub.check()

    def _own(self, exc: _E) -> _E:
        """Marks an exception as this connection's, so that a server can tell a peer that has gone
        from a handler that has lost something else.
        """
        exc.__dict__[ORIGIN] = self.number
        return exc

    def _read_error(self, code: int) -> Exception:
        if self.closed or code == -EBADF:
            return self._own(ClosedResourceError())
        if code == EEOF:
            buffered = conn_buffered(self.handle, self.reader._start)
            return self._own(IncompleteRead() if buffered > 0 else EndOfStream())
        if code == -ETIMEDOUT:
            return self._own(ReadTimeout(f"not received within {self.read_timeout} s"))
        return self._fail(code)

    def _write_error(self, code: int) -> Exception:
        if self.closed:
            return self._own(ClosedResourceError())
        if code == -ETIMEDOUT:
            return self._own(WriteTimeout(f"not sent within {self.write_timeout} s"))
        if _epoll.conn_status(self.handle) & _epoll.IS_SHUT:
            return self._own(ClosedResourceError())  # after send_eof(), as Trio has it
        return self._fail(code)

    def _fail(self, code: int) -> Exception:
        """The connection has broken: no write is taken from now on."""
        self.failure = self.failure or code
        self.writer._shut = True
        if code == EIDLE:
            return self._own(IdleTimeout("the connection was idle for too long"))
        return self._own(stream_error(code))

    def why_unwritable(self) -> Exception:
        """What a write raises once ``writer._shut`` is set."""
        return self._write_error(self.failure or -EPIPE)

    def status(self) -> int:
        """The ``IS_*`` bits of now; a connection that turns out to be broken is so for writes."""
        if self.closed:
            return _epoll.IS_CLOSED
        status = _epoll.conn_status(self.handle)
        if status & _epoll.IS_BROKEN and not self.failure:
            self._fail(EIDLE if status & _epoll.IS_IDLE_END else -ECONNRESET)
        return status

    # --- reading ---------------------------------------------------------------------------------

    def check_request(self, n: int) -> None:
        """:raises MessageTooLarge: if ``n`` is above the limit for a single request"""
        if n > self.limits.read_limit:
            limit = self.limits.read_limit
            raise self._own(MessageTooLarge(f"{n} bytes asked for; read_limit is {limit}"))

    def _show(self) -> None:
        """Opens the window on a block that is new."""
        reader, view = self.reader, self.hub.view
        memory = _epoll.show_block(self.handle, reader._start, view)
        if memory is not None:
            reader._view = memory
        reader._start = view.start
        reader._end = view.end

    async def fill(self, n: int, flags: int = 0) -> bool:
        """Waits for ``n`` unread bytes, and opens the window on them unless ``SCATTER``. Returns
        whether the task was suspended.

        One coroutine, and not divided: every request that has to wait comes through here, and each
        frame more costs it 100 ns.

        :raises EndOfStream, IncompleteRead: if the peer has ended before
        :raises ReadTimeout: after ``read_timeout``
        :raises BrokenResourceError, ClosedResourceError, BusyResourceError: as AnyIO's streams
        """
        if self._reading:
            raise BusyResourceError("reading from")
        if self.closed:
            raise self._own(ClosedResourceError())
        reader, writer, hub, handle = self.reader, self.writer, self.hub, self.handle
        deadline = 0 if self.read_timeout is None else deadline_after(self.read_timeout)
        reader._budget -= 1
        self._reading = True
        suspended = False
        try:
            if reader._budget < 0 or writer._size >= _VECTORED or self.number in hub.outputs:
                suspended = await self._before_reading(deadline)
            while True:
                if writer._size:
                    output = self._take_small()
                    result = conn_read(
                        handle, reader._start, n, flags, deadline, output, len(output)
                    )
                    if result != _AGAIN and output:
                        self._after_output(result, output)
                elif deadline or flags:
                    result = conn_read(handle, reader._start, n, flags, deadline, b"", 0)
                else:
                    result = conn_want(handle, reader._start, n)
                if result >= 0:
                    if not suspended:
                        hub.check()
                    if n and not flags & SCATTER:
                        if result & NEW_BLOCK:
                            self._show()
                            result &= NEW_BLOCK - 1
                        reader._end = result
                    return suspended
                if result not in _WAITING:
                    raise self._read_error(result)
                if self.draining:
                    self._end_if_drained()
                reader._end = SHUT
                try:
                    await hub.wait_read(self.number)
                except BaseException:  # cancelled: nothing was consumed, the buffer has it all
                    self._stop_waiting()
                    raise
                if self.closed:
                    raise self._own(ClosedResourceError())
                reader._budget = self.budget
                suspended = True
        finally:
            self._reading = False

    def fill_nowait(self, n: int, flags: int = 0) -> None:
        """As :meth:`fill`, at once or not at all.

        :raises WouldBlock: if the bytes are not there
        """
        self._enter_reading()
        self._reading = False
        result = conn_read(self.handle, self.reader._start, n, flags | NOWAIT, 0, b"", 0)
        if result == _AGAIN:
            raise anyio.WouldBlock
        if result < 0:
            raise self._read_error(result)
        if not flags & SCATTER and n:
            if result & NEW_BLOCK:
                self._show()
            self.reader._end = result & (NEW_BLOCK - 1)

    def _enter_reading(self) -> None:
        if self._reading:
            raise BusyResourceError("reading from")
        self._check_usable()
        self._reading = True

    async def find(self, delimiter: bytes, max_bytes: int) -> int:
        """Waits for the delimiter; the number of bytes through it, with the window open on them.

        :raises DelimiterNotFound: if it is not within the first ``max_bytes``
        """
        self._enter_reading()
        reader, writer, hub, handle = self.reader, self.writer, self.hub, self.handle
        deadline = 0 if self.read_timeout is None else deadline_after(self.read_timeout)
        size = len(delimiter)
        reader._budget -= 1
        try:
            if reader._budget < 0 or writer._size >= _VECTORED or self.number in hub.outputs:
                await self._before_reading(deadline)
            while True:
                output = self._take_small() if writer._size else b""
                start = reader._start
                result = conn_find(
                    handle, start, delimiter, size, max_bytes, 0, deadline, output, len(output)
                )
                if output and result != _AGAIN:
                    self._after_output(result, output)
                if result not in _WAITING:
                    return self._found(result, max_bytes)
                if self.draining:
                    self._end_if_drained()
                reader._end = SHUT
                try:
                    await hub.wait_read(self.number)
                except BaseException:
                    self._stop_waiting()
                    raise
                if self.closed:
                    raise self._own(ClosedResourceError())
                reader._budget = self.budget
        finally:
            self._reading = False

    def find_nowait(self, delimiter: bytes, max_bytes: int) -> int:
        """As :meth:`find`, at once or not at all.

        :raises WouldBlock: if the delimiter is not there
        """
        self._enter_reading()
        self._reading = False
        size = len(delimiter)
        result = conn_find(
            self.handle, self.reader._start, delimiter, size, max_bytes, NOWAIT, 0, b"", 0
        )
        if result == _AGAIN:
            raise anyio.WouldBlock
        return self._found(result, max_bytes)

    def _found(self, result: int, max_bytes: int) -> int:
        if result == EDELIM:
            raise self._own(DelimiterNotFound(max_bytes))
        if result < 0:
            raise self._read_error(result)
        length = result & (NEW_BLOCK - 1)
        reader = self.reader
        if result & NEW_BLOCK:
            self._show()
        if reader._start + length > reader._end:
            end = conn_read(self.handle, reader._start, length, NOWAIT, 0, b"", 0)
            reader._end = end & (NEW_BLOCK - 1)
        return length

    async def _before_reading(self, deadline: int) -> bool:
        """What must happen before a reader call may look: output above high water must drain, and a
        checkpoint is taken if it is time for one. Returns whether the task was suspended.
        """
        reader = self.reader
        suspended = await self._bound_output(deadline)
        if reader._budget < 0 and not suspended:
            await self.hub.checkpoint()
            suspended = True
        if suspended:
            reader._budget = self.budget
            if self.closed:
                raise self._own(ClosedResourceError())
        return suspended

    def _end_if_drained(self) -> None:
        """The server is ending: a wait with nothing buffered does not begin."""
        if conn_buffered(self.handle, self.reader._start) == 0:
            _epoll.conn_disarm_read(self.handle)
            raise self._own(EndOfStream())

    def _stop_waiting(self) -> None:
        self.hub.readers.pop(self.number, None)
        _epoll.conn_disarm_read(self.handle)

    async def receive(self, max_bytes: int) -> bytes:
        """At least one byte, copied; always a checkpoint.

        :raises EndOfStream: when the peer has ended
        """
        reader = self.reader
        if not await self.fill(1):
            # a checkpoint before anything is taken: cancelled, it stays
            self._reading, end, reader._end = True, reader._end, SHUT
            try:
                await self.hub.checkpoint()
            finally:
                self._reading = False
            if self.closed:
                raise self._own(ClosedResourceError())
            reader._end = end
        start = reader._start
        stop = min(start + max_bytes, reader._end)
        reader._start = stop
        return bytes(reader._view[start:stop])

    def end_if_idle(self) -> None:
        """From now on a wait with nothing buffered, the present one too, sees the end of stream."""
        self.draining = True
        self.hub.wake_reader(self.number)

    @property
    def idle(self) -> bool:
        """Whether a reader waits with nothing unread and nothing unsent."""
        return (
            self.number in self.hub.readers
            and not self.writer._size
            and conn_queued(self.handle) <= 0
            and conn_buffered(self.handle, self.reader._start) == 0
        )

    # --- writing ---------------------------------------------------------------------------------

    def _keep(self, pieces: list[Piece]) -> None:
        """Keeps alive what C has queued, until it says that it is done."""
        outputs = self.hub.outputs
        if self.number in outputs:
            outputs[self.number].extend(pieces)
        else:
            outputs[self.number] = pieces
            self._abandoned = False

    def _take_small(self) -> bytes:
        """The writer's pending output in one piece, to go along with a read call; nothing if it is
        too much for that, and was sent by itself.
        """
        writer = self.writer
        if writer._size < _VECTORED:
            return writer._take_joined()
        self._send(writer._take())
        return b""

    def _after_output(self, result: int, output: bytes) -> None:
        """``output`` went along with a read call; C sends it only when it has to wait."""
        if result == EQUEUED:
            self._keep([output])
        elif result != _AGAIN:
            self.writer._put_back(output)

    def _send(self, pieces: list[Piece]) -> int:
        """Sends; the bytes queued, or a negative code."""
        if len(pieces) == 1 and type(pieces[0]) is bytes:
            left = conn_write(self.handle, pieces[0], len(pieces[0]))
        else:
            left = _epoll.conn_send(self.handle, pieces)
        if left > 0:
            self._keep(pieces)
        return left

    def _enter_writing(self) -> None:
        if self._writing:
            raise BusyResourceError("writing to")
        self._check_usable()
        self._writing = True

    async def flush(self) -> None:
        """Returns when the kernel has all that was written.

        :raises WriteTimeout: after ``write_timeout``; what is left is still pending
        """
        self._enter_writing()
        try:
            self.writer._seal()
            await self._flush()
        finally:
            self._writing = False

    async def _flush(self) -> None:
        deadline = deadline_after(self.write_timeout) if self.write_timeout is not None else 0
        if self.writer._size:
            left = self._send(self.writer._take())
        else:
            left = conn_queued(self.handle)
        if left < 0:
            raise self._write_error(left)
        if left:
            await self._drain(deadline)
            return
        self.reader._budget -= 1
        if self.reader._budget < 0:
            await self.hub.checkpoint()
            self.reader._budget = self.budget

    async def _drain(self, deadline: int, *, until_writable: bool = False) -> None:
        """Waits until C's queue is empty."""
        while True:
            result = _epoll.conn_drain(self.handle, until_writable, deadline)
            if result == 0:
                self._abandoned = False
                return
            if result != _AGAIN:
                raise self._write_error(result)
            try:
                await self.hub.wait_write(self.number)
            except BaseException:
                if self.number not in self.hub.writers:
                    _epoll.conn_disarm_write(self.handle)
                raise
            self.reader._budget = self.budget
            if self.closed:
                raise self._own(ClosedResourceError())

    async def send(self, item: Piece) -> None:
        """Sends what the writer has pending, then ``item``; returns when the kernel has it all.

        Always a checkpoint, taken first. If it is cancelled or times out before a byte of ``item``
        was sent, none ever will be; else the rest is copied and goes out before anything later.
        """
        self._enter_writing()
        try:
            await self.hub.checkpoint()
            if self.closed:
                raise self._own(ClosedResourceError())
            deadline = deadline_after(self.write_timeout) if self.write_timeout is not None else 0
            if self.number in self.hub.outputs:
                await self._drain(deadline)
            self.writer._seal()
            pieces = self.writer._take()
            if len(item):
                pieces.append(item)
            left = self._send(pieces) if pieces else 0
            if left < 0:
                raise self._write_error(left)
            if left:
                try:
                    await self._drain(deadline)
                except BaseException:
                    self._withdraw(item)
                    raise
        finally:
            self._writing = False

    def _withdraw(self, item: Piece) -> None:
        """``item`` is not waited for any more: takes it out of the queue if nothing of it was
        sent, else copies its rest, since the caller may change it from now on.
        """
        left = _epoll.conn_hold(self.handle) if not self.closed else 0
        if left <= 0:
            return
        self._abandoned = True
        rest: list[Piece] = []
        for piece in reversed(self.hub.outputs[self.number]):
            size = min(len(piece), left)
            left -= size
            if piece is not item:
                rest.append(memoryview(piece)[len(piece) - size :])
            elif size < len(piece):
                rest.append(bytes(memoryview(piece)[len(piece) - size :]))
            if left == 0:
                break
        rest = [piece for piece in reversed(rest) if len(piece)]
        if rest:
            self.hub.outputs[self.number] = rest
        _epoll.conn_requeue(self.handle, rest)
        if not rest:
            self.hub.outputs.pop(self.number, None)

    async def _bound_output(self, deadline: int) -> bool:
        """Keeps the output of a peer that does not read from growing: above high water it must
        drain before a reader call goes on. Not what another task is sending, or duplex protocols
        would deadlock. Returns whether the task was suspended.
        """
        queued = max(conn_queued(self.handle), 0)
        if self._writing or queued + self.writer._size < self.limits.write_high_water:
            return False
        left = self._send(self.writer._take()) if self.writer._size else queued
        self.reader._end = SHUT
        if left <= 0:
            return False  # sent, or broken: the reader may go on, the writer will be told
        try:
            await self._drain(deadline)
        except WriteTimeout:
            raise self._own(ReadTimeout("pending output did not drain in time")) from None
        except (anyio.BrokenResourceError, IdleTimeout):
            pass
        return True

    async def wait_writable(self) -> None:
        """Until a send would probably not block."""
        self._enter_writing()
        try:
            await self.hub.checkpoint()
            await self._drain(0, until_writable=True)
        finally:
            self._writing = False

    async def send_eof(self) -> None:
        """Flushes, then ends this side. Idempotent."""
        self._enter_writing()
        try:
            await self.hub.checkpoint()
            if self.closed:
                raise self._own(ClosedResourceError())
            self.writer._seal()
            if not _epoll.conn_status(self.handle) & _epoll.IS_SHUT:
                await self._flush()
                result = _epoll.conn_shutdown(self.handle)
                if result < 0:
                    raise self._write_error(result)
                self.writer._shut = True
        finally:
            self._writing = False

    # --- the end ---------------------------------------------------------------------------------

    def raw_socket(self) -> socket.socket:
        """The descriptor as a Python socket, made on first use; always the same object."""
        if self.raw is None:
            fd = _epoll.conn_fd(self.handle, 1)
            if fd < 0:
                raise self._own(ClosedResourceError())
            self.adopt_raw(socket.socket(fileno=fd))
        assert self.raw is not None
        return self.raw

    def adopt_raw(self, sock: socket.socket) -> None:
        """Has the descriptor closed through ``sock``, which owns it."""
        _epoll.conn_fd(self.handle, 1)
        self.raw = sock
        _runtime.raw_sockets.add(sock)

    def _close_raw(self) -> None:
        raw = self.raw
        if raw is not None and raw.fileno() >= 0:
            _notify_closing(raw)
            raw.close()

    def close(self, *, reset: bool = False) -> None:
        """Closes the descriptor, now, and wakes whoever waits. Idempotent, any thread."""
        self.closed = True
        if hasattr(self, "reader"):
            self.reader._close()
            self.writer._close()
        hub = self.hub
        hub.endpoints.pop(self.number, None)
        if self.raw is None:
            _epoll.conn_close(self.handle, reset, 0)
        elif _epoll.conn_close(self.handle, 0, 1) >= 0:
            if reset:
                linger_now(self.raw)
            self._close_raw()
        hub.outputs.pop(self.number, None)
        hub.wake_reader(self.number)
        hub.wake_writers(self.number)

    async def aclose(self) -> None:
        """Drains what the writer has pending, unless the scope is cancelled, and closes. The
        descriptor is closed on every way out. Always a checkpoint.
        """
        self._check_loop()
        if not self.closed:
            pending = not self._writing and (
                self.writer._size > 0
                or self.writer._reserved_size > 0
                or (not self._abandoned and conn_queued(self.handle) > 0)
            )
            if pending:
                try:
                    await self._drain_and_close()
                finally:
                    self.close()
            else:
                self.close()
        elif self._flushing:
            self.close()  # the first aclose() is still draining: this one ends that
        if self.hub.dead:
            await anyio.lowlevel.checkpoint()
        else:
            await self.hub.checkpoint()

    async def _drain_and_close(self) -> None:
        deadline = deadline_after(self.write_timeout) if self.write_timeout is not None else 0
        self.closed = self._flushing = True
        self.reader._end = SHUT
        self.hub.wake_reader(self.number)
        self.writer._seal()
        try:
            left = self._send(self.writer._take()) if self.writer._size else 1
            while left > 0 and _epoll.conn_drain(self.handle, 0, deadline) == _AGAIN:
                await self.hub.wait_write(self.number)
        finally:
            self._flushing = False

    def _check_loop(self) -> None:
        """:raises RuntimeError: in another event loop, as long as the connection's own lives"""
        if not self.hub.dead and not self.closed:
            self.hub.check()

    async def finish(self, timeout: float) -> None:
        """The end of a handler that has returned: drains, then ends this side and discards what
        still arrives until the peer has ended too, all within ``timeout`` seconds; then closes.
        """
        deadline = deadline_after(timeout)
        if self.closed:
            return
        self.writer._seal()
        try:
            left = self._send(self.writer._take()) if self.writer._size else 1
            while left and (result := _epoll.conn_drain(self.handle, 0, deadline)):
                if result != _AGAIN:
                    return
                await self.hub.wait_write(self.number)
            while _epoll.conn_linger(self.handle, self.reader._start, deadline) == _AGAIN:
                self.reader._end = SHUT
                await self.hub.wait_read(self.number)
        finally:
            self.close()

    def detach(self) -> tuple[socket.socket, bytes]:
        """Gives the open socket away, together with what was read ahead.

        :raises BusyResourceError: with pending output or a waiting task
        """
        self._check_usable()
        if self._reading:
            raise BusyResourceError("reading from")
        if self._writing or self.writer._size or conn_queued(self.handle) > 0:
            raise BusyResourceError("writing to")
        raw = self.raw_socket()
        result = _epoll.conn_detach(self.handle, self.reader._start)
        if result < 0:
            raise stream_error(result)
        self.closed = True
        self.raw = None
        _runtime.raw_sockets.discard(raw)
        self.hub.endpoints.pop(self.number, None)
        rest = _epoll.conn_rest(self.handle)
        self.reader._close()
        self.writer._close()
        return raw, rest


def linger_now(sock: socket.socket) -> None:
    """Makes the close of ``sock`` a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _notify_closing(sock: socket.socket) -> None:
    """Tells tasks that wait for the raw socket through the event loop's own means."""
    try:
        anyio.notify_closing(sock)
    except Exception:  # noqa: BLE001 -- no event loop here, or another one: nobody to tell
        return
