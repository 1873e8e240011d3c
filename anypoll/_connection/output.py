"""A connection's send path: flushing, sending, and what happens when either is abandoned.

The writer's pending output goes to C in one call: along with the wait, when a reader has to wait (C
sends it, or has the poller send a copy), or by itself. What the kernel does not take at once stays
in C's queue by reference, and ``hub.outputs`` keeps the objects until C is done with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio import BusyResourceError, ClosedResourceError

from .. import _epoll
from .._buffers.arguments import flat_view
from .._buffers.errors import IdleTimeout, ReadTimeout, WriteTimeout
from .._buffers.reader import SHUT
from .._epoll import conn_queued
from .._native import Block
from .endpoint import AGAIN, Endpoint

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .._buffers.chain import Piece


def is_constant(piece: Piece) -> bool:
    """Whether nobody can change the bytes, as they might through a view of someone else's memory.
    Blocks are only ever shown read-only, unlike other objects of the same type.
    """
    if type(piece) is bytes:
        return True
    view = memoryview(piece)
    return view.readonly and type(view.obj) in (bytes, Block)


class Output(Endpoint):
    """A connection's send path; see the module."""

    __slots__ = ()

    def _drop_sent(self, left: int) -> None:
        """Of what is kept for C (:meth:`_keep`) only the last ``left`` bytes are still queued: a
        queue that is never quite empty must not keep pieces sent long ago.
        """
        kept = self.hub.outputs[self.number]
        surplus = sum(map(len, kept)) - left
        while kept and surplus >= len(kept[0]):
            surplus -= len(kept.pop(0))

    def _own_queued(self) -> int:
        """The size of C's queue without the rest of an abandoned send, which goes out by itself and
        which nobody waits for.
        """
        return max(_epoll.conn_awaited(self.handle), 0)

    def queued(self) -> int:
        """Bytes that C has and the kernel has not; 0 once the connection is closed."""
        return 0 if self.closed else max(conn_queued(self.handle), 0)

    def stand_high(self) -> None:
        """The writer has reached high water: the next reader call lets it drain first."""
        self.reader._end = SHUT

    def _enter_writing(self) -> None:
        if self._writing:
            raise BusyResourceError("writing to")
        self._check_usable()
        self._writing = True

    def claim(self) -> None:
        """From now on nobody else may send."""
        self._enter_writing()

    def release(self) -> None:
        """Ends the claim; what the writer still has is sent or queued, without waiting."""
        self._writing = False
        if self.writer._size and not self.writer._shut:
            self._send_pending()

    def why_broken(self) -> Exception | None:
        """What a write would raise; asks only C."""
        if self.writer._shut or self.status() & (_epoll.IS_BROKEN | _epoll.IS_CLOSED):
            return self.why_unwritable()
        return None

    def _item(self, item: Buffer) -> memoryview:
        """:raises TypeError, ValueError: if it cannot be sent"""
        return flat_view(item, "item")

    async def _finish_sending(self, deadline: int, item: Buffer) -> None:
        """Waits for what the kernel did not take of a ``send()`` at once."""
        sent: Piece = flat_view(item, "item")
        if sent:  # distinguishes it from the same bytes queued twice
            self.hub.outputs[self.number][-1] = sent
        try:
            await self._drain(deadline)
        except BaseException:
            self._withdraw(sent)
            raise

    async def _finish_flushing(self, deadline: int) -> bool:
        """Waits for what is queued. Returns whether the task was suspended."""
        try:
            return await self._drain(deadline)
        except BaseException:
            self._secure()
            raise

    async def _drain(self, deadline: int, *, until_writable: bool = False) -> bool:
        """Waits until C's queue is empty. Returns whether the task was suspended."""
        suspended = False
        while True:
            result = _epoll.conn_drain(self.handle, until_writable, deadline)
            if result == 0:
                return suspended
            if result != AGAIN:
                raise self._write_error(result)
            try:
                await self.hub.wait_write(self.number)
            except BaseException:
                if self.number not in self.hub.writers:
                    _epoll.conn_disarm_write(self.handle)
                raise
            suspended = True
            self.reader._budget = self.budget
            if self.closed:
                raise self._own(ClosedResourceError())

    def _withdraw(self, item: Piece) -> None:
        """Nobody waits for ``item`` any more: removes it from the queue if none of it was sent,
        otherwise copies the rest.
        """
        self._requeue(item)
        _epoll.conn_give_up(self.handle)

    def _secure(self) -> None:
        """Nobody waits for the flush any more: copies whatever the caller may change later."""
        if not all(map(is_constant, self.hub.outputs.get(self.number, ()))):
            self._requeue(None)

    def _requeue(self, item: Piece | None) -> None:
        """Requeues what was not sent, without ``item`` if none of that was sent, and with copies of
        whatever may change.
        """
        left = _epoll.conn_hold(self.handle) if not self.closed else 0
        if left <= 0:
            return
        rest: list[Piece] = []
        for piece in reversed(self.hub.outputs[self.number]):
            size = min(len(piece), left)
            left -= size
            if size and (piece is not item or size < len(piece)):
                part = memoryview(piece)[len(piece) - size :]
                rest.append(part if is_constant(piece) else bytes(part))
            if left == 0:
                break
        rest.reverse()
        if rest:
            self.hub.outputs[self.number] = rest
        _epoll.conn_requeue(self.handle, rest)
        if not rest:
            self.hub.outputs.pop(self.number, None)

    async def _bound_output(self, deadline: int) -> bool:
        """Bounds the output to a peer that does not read: above high water it must drain before a
        reader call goes on. This excludes what another task is sending, or duplex protocols would
        deadlock. Returns whether the task was suspended.
        """
        # Abandoned output does not count: two ends that both waited for theirs would deadlock.
        own = self._own_queued()
        if self._writing or own + self.writer._size < self.limits.write_high_water:
            return False
        left = self._send_pending() if self.writer._size else own
        self.reader._end = SHUT
        if left <= 0:
            return False  # sent or broken: the reader may go on, and the writer will be told
        try:
            await self._drain(deadline)
        except WriteTimeout:
            raise self._own(ReadTimeout("pending output did not drain in time")) from None
        except (anyio.BrokenResourceError, IdleTimeout):
            pass
        return True

    async def flush_all(self) -> None:
        """Flushes until nothing is pending, though other tasks may write meanwhile."""
        await self.flush()
        while self.writer._size:
            await self.flush()

    async def wait_writable(self) -> None:
        """Waits until a send would probably not block."""
        self._enter_writing()
        try:
            await self.hub.checkpoint()
            await self._drain(0, until_writable=True)
        finally:
            self._writing = False

    async def send_eof(self) -> None:
        """Flushes, then ends this side. Idempotent."""
        self._check_plain("writing to")
        self._enter_writing()
        try:
            await self.hub.checkpoint()
            if self.closed:
                raise self._own(ClosedResourceError())
            if not _epoll.conn_status(self.handle) & _epoll.IS_SHUT:
                await self.flush_claimed()
                while self.writer._size:  # another task has written meanwhile
                    await self.flush_claimed()
                result = _epoll.conn_shutdown(self.handle)
                if result < 0:
                    raise self._write_error(result)
                self.writer._shut = True
        finally:
            self._writing = False
