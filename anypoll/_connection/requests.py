"""Request mode: a call per request, and no task per connection while it is idle.

A connection is in one of three states. *Idle*: the C side waits for input, the hub holds the
connection, and nobody else may read. *Ready*: input has come, and the connection stands in the
queue of its owner's workers. *Busy*: a worker runs the call, which may read and write as any task.

Each step begins by asking the C side: is a call due, must the connection wait, or has the input
ended? A call is due if anything is unread; but if the last call consumed nothing, only once more
input has come than was there when that call began. So a call that consumes nothing is not repeated
in a busy loop, and input that arrives while it runs is not missed.

The owner of the connection (its server, its handler, or only the event loop) determines in which
tasks calls run, and what happens when no more will come.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from anyio import ClosedResourceError, EndOfStream

from .. import _epoll
from .._buffers.chain import EMPTY
from .._buffers.errors import GRACEFUL, error_in, normal_end
from .._buffers.reader import SHUT
from .._epoll import EQUEUED, NEW_BLOCK
from .._loop.callbacks import cancellation_suppressed
from .._loop.workers import Workers
from .endpoint import AGAIN

if TYPE_CHECKING:
    from .._loop.hub import Hub
    from .core import Core

logger = logging.getLogger("anypoll.connection")

Function = Callable[[Any], Awaitable[Any]]

_ARMED = frozenset({AGAIN, EQUEUED})


class Owner(Protocol):
    """Answers for connections in request mode."""

    workers: Workers

    @property
    def context(self) -> Context | None:
        """Calls run in copies of this; ``None``: of the one ``set_on_request()`` was called in."""

    @property
    def cut(self) -> bool:
        """Whether no more calls begin, and a running call is its connection's last."""

    def call(self, conn: Any, function: Function) -> Awaitable[Any]:
        """Calls ``function(conn)``."""

    async def conclude(self, conn: Any, exc: BaseException | None) -> None:
        """No more calls will come: one has raised or was cancelled, the input has ended, or the
        connection was closed.
        """


