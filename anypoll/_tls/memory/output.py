"""A TLS connection's send path: ordering, encrypting and flushing plaintext, with a timeout.

Plaintext that was written, or is being sent, stands in one queue, the writer's. Whoever comes first
encrypts it from the front: a ``send()`` or ``flush()``, one chunk at a time, each of which the
kernel must take before the next; or a reader about to wait, which takes all of it along. So nothing
comes between the parts of an item, and an item abandoned too late goes out first.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError

from ... import _epoll
from ..._buffers.errors import IdleTimeout, WriteTimeout
from ..._buffers.reader import SHUT
from ..._buffers.writer import Writer
from ..._connection.output import is_constant
from ..session import CLOSE_MOST, within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import ByteStream

    from ..._buffers.chain import Piece
    from ..._buffers.reader import Reader
    from .engine import Engine

CHUNK = 128 * 1024  # plaintext to encrypt before the kernel must have taken it


class Sink:
    """Encrypts and sends; see the module, and ``Sink`` in ``_buffers/writer.py``."""

    __slots__ = (
        "_engine",
        "_stream",
        "_taken",
        "_writing",
        "eof_sent",
        "limits",
        "reader",
        "timeout",
        "writer",
    )

    reader: Reader
    timeout: float | None
    """seconds for one ``send()`` or ``flush()``"""

    def __init__(self, engine: Engine, stream: ByteStream) -> None:
        self._engine = engine
        self._stream = stream
        self.limits = engine.core.limits
        self.timeout = None
        self.eof_sent = False
        self._writing = False
        self._taken = 0  # bytes of plaintext encrypted, in total
        self.writer = engine.writer = Writer(self)

    # --- the queue -------------------------------------------------------------------------------

    def _take(self, limit: int) -> Piece:
        """Takes the first bytes off the queue, at most ``limit``, in one piece."""
        writer = self.writer
        if writer._size <= limit:
            return writer._take_joined()
        pieces, room, count = writer._pieces, limit, 0
        while len(pieces[count]) <= room:
            room -= len(pieces[count])
            count += 1
        head = pieces[:count]
        if room:
            rest = memoryview(pieces[count])
            head.append(rest[:room])
            pieces[count] = rest[room:]
        del pieces[:count]
        writer._size -= limit
        return head[0] if len(head) == 1 else b"".join(head)

    def _encrypt(self, limit: int = CHUNK) -> None:
        """Encrypts the first chunk of the queue, if there is one.

        :raises ssl.SSLWantReadError: if the peer must send something first
        """
        if not self.writer._size:
            return
        engine, writer = self._engine, self.writer
        if engine.failure or engine.core.writer._shut:
            raise self.why_unwritable()
        before = writer._pieces[:], writer._size
        data = self._take(limit)
        try:
            engine.encrypt(data)
        except ssl.SSLWantReadError:
            writer._pieces, writer._size = before  # not joined: one of them may be abandoned
            raise
        self._taken += len(data)

    def push(self) -> None:
        """Encrypts everything, and leaves it to the connection, which sends it when its reader
        waits. Does nothing while another task is sending: that task will do it.
        """
        if self._writing or self._engine.failure or self._engine.core.writer._shut:
            return
        with suppress(ssl.SSLWantReadError):
            while self.writer._size:
                self._encrypt()

    def _withdraw(self, start: int, size: int) -> None:
        """Abandons an item of ``size`` bytes that begins at byte ``start`` of all plaintext. If
        none of it was encrypted it is removed; otherwise the poller sends the rest, and nobody
        waits for that.
        """
        if self._engine.closed or self._engine.core.closed:
            return  # nothing of it is left
        if self._taken > start:
            self._leave_to_the_poller(start + size)
            return
        if not size:
            return
        pieces, position, index = self.writer._pieces, self._taken, 0
        while position < start or not pieces[index]:  # an empty piece may precede it
            position += len(pieces[index])
            index += 1
        del pieces[index]
        self.writer._size -= size

    def _leave_to_the_poller(self, end: int) -> None:
        core = self._engine.core
        try:
            while self._taken < end:
                self._encrypt(end - self._taken)
            self._engine.send_collected()
            _epoll.conn_give_up(core.handle)
        except ssl.SSLWantReadError:
            pass  # it stays at the front
        except (BrokenResourceError, ClosedResourceError, IdleTimeout):
            pass  # there is nobody to send it to

    # --- sending ---------------------------------------------------------------------------------

    def _enter(self) -> None:
        if self._writing:
            raise BusyResourceError("writing to")
        self._engine.check()
        self._writing = True

    def _leave(self) -> None:
        """Handles output written meanwhile, which a reader may have left to this task."""
        self._writing = False
        if self.writer._size and not self._engine.closed and self._engine.is_pulling:
            self.push()
            self._engine.send_collected()

    def _check(self) -> None:
        self._engine.check()
        if self.writer._shut:
            raise self.why_unwritable()

    async def _within_timeout(self, function: Callable[[], Awaitable[None]]) -> None:
        try:
            await within(self._engine.core, self.timeout, function, WriteTimeout, "not sent")
        except BaseException:
            self._secure()
            raise

    def _secure(self) -> None:
        """Nobody waits for pending output any more: copies whatever the caller may change now."""
        pieces = self.writer._pieces
        for index, piece in enumerate(pieces):
            if not is_constant(piece):
                pieces[index] = bytes(piece)

    async def _pump(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Returns when the kernel has everything that is in the queue now."""
        target = self._taken + self.writer._size
        while True:
            if self._taken < target:
                try:
                    self._encrypt()
                except ssl.SSLWantReadError:
                    await self._engine.pull()
                    continue
            try:
                await flush()
            except (BrokenResourceError, IdleTimeout):
                self.writer._shut = True
                raise
            if self._taken >= target:
                return

    async def _flush(self) -> None:
        await self._pump(self._engine.core.flush)

    async def flush(self) -> None:
        """See :meth:`Writer.flush`."""
        self._enter()
        try:
            await self.flush_claimed()
        finally:
            self._leave()

    def claim(self) -> None:
        """From now on nobody else may send."""
        self._enter()

    async def flush_claimed(self) -> None:
        """``flush()`` for the holder of the claim."""
        if self.writer._shut:
            raise self.why_unwritable()
        self.writer._seal()
        await self._within_timeout(self._flush)

    def release(self) -> None:
        """Ends the claim; what the writer still has is sent or queued, without waiting."""
        self._writing = False
        if self.writer._size and not self._engine.closed and not self.writer._shut:
            self.push()
            self._engine.send_collected()

    def why_broken(self) -> Exception | None:
        """What a write would raise; asks only C."""
        if self.writer._shut or self._engine.closed:
            return self.why_unwritable()
        return self._engine.core.why_broken()

    async def send(self, item: Piece) -> None:
        """Sends what is in the queue, then ``item``. Always a checkpoint, taken first."""

        async def send() -> None:
            core = self._engine.core
            if core.writer._size or core.queued():  # abandoned meanwhile, the item leaves no trace
                await core.flush()
            self.writer._seal()
            start = self._taken + self.writer._size
            if len(item):
                self.writer._pieces.append(item)
                self.writer._size += len(item)
            try:
                await self._flush()
            except BaseException:
                self._withdraw(start, len(item))
                raise

        self._enter()
        try:
            await self._engine.core.hub.checkpoint()
            self._check()
            await self._within_timeout(send)
        finally:
            self._leave()

    async def send_eof(self) -> None:
        """Flushes, and sends a ``close_notify``. Idempotent."""

        async def send() -> None:
            await self._flush()
            while self.writer._size:  # another task has written meanwhile
                await self._flush()
            self._say_goodbye()
            await self._engine.core.flush()

        self._enter()
        try:
            await self._engine.core.hub.checkpoint()
            if not self.eof_sent:
                self._check()
            self.writer._seal()
            await self._within_timeout(send)
        finally:
            self._leave()

    # --- end -------------------------------------------------------------------------------------

    def _say_goodbye(self) -> None:
        if not self.eof_sent:
            self._engine.say_goodbye()
            self.eof_sent = self.writer._shut = True

    async def close(self, *, wait: bool) -> None:
        """Sends pending output, then a ``close_notify``. If it waits for the peer's end, it
        discards what comes before, but stops at ``CLOSE_MOST``. Does nothing while abandoned output
        is under way.
        """
        engine = self._engine
        if self._writing or (engine.core.queued() and not self.unsent):
            return
        await engine.interrupt()
        await self._pump(engine.core.flush_claimed)
        self._say_goodbye()
        await engine.core.flush_claimed()
        before = engine.core.statistics().bytes_received
        while wait and not engine.ended:
            engine.chain.clear()
            if not engine.decrypt():
                if engine.core.statistics().bytes_received - before > CLOSE_MOST:
                    return
                await engine.pull()

    # --- for the reader --------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """Bytes that someone waits for, or will: without the rest of an abandoned send."""
        core = self._engine.core
        return self.writer._size + core.writer._size + core._own_queued()

    @property
    def stands_high(self) -> bool:
        """Whether a reader call must let output drain first, other than a sending task's."""
        if self._engine.has_answered_much:
            return True
        return not self._writing and self.unsent >= self.limits.write_high_water

    async def drain(self) -> bool:
        """Drains output for a reader. Nobody is busy meanwhile, and errors are left to the writer.
        Returns whether there were none.
        """
        try:
            await self._pump(self._engine.core.flush_claimed)
        except (BrokenResourceError, IdleTimeout):
            return False
        self._engine.has_drained()
        return True

    # --- for the writer --------------------------------------------------------------------------

    def queued(self) -> int:
        """Bytes encrypted that the kernel has not taken yet."""
        core = self._engine.core
        return core.queued() + core.writer._size

    def stand_high(self) -> None:
        """The writer has reached high water: the next reader call lets it drain first."""
        self.reader._end = SHUT

    def why_unwritable(self) -> Exception:
        """What a write raises once ``writer._shut`` is set."""
        engine = self._engine
        if engine.closed or self.eof_sent:
            return engine.core._own(ClosedResourceError())
        return engine.broken() if engine.failure else engine.core.why_unwritable()

    @property
    def origin(self) -> int:
        """See ``Sink``."""
        return self._engine.core.number

    async def aclose(self) -> None:
        """Closes the connection."""
        await self._stream.aclose()
