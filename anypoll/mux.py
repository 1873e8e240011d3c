r"""A shared message queue on one connection: many tasks write, whole messages are merged and sent.

A client that multiplexes calls over one connection, or a server that answers them out of order, has
many tasks with small messages and one socket. A :class:`ShardQueue` takes the messages of all of
them, and a single task sends what has gathered::

    import anyio
    import anypoll
    from anypoll.mux import ShardQueue

    async def main() -> None:
        client, server = anypoll.socketpair()
        async with client, server:
            async with ShardQueue(client) as queue, anyio.create_task_group() as tg:
                for number in range(100):
                    tg.start_soon(queue.add, b"%03d: " % number, b"hello\n")
            # here everything has been sent, in a handful of system calls
            for _ in range(100):
                print(str(await server.until(b"\n"), "ascii"), end="")

    anyio.run(main)

How it works. ``add()`` appends a message to the queue and does not suspend its task. The first
message in an empty queue wakes the sender, which runs once the tasks that are ready now have had
their turn, takes everything they have added, and flushes it; messages added meanwhile form the next
batch. The busier the connection, the larger the batches: nothing is held back to wait for more.

It guarantees:
  - A message is sent whole or not at all, and never interleaved with another. The messages of one
    task are sent in the order of its calls.
  - The bytes that the kernel has not taken yet are at most ``write_high_water`` plus one message.
    Above that ``add()`` waits, and the longest waiter goes first.
  - A message for which ``add()`` has returned is sent, whoever is cancelled afterwards; or else its
    loss is reported, by every later ``add()`` and by the end of the block.
  - An ``add()`` that raises or is cancelled has queued nothing.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex

import anyio
from anyio import BrokenResourceError, ClosedResourceError

from ._buffers.arguments import count
from ._buffers.errors import IdleTimeout, WriteTimeout
from ._buffers.gather import UNKNOWN, accepted, gathered, size_of
from ._buffers.writer import Writer
from ._loop import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

    from ._buffers.chain import Piece
    from ._buffers.linkbuffer import LinkBuffer
    from ._loop.hub import Hub

__all__ = ("ShardQueue",)

#: Errors that ``add()`` raises as the connection would; any other means the connection is broken.
_KINDS: tuple[type[Exception], ...] = (
    BrokenResourceError,
    ClosedResourceError,
    WriteTimeout,
    IdleTimeout,
)


class _HasWriter(Protocol):
    @property
    def writer(self) -> Writer: ...


class _Waiter:
    """An ``add()`` that waits for room. The wake-up is only a hint; ``granted`` is its share."""

    __slots__ = ("event", "granted", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.event = anyio.Event()
        self.granted = False


class ShardQueue:
    """A queue of messages to one connection, for many tasks; see the module.

    Use it as ``async with ShardQueue(conn) as queue``. Inside the block, only the queue may send on
    the connection: ``send()``, ``flush()``, ``send_eof()`` and the like raise
    ``BusyResourceError``, and the ``writer`` must be left alone. Reading is not affected.

    Leaving the block normally sends what is queued, then closes the queue; the connection stays
    open, and can be used as before. Leaving by an exception or a cancellation does not wait: a
    connection sends what it can at once, and keeps the rest as pending output, which precedes later
    output. (Another stream keeps everything except the piece its ``send()`` was working on: that is
    as the stream leaves it when cancelled.)

    The queue belongs to the event loop in which it was entered: other loops get ``RuntimeError``.

    :param conn: a connection, or anything else with a nocopy ``writer``, such as a TLS connection;
        or such a writer itself, from :func:`anypoll.nocopy.wrap_writer`
    :param shards: at least 1; has no effect. netpoll's queue has shards, each with its own lock;
        here the whole queue belongs to one event loop and has no lock, so there is nothing to
        divide. It is accepted so that code from there can be ported.
    :raises TypeError: if ``conn`` has no nocopy writer, or ``shards`` is not an integer
    :raises ValueError: if ``shards`` is below 1
    """

    _hub: Hub
    _scope: anyio.CancelScope
    _budget: int
    _turns: int

    def __init__(self, conn: _HasWriter | Writer, *, shards: SupportsIndex = 1) -> None:
        writer: Any = conn if isinstance(conn, Writer) else getattr(conn, "writer", None)
        if not isinstance(writer, Writer):
            kind = type(conn).__name__
            raise TypeError(
                f"a connection or another thing with a nocopy writer is required, not {kind}"
            )
        count(shards, "shards", least=1)
        self._writer = writer
        self._sink = writer._core
        self._high_water = writer._high_water
        self._pieces: list[Piece] = []  # the queue
        self._size = 0  # bytes queued, being sent, and reserved
        self._reserved = 0  # bytes granted to waiters that have not run yet
        self._waiting: deque[_Waiter] = deque()
        self._closed = True  # no more messages are accepted; _refusal() says why
        self._stopped = False  # the sender is to end without waiting
        self._idle: anyio.Event | None = None  # what the sender waits for when nothing is queued
        self._ended: anyio.Event | None = None  # set when the sender has ended; None: never entered
        self._failure: BaseException | None = None
        self._lost = False  # some queued messages were not sent

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.buffered} bytes"
        return f"<anypoll.mux.ShardQueue {state}>"

    @property
    def buffered(self) -> int:
        """Bytes added that the kernel has not taken yet; 0 after the end."""
        return self._size - self._reserved

    # --- adding ----------------------------------------------------------------------------------

    async def add(self, *buffers: Buffer | LinkBuffer | Callable[[], Buffer | LinkBuffer]) -> None:
        """Queues ``buffers`` as one message; returns when that is done.

        While there is room the call does not suspend its task, except for a checkpoint once in
        ``configure(checkpoint_budget=...)`` calls.

        :param buffers: ``bytes`` above 4 KiB are referenced until they are sent; other bytes-like
            objects are copied at once, so they may be changed when the call has returned. The
            blocks of a ``LinkBuffer`` are moved, as by :meth:`anypoll.nocopy.Writer.append`. A
            callable returns one of these. It is called when its message's turn has come, so in the
            order in which messages are sent, and what it raises comes out of ``add()``.
        :raises TypeError: if a buffer is none of these; nothing is queued then
        :raises ClosedResourceError: if the queue or the connection is closed, before or during the
            call
        :raises BrokenResourceError: if a flush has failed, with the ``OSError`` as its cause
        :raises WriteTimeout, IdleTimeout: if that is how it failed
        :raises RuntimeError: outside ``async with``, or in another event loop
        """
        if self._closed or not self._size:
            self._check()
        self._hub.check()
        parts = [part if type(part) is bytes else accepted(part) for part in buffers]
        self._turns -= 1
        if self._turns < 0:
            await self._hub.checkpoint()
            self._turns = self._budget
            self._check()
        if self._size >= self._high_water:  # always so while anyone is waiting
            size = size_of(parts)
            if size:
                self._put(parts, await self._turn(size))
        else:
            self._put(parts, 0)

    def _check(self) -> None:
        if self._closed:
            raise self._refusal()
        if not self._size:  # otherwise the sender is about to find out
            failure = self._sink.why_broken()
            if failure is not None:
                self._fail(failure)
                raise self._refusal()

    def _refusal(self) -> Exception:
        """A new exception for each caller, because each gets its own traceback."""
        failure = self._failure
        if failure is None:
            if self._ended is None:
                return RuntimeError("a ShardQueue is to be used inside of `async with`")
            return ClosedResourceError()
        for kind in _KINDS:
            if isinstance(failure, kind):
                told = kind(*failure.args)
                told.__cause__ = failure.__cause__ or failure
                told.__dict__.update(failure.__dict__)  # whose connection it is about
                return told
        told = BrokenResourceError()
        told.__cause__ = failure
        return told

    def _put(self, parts: Sequence[Any], reserved: int) -> None:
        """Queues a message for which ``reserved`` bytes were set aside."""
        pieces, size = parts, 0
        try:
            size = size_of(parts)
            if size == UNKNOWN:
                size = 0
                pieces = gathered(parts)
                size = sum(map(len, pieces))
        finally:  # a callable may have raised
            self._reserved -= reserved
            self._size += size - reserved
            if self._waiting:
                self._grant()
        if size:
            self._pieces += pieces
            if self._idle is not None:
                self._idle.set()

    # --- waiting for room ------------------------------------------------------------------------

    async def _turn(self, size: int) -> int:
        """Waits for room; returns how many bytes are reserved for the caller."""
        # An unknown size takes all the room there is, until it is known.
        waiter = _Waiter(self._high_water if size == UNKNOWN else size)
        self._waiting.append(waiter)
        try:
            await waiter.event.wait()
        except BaseException:
            self._give_up(waiter)
            raise
        if self._closed:
            raise self._refusal()
        return waiter.size

    def _give_up(self, waiter: _Waiter) -> None:
        if waiter.granted:
            self._reserved -= waiter.size
            self._size -= waiter.size
            self._grant()
        elif waiter in self._waiting:
            self._waiting.remove(waiter)

    def _grant(self) -> None:
        """Resumes the longest waiters. All at once, so that their messages are sent together; their
        room is reserved, so that nobody else takes it before they run.
        """
        while self._waiting and self._size < self._high_water:
            waiter = self._waiting.popleft()
            self._reserved += waiter.size
            self._size += waiter.size
            waiter.granted = True
            waiter.event.set()

    # --- sending ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        """The sender. Cancelling the block does not cancel it; :meth:`_stop` does."""
        try:
            with self._scope:
                await self._send_all()
        except Exception as exc:  # noqa: BLE001 -- every add() reports it
            self._lost = True
            self._fail(exc)
        except GeneratorExit:  # there may be no event loop any more
            raise
        except anyio.get_cancelled_exc_class():  # it is ending
            raise
        except BaseException as exc:  # reported likewise; and the hub ends the event loop with it
            self._lost = True
            self._fail(exc)
            raise
        finally:
            self._end()

    async def _send_all(self) -> None:
        while not self._stopped:
            if self._pieces:
                await self._send_gathered()
            elif self._closed:
                return
            else:
                self._idle = anyio.Event()
                await self._idle.wait()
                self._idle = None

    async def _send_gathered(self) -> None:
        pieces, self._pieces = self._pieces, []
        size = self.buffered
        self._writer._extend(pieces)
        await self._sink.flush_claimed()
        self._size -= size
        self._grant()

    # --- end -------------------------------------------------------------------------------------

    def _shut(self) -> None:
        """Accepts no more messages, and tells the waiters."""
        self._closed = True
        waiting, self._waiting = self._waiting, deque()
        for waiter in waiting:
            waiter.event.set()
        if self._idle is not None:
            self._idle.set()

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure.with_traceback(None)  # its frames would hold the connection
        self._shut()

    def _stop(self) -> None:
        self._stopped = True
        self._shut()
        self._scope.cancel()

    def _end(self) -> None:
        """The sender has ended. If it was stopped, the connection gets what is left."""
        assert self._ended is not None
        self._shut()
        if self._failure is None and not self._writer._shut:
            self._writer._extend(self._pieces)
        self._pieces = []
        self._size = self._reserved
        self._sink.release()
        self._ended.set()

    async def aclose(self) -> None:
        """Sends what is queued, then closes the queue; the connection stays open. A checkpoint.

        From now on every ``add()`` raises ``ClosedResourceError``, including calls that are
        waiting. A second ``aclose()`` waits for the same end. If the call is cancelled, the queue
        is closed at once, and what is left stays with the connection as pending output. Leaving the
        block normally does the same.

        :raises BrokenResourceError: if messages were lost, as for :meth:`add`
        :raises RuntimeError: in another event loop
        """
        if self._ended is None:
            self._ended = anyio.Event()
            self._ended.set()
        elif not self._ended.is_set():
            self._hub.check()
            self._shut()
        try:
            await self._ended.wait()
        except BaseException:
            await self._stopped_now()
            raise
        if self._lost:
            raise self._refusal()

    async def _stopped_now(self) -> None:
        assert self._ended is not None
        if not self._ended.is_set():
            self._stop()
            with anyio.CancelScope(shield=True):
                await self._ended.wait()

    async def __aenter__(self) -> Self:
        if self._ended is not None:
            raise RuntimeError("a ShardQueue can be entered only once")
        sink = self._sink
        sink.claim()
        failure = sink.why_broken()
        self._hub = runtime.current_hub()
        self._scope = anyio.CancelScope()
        if failure is not None or not self._hub.spawn(self._run):
            sink.release()
            raise failure or ClosedResourceError()  # the event loop is ending
        self._ended = anyio.Event()
        self._budget = self._turns = runtime.settings().checkpoint_budget
        self._closed = False
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            await self.aclose()
        else:
            await self._stopped_now()