class Requests:
    """Request mode of one connection; see the module."""

    __slots__ = (
        "_before",
        "_conn",
        "_core",
        "_due",
        "_fresh",
        "_function",
        "_over",
        "_owner",
        "carries",
        "context",
        "taskless",
    )

    def __init__(self, conn: Any, core: Core, function: Function, owner: Owner) -> None:
        self._conn = conn
        self._core = core
        self._function = function
        self._owner = owner
        self.context = owner.context or copy_context()
        self._before: Function | None = None
        self._fresh = True  # the unread input is new to the function
        self._due = False  # as far as the C side knows, a call has begun
        self._over = False
        self.carries = False
        """output of earlier calls is still pending"""
        self.taskless = False
        """request mode has begun, and no step is running"""

    # --- plain functions, in the event loop's thread ---------------------------------------------

    def start(self, before: Function | None = None) -> None:
        """Begins. If ``before`` is given, a worker calls that first."""
        self.taskless = True
        self._before = before
        if before is None:
            try:
                self._due = self._look()
            except Exception:  # noqa: BLE001, S110 -- it will be found again, in a task
                pass
            else:
                if not self._due:
                    return
        self._owner.workers.submit(self)

    def replace(self, function: Function) -> None:
        """Calls this function from now on, also for input that an earlier one left unread."""
        if self.idle or function != self._function:  # a call that sets itself must not loop
            self._fresh = True
        self._function = function
        if self._leave_idle():
            _epoll.conn_disarm_read(self._core.handle)
            self.start()

    def on_input(self) -> None:
        """Called by the hub when the wait is over."""
        self._core._reading = False
        self._owner.workers.submit(self)

    def on_draining(self) -> None:
        """The server is ending: a connection that waits with nothing unread ends now."""
        if self.idle and not self._core.has_arrived():
            self.on_close()

    def on_close(self) -> None:
        """Tells the owner that the connection was closed, after the running call, if any. Any
        thread, like the close.
        """
        if not self._leave_idle():
            return
        hub = self._core.hub
        if hub.is_here():
            self._owner.workers.submit(self)
        elif not hub.spawn(self._submit):
            self.abandon()

    async def _submit(self) -> None:
        self._owner.workers.submit(self)

    def stop(self) -> None:
        """Lets no further call start, and tells nobody."""
        self._over = True
        self._leave_idle()
        self._core.requests = None  # breaks a reference cycle

    def abandon(self) -> None:
        """No tasks are left in which a call could run."""
        self.stop()
        self._core.close()
        self._core.release_callbacks()

    @property
    def idle(self) -> bool:
        """Whether the connection waits for input, and no call is running or due."""
        return self._core.number in self._core.hub.requests

    def _leave_idle(self) -> bool:
        core = self._core
        if core.hub.requests.pop(core.number, None) is None:
            return False
        core._reading = False
        return True

    def on_suspend(self) -> None:
        """The call waits for something: earlier answers must not wait with it."""
        core = self._core
        if self.carries and not core.closed and not core._writing and core.writer._size:
            core._send_pending()

    # --- one step --------------------------------------------------------------------------------

    async def step(self) -> None:
        """Does what is due now: makes a call, or ends."""
        if self._over:
            return
        self.taskless = False
        try:
            exc = await self._outcome()
        except BaseException as e:
            self.stop()
            with cancellation_suppressed():  # it must not replace this outcome
                await self._owner.conclude(self._conn, e)
            raise
        if exc is None and not self._owner.cut:
            self.taskless = True
        else:  # also after a call that suppressed its cancellation
            self.stop()
            try:
                await self._owner.conclude(self._conn, exc)
            finally:
                exc = None  # from CPython 3.12 on, frames of its traceback lead back to this one

    async def _outcome(self) -> Exception | None:
        """The exception that :meth:`_call_if_due` raised. No frame in its traceback keeps it, or
        each end would leave a garbage cycle that contains the connection.
        """
        try:
            await self._call_if_due()
        except BaseException as exc:
            if error_in(exc) is None:
                raise
            self.on_suspend()
            return error_in(exc)  # the owner decides
        return None

    async def _call_if_due(self) -> None:
        """:raises Exception: if no call will ever be due, or the call raised it"""
        if self._before is not None:
            before, self._before = self._before, None
            await before(self._conn)
        if self._owner.cut:
            return
        if self._core.closed:
            self._due = False
        if not self._due and (self._over or not self._look()):
            return
        self._due = self._fresh = False
        await self._owner.call(self._conn, self._function)
        self.carries = False
        if not self._over and not self._is_cut() and self._look():
            self._due = True
            self._owner.workers.submit(self)  # behind the jobs that are already ready

    def _is_cut(self) -> bool:
        return self._owner.cut

    def _look(self) -> bool:
        """Whether a call is due. If not, pending output is sent and the connection becomes idle; if
        so, pending output goes along with the next answer, or when that call suspends.

        :raises EndOfStream: if none will ever be due, because the peer has ended its side, or
            because the server is ending and nothing is unread
        :raises ClosedResourceError, BrokenResourceError, IdleTimeout: likewise
        :raises MessageTooLarge: if the last call left more than ``read_limit`` unread
        """
        core = self._core
        if core.closed:
            if core._flushing:  # in another task's aclose(), which reports when all is sent
                core.hub.requests[core.number] = self
                return False
            raise core._own(ClosedResourceError())
        if core._reading:
            raise RuntimeError("A request call has ended while another task reads its connection")
        result = core._request(self._fresh)
        if result in _ARMED:
            self._become_idle()
            return False
        if result < 0:
            raise core._ended(result)
        self._open_window(result)
        self.carries = core.writer._size > 0
        return True

    def _become_idle(self) -> None:
        core, reader = self._core, self._core.reader
        reader._view = EMPTY
        reader._start, reader._end = 0, SHUT
        if core.draining and not core.has_arrived():
            _epoll.conn_disarm_read(core.handle)
            raise core._own(EndOfStream())
        core._reading = True
        core.hub.requests[core.number] = self

    def _open_window(self, result: int) -> None:
        core, reader = self._core, self._core.reader
        reader._budget = core.budget
        if result == 0:  # the unread bytes were seen before, and may span several blocks
            reader._end = SHUT
            if (unread := core.buffered()) > core.limits.read_limit:
                core.check_request(unread)
            return
        if core.number in core.hub.outputs:  # the first reader call lets it drain
            reader._end = SHUT
            return
        if result & NEW_BLOCK:
            core._show()
        reader._end = result & (NEW_BLOCK - 1)


class Unserved:
    """Owns connections that no server has, such as dialled ones: calls run in background tasks of
    the event loop.
    """

    context = None
    cut = False

    def __init__(self, hub: Hub) -> None:
        self.workers = Workers(hub, partial(hub.spawn, stoppable=True))

    def call(self, conn: Any, function: Function) -> Awaitable[Any]:
        """See :class:`Owner`."""
        return function(conn)

    async def conclude(self, conn: Any, exc: BaseException | None) -> None:
        """Drains the answers if all went well, and closes."""
        core = conn._core
        try:
            reason = normal_end(exc, core.number) if isinstance(exc, Exception) else "cancelled"
            if reason is None:
                name = f"anypoll connection {core.number & 0xFFFFFFFF}"  # records may be kept
                logger.error("The request function of %s has failed", name, exc_info=exc)
            elif reason in GRACEFUL:
                timeout = core.write_timeout
                await core.finish(
                    core.limits.close_callback_timeout if timeout is None else timeout
                )
        finally:
            await core.end()


def unserved(hub: Hub) -> Unserved:
    """That hub's owner of unserved connections."""
    if hub.unserved is None:
        hub.unserved = Unserved(hub)
    return hub.unserved  # type: ignore[no-any-return]
