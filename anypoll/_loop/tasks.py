"""Starting many tasks in an AnyIO task group.

AnyIO's ``start_soon()`` returns a handle, and makes for it a cancel scope, an event and a coroutine
around the task's own: 3 KiB, and more CPU time than all else in the life of a short connection.
A server never looks at the handles of its handlers' tasks. :class:`LeanTasks` starts asyncio's
tasks without, and keeps what AnyIO and its users rely on:

  - The task is in the group's cancel scope: a cancellation of the group, or of a scope around it,
    reaches it, again and again if need be. Scopes and task groups inside of the task are children
    of the group's scope, and ``current_effective_deadline()`` finds that scope's.
  - ``get_current_task()`` and ``get_running_tasks()`` know its parent.
  - The group does not end before the task: :meth:`Tasks.join` is awaited in its block.
  - If the task fails or is cancelled natively, the group is cancelled. An exception leaves the
    group within its ``BaseExceptionGroup``, except for those with which asyncio has ended the whole
    run by then.

For the first two it writes into AnyIO's registers of tasks, which AnyIO does not publish. They are
probed once for each hub (``asyncio_hub``): if anything is not as it was, and also if the event loop
has a task factory, the group starts the tasks.
"""

from __future__ import annotations

import sys
from asyncio import AbstractEventLoop, Task, current_task
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

import anyio
from anyio.abc import TaskGroup

if sys.version_info >= (3, 14):
    from asyncio import future_add_to_awaited_by, future_discard_from_awaited_by
else:

    def future_add_to_awaited_by(_task: Any, _waiter: Any) -> None: ...

    def future_discard_from_awaited_by(_task: Any, _waiter: Any) -> None: ...


Function = Callable[..., Coroutine[Any, Any, None]]


class Tasks:
    """Starts tasks in a group, through the given function.

    :param context: tasks run in copies of it
    """

    __slots__ = ("_context", "_start")

    def __init__(self, start: Callable[..., Any], context: Context) -> None:
        self._start = start
        self._context = context

    def start(self, function: Function, *args: Any) -> None:
        """Runs the function in a task of its own."""
        self._context.copy().run(self._start, function, *args)

    async def join(self) -> None:
        """To be awaited in the group's block, at its end; the tasks have ended when the group has.
        Shielded.
        """


class LeanTasks(Tasks):
    """Tasks without handles, on asyncio; see the module. Made and used in the group's block.

    :param states: AnyIO's register of tasks
    :param state: the type of its values
    """

    __slots__ = ("_group", "_host", "_idle", "_joined", "_loop", "_running", "_state", "_states")

    def __init__(
        self,
        group: TaskGroup,
        context: Context,
        loop: AbstractEventLoop,
        states: Any,
        state: Callable[[int, Any], Any],
    ) -> None:
        super().__init__(group.start_soon, context)
        self._group = group
        self._loop = loop
        self._host = current_task()
        self._states = states
        self._state = state
        self._running = 0
        self._joined = False
        self._idle: anyio.Event | None = None

    def start(self, function: Function, *args: Any) -> None:
        if self._joined or self._loop.get_task_factory() is not None:
            super().start(function, *args)
            return
        name = f"{function.__module__}.{function.__qualname__}"
        scope: Any = self._group.cancel_scope
        state = self._state(id(self._host), scope)
        task = Task(function(*args), loop=self._loop, name=name, context=self._context.copy())
        task.add_done_callback(self._over, context=self._context)
        self._running += 1  # from here on the group waits for it, whatever is raised
        self._states[task] = state
        scope._tasks.add(task)
        future_add_to_awaited_by(task, self._host)

    def _over(self, task: Task[None]) -> None:
        """Does what the group does when one of its own tasks has ended."""
        future_discard_from_awaited_by(task, self._host)
        scope: Any = self._group.cancel_scope
        self._states.pop(task, None)
        scope._tasks.discard(task)
        self._running -= 1
        if self._idle is not None and not self._running:
            self._idle.set()
        exc = None if task.cancelled() else task.exception()
        if task.cancelled() or isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self._group.cancel_scope.cancel()
        elif exc is not None:
            self._group.start_soon(_raise, exc)

    async def join(self) -> None:
        self._joined = True
        if self._running:
            self._idle = anyio.Event()
            await wait_shielded(self._idle)


async def _raise(exc: BaseException) -> None:
    """The group gets it as the exception of a task of its own."""
    try:
        raise exc
    finally:
        del exc


async def wait_shielded(event: anyio.Event) -> None:
    """Waits despite any cancellation, and raises that afterwards."""
    cancelled: BaseException | None = None
    with anyio.CancelScope(shield=True):
        while not event.is_set():
            try:
                await event.wait()
            except anyio.get_cancelled_exc_class() as exc:  # asyncio's native cancellation
                cancelled = exc
    if cancelled is not None:
        raise cancelled
