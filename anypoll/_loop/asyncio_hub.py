"""The hub on asyncio and uvloop: a reader callback on the hub's event descriptor.

One persistent reader callback on the hub's descriptor does all the waking; only the loop holds it.
Nothing calls us when a loop ends, but a loop drops its callbacks when it is closed, so the end of
the callback is the end of the hub. For that to work, the hub must not hold the loop; only the tasks
that wait in the hub do. So that a forgotten loop can be collected with these, nothing holds the hub
but the loop and the hub's connections.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from asyncio import AbstractEventLoop, Future, Task, current_task, get_running_loop, sleep
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from inspect import CORO_CREATED, getcoroutinestate, ismemberdescriptor
from typing import Any

from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from .._epoll import hub_fd
from .hub import Hub, Loan, logger
from .tasks import LeanTasks, Tasks

Function = Callable[[], Coroutine[Any, Any, None]]


#: Of AnyIO's scopes; with one before of its states of tasks, in the order of `enum anyio_slot` in
#: csrc/python/native.h.
_SLOTS = ("_cancel_called", "_shield", "_parent_scope")


def _register_of_tasks() -> tuple[Any, Any, tuple[Any, ...]] | None:
    """Where AnyIO keeps the scopes of tasks, which it does not publish, the type of what is there,
    and the descriptors of attributes. ``None`` if anything is not as it was: then AnyIO is asked
    each time.
    """
    try:
        from anyio._backends import _asyncio  # noqa: PLC0415

        backend: Any = _asyncio
        states, state = backend._task_states, backend.TaskState
        scope = backend.CancelScope()
        made = state(1, scope)
        known = (made.parent_id, made.cancel_scope) == (1, scope) and type(scope._tasks) is set
    except (ImportError, AttributeError, TypeError):
        return None
    scopes = (getattr(type(scope), name, None) for name in _SLOTS)
    slots = (getattr(state, "cancel_scope", None), *scopes)
    known = known and type(states) is weakref.WeakKeyDictionary
    return (states, state, slots) if known and all(map(ismemberdescriptor, slots)) else None


def _dict_of_current_tasks(loop: AbstractEventLoop) -> dict[Any, Any] | None:
    """asyncio's, if it is in use: from CPython 3.14 on there still is one, which is always empty if
    tasks are native.
    """
    tasks = getattr(asyncio.tasks, "_current_tasks", None)
    task = current_task()
    known = type(tasks) is dict and task is not None and tasks.get(loop) is task
    return tasks if known else None


def _queue_of(loop: AbstractEventLoop) -> weakref.ref[Any] | None:
    """What the loop will run next, if it also tells that it is going to stop. asyncio does not
    publish either, and uvloop hides them.
    """
    ready = getattr(loop, "_ready", None)
    known = isinstance(ready, deque) and isinstance(getattr(loop, "_stopping", None), bool)
    return weakref.ref(ready) if known else None


class _Unstoppable(Coroutine[Any, Any, None]):
    """A coroutine that starts even if its task was cancelled first: ``asyncio.run()`` cancels all
    tasks at its end, and a task created last would otherwise never run.

    Nor does it start before its task exists: an eager task factory would run it at once, in the
    middle of the code that created it.
    """

    __slots__ = ("_coroutine", "_may_begin", "_stoppable")

    def __init__(self, coroutine: Coroutine[Any, Any, None], *, stoppable: bool) -> None:
        self._coroutine = coroutine
        self._stoppable = stoppable
        self._may_begin = False

    def let_begin(self) -> None:
        self._may_begin = True

    def __await__(self) -> Generator[Any, Any, None]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        """``cr_frame`` and the like, by which AnyIO and debuggers inspect a task."""
        return getattr(self._coroutine, name)

    def send(self, value: Any) -> Any:
        return self._coroutine.send(value) if self._may_begin else None  # None: in the next round

    def throw(self, *exc: Any) -> Any:
        if getcoroutinestate(self._coroutine) == CORO_CREATED:
            trap = self._coroutine.send(None)
            if not self._stoppable:
                return trap
        return self._coroutine.throw(*exc)

    def close(self) -> None:
        self._coroutine.close()


def _log_failure(task: Task[None]) -> None:
    exc = None if task.cancelled() else task.exception()
    if exc is not None and not isinstance(exc, (SystemExit, KeyboardInterrupt)):  # they end the run
        logger.error("A background task of a hub has failed", exc_info=exc)


class _Drain:
    """The reader callback: a separate object, because its end is the end of the hub (but not at the
    end of the interpreter, when everything else has ended too).

    It also keeps the hub's background tasks alive, because the loop holds tasks only weakly. If the
    hub held them, a forgotten loop would never be collected.
    """

    __slots__ = ("__weakref__", "_hub", "_tasks")

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._tasks: set[Task[None]] = set()

    def start(self, loop: AbstractEventLoop, function: Function, stoppable: bool) -> None:
        coroutine = _Unstoppable(function(), stoppable=stoppable)
        task = loop.create_task(coroutine)
        coroutine.let_begin()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)  # no cycle through this object: it must end
        task.add_done_callback(_log_failure)

    def __call__(self) -> None:
        self._hub.dispatch()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            self._hub.end()


class AsyncioHub(Hub):
    """The hub of an asyncio or uvloop event loop; see the module."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        super().__init__()
        self._loop = weakref.ref(loop)
        self._current_task = current_task
        self._tasks = _dict_of_current_tasks(loop)
        self._look = checkpoint_if_cancelled
        self._register, self._states, self._slots = None, None, None
        if (known := _register_of_tasks()) is not None:
            self._register, self._states, self._slots = known[:2], known[0].data, known[2]
        self._can_rest = True
        self._queue = _queue_of(loop)
        drain = _Drain(self)
        self._drain = weakref.ref(drain)
        loop.add_reader(hub_fd(self.handle), drain)

    def check(self) -> None:
        if get_running_loop() is not self._loop():
            raise RuntimeError("This object belongs to another event loop")

    def is_here(self) -> bool:
        try:
            return get_running_loop() is self._loop()
        except RuntimeError:
            return False

    def is_running(self) -> bool:
        loop = self._loop()
        return loop is not None and loop.is_running()

    def current_task(self) -> object:
        try:
            return current_task()
        except RuntimeError:  # no event loop is running here
            return None

    def wait_read(self, number: int) -> Future[int | None]:
        loop = get_running_loop()
        if loop is not self._loop():
            raise RuntimeError("This object belongs to another event loop")
        future: Future[int | None] = loop.create_future()
        self.readers[number] = future
        return future

    async def wait_write(self, number: int) -> None:
        future: Future[None] = get_running_loop().create_future()
        self.writers.setdefault(number, []).append(future)
        try:
            await future
        except BaseException:
            waiters = self.writers.get(number, [])
            if future in waiters:
                waiters.remove(future)
                if not waiters:
                    del self.writers[number]
            raise

    async def checkpoint(self) -> None:
        await sleep(0)

    def _watch(self, loan: Loan) -> None:
        get_running_loop().add_reader(loan.fd, self.drive, loan)

    def _unwatch(self, loan: Loan) -> None:
        loop = self._loop()
        if loop is not None and not loop.is_closed():
            loop.remove_reader(loan.fd)

    def _call_soon(self, function: Callable[..., None], *args: Any) -> None:
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # it is closed
            return

    def spawn(self, function: Function, *, stoppable: bool = False) -> bool:
        loop, drain = self._loop(), self._drain()
        if loop is None or drain is None or loop.is_closed():
            return False
        if self.is_here():
            drain.start(loop, function, stoppable)
            return True
        try:
            start, context = drain.start, copy_context()
            loop.call_soon_threadsafe(start, loop, function, stoppable, context=context)
        except RuntimeError:  # another thread has closed the loop meanwhile
            return False
        return True

    def tasks_in(self, group: TaskGroup, context: Context) -> Tasks:
        if self._register is None:
            return Tasks(group.start_soon, context)
        return LeanTasks(group, context, get_running_loop(), *self._register)

    def wake(self, waiter: Future[None]) -> None:
        if not waiter.done():  # it may have been cancelled meanwhile
            waiter.set_result(None)
