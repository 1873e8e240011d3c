"""Close callbacks: a LIFO stack of functions that run once when a connection has ended.

A callback *waits* until the connection is released. Then it lies on a *stack*, from which it is
taken, last in first out, exactly once. Callbacks are released by:

  - a server, when the handler has ended and the connection is closed; it waits for them;
  - ``aclose()`` of a connection that no handler has; it waits for them too;
  - ``abort()``, ``detach()``, an idle end, the end of the event loop, the garbage collector: these
    cannot wait. Plain callbacks run at once, async ones in a task of the hub.

A callback added after the close is released at once.

An ``Exception`` from a callback is logged. An exception that ends the program, such as
``SystemExit``, propagates once the others have had their turn: to the waiter, or else to the hub,
which ends the loop.

Async callbacks always run in a task of the hub, one after another, even if someone waits for them.
So nothing done to the waiting task reaches them: a shielded scope would stop a cancel scope, but
not a native ``Task.cancel()``. The hub's task has the context variables of whoever started it. The
waiter waits shielded, and sees its cancellation afterwards.

A callback may close connections, including its own. Inside a callback, ``aclose()`` does not wait
for callbacks that are already running elsewhere: those of two connections that close each other,
like the two sides of a proxy, would wait for each other.

The stack belongs to the event loop's thread. The garbage collector may run in any thread, but then
nothing else has the connection, and it calls only the hub, which allows that from any thread. In
the child of a fork no callback runs: the connection that will end is the parent's.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio

from .tasks import wait_shielded

if TYPE_CHECKING:
    from .hub import Hub

logger = logging.getLogger("anypoll.connection")

#: Whether the running code was called by a close callback.
_inside: ContextVar[bool] = ContextVar("anypoll_inside_close_callback", default=False)

Callback = Callable[[], Any] | Callable[[Any], Any]


class _Callback:
    """A callback as it was given, and how to call it. It refers to the connection, and so is to be
    forgotten when it has been called.
    """

    __slots__ = ("conn", "function", "is_async", "with_conn")

    conn: Any
    function: Callable[..., Any]
    is_async: bool
    with_conn: bool

    def __init__(self, conn: Any, function: Callback) -> None:
        if not callable(function):
            raise TypeError(f"a close callback must be callable, not {function!r}")
        self.conn = conn
        self.function = function
        self.with_conn = _needs_an_argument(function)
        called = getattr(function, "__call__", None)  # noqa: B004 -- of a callable object
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)

    def call(self) -> Any:
        return self.function(self.conn) if self.with_conn else self.function()

    def __str__(self) -> str:
        return getattr(self.function, "__qualname__", None) or repr(self.function)


class _Begun(_Callback):
    """The awaitable that a plain callback returned: treated like an async callback."""

    __slots__ = ("result",)

    def __init__(self, one: _Callback, result: Awaitable[Any]) -> None:
        self.function = one.function
        self.is_async = True
        self.result = result

    def call(self) -> Any:
        return self.result


def _needs_an_argument(function: Callable[..., Any]) -> bool:
    """Whether the function needs the connection; it is called without, if it can be."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a built-in without a signature
        return False
    for arguments in ((), (None,)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return bool(arguments)
    raise TypeError(
        f"a close callback must take no argument or the connection; this is {function!r}{signature}"
    )


class Callbacks:
    """The close callbacks of one connection; see the module."""

    __slots__ = (
        "_ended",
        "_fault",
        "_hub",
        "_pid",
        "_running",
        "_stack",
        "_timeout",
        "_waiting",
    )

    def __init__(self, hub: Hub, timeout: float) -> None:
        self._hub = hub
        self._timeout = timeout
        self._pid = os.getpid()
        self._waiting: list[_Callback] = []
        self._stack: list[_Callback] = []
        self._running = False  # a task of the hub is working through the stack
        self._ended: anyio.Event | None = None  # set at the end, if someone waits for it
        self._fault: BaseException | None = None  # ends the program; raised in the waiter

    def add(self, conn: Any, function: Callback, *, late: bool) -> None:
        """Adds a callback; ``late``: the connection has already ended.

        :raises TypeError: if it cannot be called with one argument or none; nothing is changed then
        """
        one = _Callback(conn, function)
        if not late:
            self._waiting.append(one)
        elif one.is_async:
            self._stack.append(one)
            self._start()
        else:
            self._call(one)

    # --- released by code that cannot wait -------------------------------------------------------

    def run_now(self) -> None:
        """Runs plain callbacks at once, async ones in a task of the hub."""
        released = self._release()
        self._stack += [one for one in released if one.is_async]
        plain = [one for one in released if not one.is_async]
        try:
            while plain:
                self._call(plain.pop())
        finally:  # something like KeyboardInterrupt must not cost the others their turn
            self._stack += plain
            self._start()

    def run_soon(self) -> None:
        """Runs all of them in a task of the hub; for the garbage collector. Any thread."""
        self._stack += self._release()
        self._start()

    # --- released by code that waits -------------------------------------------------------------

    async def run(self) -> None:
        """Runs all, including those released earlier. Cancellation takes effect after that."""
        self._stack += self._release()
        mine = not self._running
        try:
            while not self._running and self._stack and not self._stack[-1].is_async:
                self._call(self._stack.pop())  # plain callbacks need no task
        finally:
            self._start()
        if self._running and (mine or not _inside.get()):
            self._ended = self._ended or anyio.Event()
            try:
                await wait_shielded(self._ended)
            finally:
                self._raise_fault()

    def _raise_fault(self) -> None:
        fault, self._fault = self._fault, None
        try:
            if fault is not None:
                raise fault
        finally:
            del fault  # its traceback refers to this frame

    def _release(self) -> list[_Callback]:
        released, self._waiting = self._waiting, []
        return released if os.getpid() == self._pid else []

    # --- running ---------------------------------------------------------------------------------

    def _call(self, one: _Callback) -> None:
        """Calls a plain callback; what it returns may still be awaitable."""
        try:
            result = one.call()
        except Exception:
            logger.exception("The close callback %s has failed", one)
            return
        if inspect.isawaitable(result):
            self._stack.append(_Begun(one, result))
            self._start()

    def _start(self) -> None:
        if self._running or not self._stack:
            return
        self._running = True
        if not self._hub.spawn(self._work):
            self._running = False
            self._run_without_a_loop()

    async def _work(self) -> None:
        _inside.set(True)
        try:
            while self._stack:
                await self._run_one(self._stack.pop())
        except GeneratorExit:
            raise
        except BaseException as exc:
            if self._ended is None or self._fault is not None:
                raise
            self._fault = exc
        finally:
            self._running = False
            self._start()  # the others, if something like SystemExit ended one of them
            if not self._running and self._ended is not None:
                self._ended.set()
                self._ended = None

    async def _run_one(self, one: _Callback) -> None:
        try:
            result = one.call()
            if inspect.isawaitable(result):
                await self._within_the_limit(one, result)
        except Exception:
            logger.exception("The close callback %s has failed", one)
        except anyio.get_cancelled_exc_class():  # asyncio.run() cancels all tasks at its end
            logger.error("The close callback %s was cancelled", one)

    async def _within_the_limit(self, one: _Callback, result: Awaitable[Any]) -> None:
        with anyio.move_on_after(self._timeout, shield=True) as scope:
            await result
        if scope.cancel_called:
            logger.error(
                "The close callback %s took longer than %s s: cancelled", one, self._timeout
            )

    def _run_without_a_loop(self) -> None:
        """The event loop has ended: there is nowhere left to await anything."""
        while self._stack:
            one = self._stack.pop()
            if not one.is_async:
                self._call(one)
                continue
            logger.error("The close callback %s came after the end of its event loop", one)
            if isinstance(one, _Begun) and inspect.iscoroutine(one.result):
                one.result.close()


@contextmanager
def cancellation_suppressed() -> Iterator[None]:
    """For the last steps before another exception propagates."""
    try:
        yield
    except BaseException as exc:
        if not isinstance(exc, anyio.get_cancelled_exc_class()):
            raise
