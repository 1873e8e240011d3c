"""A connection's lifecycle: registration with a poller, and the order of closing.

:class:`Core` is a connection without its public surface: the C side's handle, the guards, the
waits. The classes in ``stream`` and ``nocopy`` are faces of it.

The caller closes at once: C marks the connection closed, removes it from epoll, bumps its
generation, and only then is the descriptor closed. If Python has a socket object for it, that
object closes it, so that it knows. Waiting tasks are woken and find ``closed``. Then the close
callbacks are released (``_loop/callbacks.py``), unless a handler has the connection: its server
does that.
"""

from __future__ import annotations

import socket
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress

import anyio
import anyio.lowlevel
from anyio import BusyResourceError

from .. import _epoll, _native
from .._buffers.errors import os_error, stream_error
from .._buffers.reader import SHUT
from .._epoll import EIDLE, IS_IDLE_END, MAIL_FAILED, MAIL_GONE, MAIL_IDLE, MAIL_TRIM, conn_queued
from .._loop import runtime
from .endpoint import AGAIN, deadline_after
from .input import Input


class Core(Input):
    """A connection without its public surface; see the module."""

    __slots__ = ()

    def register(self) -> None:
        """Has a poller watch the descriptor.

        :raises OSError: ``ENOSPC``, ``ENOMEM``; the connection is closed then
        """
        [result] = _native.register([self])
        if result < 0:
            self.close()
            raise os_error(result)

    def __del__(self) -> None:
        if not self.closed:
            what = self.name or "connection"
            warnings.warn(f"unclosed {what}", ResourceWarning, stacklevel=1, source=self)
            self.close()
            if self.callbacks is not None:
                self.callbacks.run_soon()

    # --- notifications from the hub --------------------------------------------------------------

    def on_token(self, bits: int, value: int) -> None:
        """Called by the hub for any event that does not end a wait."""
        if bits & MAIL_TRIM and not self.closed:
            self.reader._drop_view()
        if bits & MAIL_GONE and self.watcher is not None:
            self.watcher()
        if bits & MAIL_IDLE and not self.closed:
            self.reader._end = SHUT
            self._fail(EIDLE)
            self.writer._take()
            self.hub.wake_writers(self.number)
            self.release_callbacks()
        if bits & MAIL_FAILED:
            if not self.closed:
                self._fail(value)
                self.hub.wake_writers(self.number)
            runtime.bury_pollers()

    def on_hub_end(self) -> None:
        """The event loop has ended: C has closed the descriptor, unless Python owned it."""
        self._over = True
        self._mark_closed()
        self.reader._close()
        self.writer._close()
        self._no_more_news()
        self._close_raw()
        self._let_go()  # the handler's task will never run again
        self._reading = self._writing = self._flushing = False  # nor will any other
        self.release_callbacks()

    # --- end -------------------------------------------------------------------------------------

    def close(self, *, reset: bool = False) -> None:
        """Closes the descriptor now, and wakes all waiters. Idempotent. Call it in the event loop's
        thread, or where nothing else has the connection, as in the garbage collector.
        """
        if self._over:
            return
        raw = self.raw
        if raw is None:
            self._end(reset, False)
        else:
            if self._end(False, True) >= 0 and reset:
                with suppress(OSError):  # already closed by another thread
                    linger_now(raw)
            self._close_raw()
        self.hub.part_from(self.number)
        if self.requests is not None:
            self.requests.on_close()

    def abort(self) -> None:
        """Closes with an RST, and releases the callbacks. Any thread."""
        if (not self.closed or self._flushing) and not self.hands_over(self.abort):
            self.close(reset=True)
            self.release_callbacks()

    def hands_over(self, function: Callable[[], None]) -> bool:
        """Has the event loop call the function if it is running in another thread, where a task
        may be in the middle of reading or writing. If False, the caller must call it.
        """
        if self.hub.is_here() or not self.hub.is_running():
            return False

        async def call() -> None:
            function()

        return self.hub.spawn(call)

    def release_callbacks(self) -> None:
        """Runs the close callbacks without waiting: whatever ended the connection cannot wait."""
        if self.callbacks is not None and not self.held:
            self.callbacks.run_now()

    @property
    def over(self) -> bool:
        """Whether a close callback added now is too late to wait for the end."""
        return self.closed or (not self.held and bool(self.status() & IS_IDLE_END))

    async def aclose(self) -> None:
        """Drains the writer's pending output (but not an open reservation), unless the scope is
        cancelled, and closes. The descriptor is closed on every way out; then the callbacks run.
        Always a checkpoint.
        """
        self._check_loop()
        try:
            await self._aclose()
        finally:
            if self.callbacks is not None and not self.held:
                await self.callbacks.run()
        if self.hub.dead:
            await anyio.lowlevel.checkpoint()
        else:
            await self.hub.checkpoint()

    async def _aclose(self) -> None:
        if not self.closed:
            if self.session is not None:
                try:
                    await self.session.close(self)
                finally:
                    self.close()
            elif not self._writing and (self.writer._size > 0 or self._own_queued() > 0):
                try:
                    await self._drain_and_close()
                finally:
                    self.close()
            else:
                self.close()
        elif self._flushing:
            self.close()  # the first aclose() is still draining; this one cuts that short

    async def _drain_and_close(self) -> None:
        deadline = deadline_after(self.write_timeout) if self.write_timeout is not None else 0
        self._begin_closing()
        try:
            await self._drained(deadline)
        finally:
            self._flushing = False

    def _begin_closing(self) -> None:
        """From now on the connection is closed to its user, but may still send."""
        self._flushing = True
        self._mark_closed()
        self.reader._end = SHUT
        self.writer._shut = True
        self.hub.wake_reader(self.number)

    async def _drained(self, deadline: int) -> bool:
        """Sends what is pending, and waits until nothing is queued. False: that has failed, or has
        taken too long.
        """
        left = self._send_pending() if self.writer._size else 1
        while left > 0:
            left = _epoll.conn_drain(self.handle, 0, deadline)
            if left == AGAIN:
                await self.hub.wait_write(self.number)
                left = 1
        return left == 0

    def _check_loop(self) -> None:
        """:raises RuntimeError: in another event loop, while the connection's own is alive"""
        if not self.hub.dead and not self.closed:
            self.hub.check()

    async def finish(self, timeout: float) -> None:
        """Ends the connection of a handler that has returned: drains output, ends this side,
        discards input until the peer has ended too, all within ``timeout`` seconds; then closes.
        """
        deadline = deadline_after(timeout)
        if self.requests is not None:
            self.requests.stop()
        if self.closed:
            return
        try:
            if not await self._drained(deadline):
                return
            if self.session is not None and not await self.session.say_goodbye(self, deadline):
                return
            while _epoll.conn_linger(self.handle, self.reader._start, deadline) == AGAIN:
                self.reader._end = SHUT
                await self.hub.wait_read(self.number)
        finally:
            self.close()

    async def end(self) -> None:
        """The last step of a handler's task: closes, and runs the callbacks."""
        if self.requests is not None:
            self.requests.stop()
        self.close()
        self._let_go()
        if self.callbacks is not None:
            await self.callbacks.run()

    def detach(self) -> tuple[socket.socket, bytes]:
        """Gives away the open socket, together with the bytes already read ahead.

        :raises BusyResourceError: with pending output or a waiting task
        """
        self._check_usable()
        self._check_plain("encrypting")
        if self._reading and not (self.requests is not None and self.requests.idle):
            raise BusyResourceError("reading from")
        if self._writing or self.writer._size or conn_queued(self.handle) > 0:
            raise BusyResourceError("writing to")
        raw = self.raw_socket()
        result = _epoll.conn_detach(self.handle, self.reader._start)
        if result < 0:
            raise self._own(stream_error(result))
        self._over = True
        self._mark_closed()
        self._forget_raw()
        self.hub.forget(self.number)
        self.hub.outputs.pop(self.number, None)  # all is sent, but no token will say so any more
        rest = _epoll.conn_rest(self.handle)
        self.reader._close()
        self.writer._close()
        if self.requests is not None:
            self.requests.on_close()
        self.release_callbacks()
        return raw, rest


def linger_now(sock: socket.socket) -> None:
    """Makes closing ``sock`` send an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
