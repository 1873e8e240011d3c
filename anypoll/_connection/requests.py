"""Request mode: a call per request, and no task per connection while it is idle.

A connection is in one of three states. *Idle*: the C side waits for input, the hub holds the
connection, and nobody else may read. *Ready*: input has come, and the connection stands in the
queue of its owner's workers. *Busy*: a worker runs the call, which may read and write as any task.

csrc/python/requests.c takes a connection through these: it asks the core whether a call is due, and
makes the calls. Here is what happens seldom: the beginning, a replaced function, and the end.

The owner of the connection (its server, its handler, or only the event loop) determines in which
tasks calls run, and what happens when no more will come.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from .. import _epoll, _native
from .._buffers.errors import GRACEFUL, error_in, normal_end
from .._loop.callbacks import cancellation_suppressed
from .._loop.workers import Workers

if TYPE_CHECKING:
    from typing import Self

    from .._loop.hub import Hub
    from .core import Core

logger = logging.getLogger("anypoll.connection")

Function = Callable[[Any], Awaitable[Any]]


class Owner(Protocol):
    """Answers for connections in request mode."""

    workers: Workers

    @property
    def context(self) -> Context | None:
        """Calls run in copies of this; ``None``: of the one ``set_on_request()`` was called in."""

    @property
    def cut(self) -> bool:
        """Whether no more calls begin, and a running call is its connection's last."""

    @property
    def caller(self) -> Callable[[Any, Function], Awaitable[Any]] | None:
        """Calls the function with the connection; ``None``: nothing else is to be done."""

    async def conclude(self, conn: Any, exc: BaseException | None) -> None:
        """No more calls will come: one has raised or was cancelled, the input has ended, or the
        connection was closed.
        """


class Requests(_native.Requests):
    """Request mode of one connection; see the module."""

    __slots__ = ()

    def __new__(cls, conn: Any, core: Core, function: Function, owner: Owner) -> Self:
        context = owner.context or copy_context()
        return super().__new__(
            cls, conn, core, function, owner, owner.caller, context, owner.workers
        )

    # --- plain functions, in the event loop's thread ---------------------------------------------

    def start(self, before: Function | None = None) -> None:
        """Begins. If ``before`` is given, a worker calls that first."""
        self.taskless = True
        self._before = before
        if before is None:
            try:
                if not self._look():
                    return
            except Exception:  # noqa: BLE001, S110 -- it will be found again, in a task
                pass
        self._submit()

    def replace(self, function: Function) -> None:
        """Calls this function from now on, also for input that an earlier one left unread."""
        if self.idle or function != self._function:  # a call that sets itself must not loop
            self._fresh = True
        self._function = function
        if self._leave_idle():
            _epoll.conn_disarm_read(self._core.handle)
            self.start()

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
            self._submit()
        elif not hub.spawn(self._submit_there):
            self.abandon()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """For an ``aclose()`` that has to read: meanwhile the connection is not idle."""
        self._begin_closing()
        try:
            yield
        finally:
            self._end_closing()
            if self._core._over:
                self.on_close()

    async def _submit_there(self) -> None:
        self._submit()

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

    # --- coroutines of a step --------------------------------------------------------------------

    async def _await(self, awaitable: Awaitable[Any]) -> None:
        """A call that is no coroutine."""
        await awaitable

    async def _conclude(self, exc: BaseException | None) -> None:
        """The end, after a call that raised the exception, or instead of one.

        It is no frame of the exception's traceback that keeps it, or each end would leave a garbage
        cycle that contains the connection.
        """
        error = None if exc is None else error_in(exc)
        try:
            if error is not None:
                self._send_carried()  # the owner decides
            self.stop()
            if exc is None or error is not None:
                await self._owner.conclude(self._conn, error)
                return
            with cancellation_suppressed():  # it must not replace this outcome
                await self._owner.conclude(self._conn, exc)
            raise exc
        finally:
            exc = error = None


class Unserved:
    """Owns connections that no server has, such as dialled ones: calls run in background tasks of
    the event loop.
    """

    context = None
    cut = False
    caller = None

    def __init__(self, hub: Hub) -> None:
        self.workers = Workers(hub, partial(hub.spawn, stoppable=True))

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
