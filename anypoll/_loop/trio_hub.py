"""The hub on Trio: a system task that waits for the hub's event descriptor.

An exception that left a system task would end the run with a ``TrioInternalError``. So errors are
logged, and exceptions that end the program (``SystemExit``, ``KeyboardInterrupt``) are handed to
the main task, which is cancelled and ends with them.

The system task is cancelled when the run ends, and takes the hub with it. Code that uses a
connection after that (another system task, an async generator's finaliser) finds it closed.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from functools import partial
from inspect import ismemberdescriptor
from threading import get_ident
from types import FrameType
from typing import Any, NamedTuple

import trio
from anyio.abc import TaskGroup
from outcome import Value
from trio.lowlevel import Abort, Task

from .._epoll import hub_fd
from .hub import Hub, Loan, logger
from .tasks import Tasks

_VALUES = 1024  # window ends whose wake-up values are cached


def _wait_trap(abort: Any) -> Any:
    """What ``wait_task_rescheduled(abort)`` yields to Trio's scheduler.

    Yielding the same object for every wait is cheaper than calling that function, which takes two
    more frames and builds a new message and a new result each time.
    """
    return _trap_of(trio.lowlevel.wait_task_rescheduled(abort))  # noqa: ASYNC105 -- it never waits


def _trap_of(waiting: Coroutine[Any, Any, Any]) -> Any:
    trap = waiting.send(None)
    waiting.close()
    return trap


def _abort(readers: dict[int, Any], number: int, _raise_cancel: Any) -> Abort:
    readers.pop(number, None)  # None: the hub has ended
    return Abort.SUCCEEDED


@trio.lowlevel.disable_ki_protection
def _unprotected(step: Callable[[], Any]) -> Any:
    """Calls a step of a handler, in which a KeyboardInterrupt may be raised at any time."""
    return step()


@trio.lowlevel.enable_ki_protection
def _can_unprotect() -> bool:
    return not _unprotected(trio.lowlevel.currently_ki_protected)


#: Of Trio's tasks; with two more of others, in the order of `enum trio_slot` in
#: csrc/python/native.h.
_SLOTS = ("_abort_func", "_cancel_points", "_schedule_points", "context", "_cancel_status")


class _Inside(NamedTuple):
    """What resuming a handler directly needs and Trio does not publish."""

    tasks: dict[str, Any]
    """where this thread's run keeps the current task"""
    runner: Any
    """of the run"""
    wait_trap: type
    """of what tasks yield that wait"""
    instruments: dict[str, Any]
    """by hook, and all"""
    slots: tuple[Any, ...]
    """descriptors"""


def _inside_of_trio() -> _Inside | None:
    """``None`` if anything is not as it was."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT, Task as RunTask  # noqa: PLC0415
        from trio._core._traps import WaitTaskRescheduled  # noqa: PLC0415
    except ImportError:
        return None
    task: Any = trio.lowlevel.current_task()
    names = ("_attempt_delivery_of_any_pending_cancel", "_ki_protected")
    if type(task) is not RunTask or not all(hasattr(task, name) for name in names):
        return None
    runner = getattr(task, "_runner", None)
    slots = (
        *(getattr(RunTask, name, None) for name in _SLOTS),
        getattr(type(task._cancel_status), "effectively_cancelled", None),
        getattr(type(runner), "ki_pending", None),
    )
    if not all(map(ismemberdescriptor, slots)):
        return None
    if type(getattr(task._cancel_status, "effectively_cancelled", None)) is not bool:
        return None
    tasks = GLOBAL_RUN_CONTEXT.__dict__
    if type(tasks) is not dict or tasks.get("task") is not task:
        return None
    trap = _wait_trap(_unprotected)
    if type(trap) is not WaitTaskRescheduled or trap.abort_func is not _unprotected:
        return None
    instruments = getattr(runner, "instruments", None)
    instruments = getattr(instruments, "data", instruments)  # a UserDict
    if not isinstance(instruments, dict) or "_all" not in instruments or not _can_unprotect():
        return None
    return _Inside(tasks, runner, WaitTaskRescheduled, instruments, slots)


def _queue_of_run() -> weakref.ref[Any] | None:
    """What the run will step next, which Trio does not publish."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT  # noqa: PLC0415
    except ImportError:
        return None
    queue = getattr(getattr(GLOBAL_RUN_CONTEXT, "runner", None), "runq", None)
    return weakref.ref(queue) if isinstance(queue, deque) else None


def _frame_of_run() -> FrameType | None:
    """The frame of Trio's loop, whose variable ``batch`` has those tasks of the current round that
    have not run yet.
    """
    try:
        from trio._core._run import unrolled_run  # noqa: PLC0415
    except ImportError:
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not unrolled_run.__code__:
        frame = frame.f_back
    return frame if frame is not None and type(frame.f_locals.get("batch")) is list else None


def _forget(hub: Hub, number: int, _raise_cancel: Any) -> Abort:
    hub._forget_waiting(number)
    return Abort.SUCCEEDED


Function = Callable[[], Coroutine[Any, Any, None]]


class _Doomed(Coroutine[Any, Any, Any]):
    """The main task's coroutine, wrapped to end with another exception."""

    __slots__ = ("_coroutine", "end", "ended")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], end: BaseException) -> None:
        self._coroutine = coroutine
        self.end = end
        self.ended = False

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        """``cr_frame`` and the like, by which Trio and debuggers inspect a task."""
        return getattr(self._coroutine, name)

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        try:
            return step(*args)
        except (StopIteration, trio.Cancelled):
            self.ended = True
        except BaseException as exc:
            self.ended = True
            raise self.end from exc
        raise self.end

    def send(self, value: Any) -> Any:
        return self._step(self._coroutine.send, value)

    def throw(self, *exc: Any) -> Any:
        return self._step(self._coroutine.throw, *exc)

    def close(self) -> None:
        self._coroutine.close()


def _end_run(end: BaseException) -> None:
    """Cancels the main task, which then ends with this exception, and with it the run."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    innermost = root.child_nurseries[-1]  # the main task's, while that is running
    if innermost is not trio.lowlevel.current_task().parent_nursery:
        main: Any
        for main in innermost.child_tasks:
            if not isinstance(main.coro, _Doomed):
                main.coro = doomed = _Doomed(main.coro, end)
                trio.lowlevel.spawn_system_task(_cancel, innermost.cancel_scope, doomed)
                return
    _log_too_late(end)


async def _cancel(scope: trio.CancelScope, doomed: _Doomed) -> None:
    """Cancels the main task once it can be resumed by its new coroutine alone.

    A task that is scheduled already takes one more step with its original coroutine, in this batch
    or the next. It must not be cancelled before: the `Cancelled` of a deadline that has just
    expired would pass its own scope, and end the task in that very step.
    """
    try:
        await trio.lowlevel.cancel_shielded_checkpoint()
        scope.cancel()
        await trio.sleep_forever()
    finally:
        if not doomed.ended:
            _log_too_late(doomed.end)


def _log_too_late(end: BaseException) -> None:
    logger.critical("This was to end a Trio run that was ending already", exc_info=end)


async def _background(function: Function) -> None:
    try:
        await function()
    except trio.Cancelled:
        raise
    except Exception:  # noqa: BLE001
        logger.exception("A background task of a hub has failed")
    except BaseException as exc:  # noqa: BLE001
        _end_run(exc)


def _spawn(function: Function, context: Context) -> None:
    trio.lowlevel.spawn_system_task(_background, function, context=context)


def _spawn_at_last(function: Function, context: Context) -> None:
    try:
        _spawn(function, context)
    except RuntimeError:
        logger.exception("A background task of a hub came after the end of its run")


class TrioHub(Hub):
    """The hub of a Trio run; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self._token: trio.lowlevel.TrioToken | None = trio.lowlevel.current_trio_token()
        self._thread = get_ident()
        self._is_trio = True
        self._current_task = trio.lowlevel.current_task
        self._reschedule = trio.lowlevel.reschedule
        self._value = Value(None)
        self._look = trio.lowlevel.checkpoint_if_cancelled
        self._shielded = _trap_of(trio.lowlevel.cancel_shielded_checkpoint())  # noqa: ASYNC105
        self._abort_succeeded = Abort.SUCCEEDED
        self._abort_failed = Abort.FAILED
        self._unprotected = _unprotected
        inside = _inside_of_trio() or (None, None, None, None, None)
        self._tasks, self._runner, self._wait_trap, self._instruments, self._slots = inside
        self._queue = _queue_of_run()
        self._frame = _frame_of_run()
        self._scope: trio.CancelScope | None = None  # of the task that drives
        trio.lowlevel.spawn_system_task(self._drain)
        if self._slots is not None:
            trio.lowlevel.spawn_system_task(self._rest)

    async def _drain(self) -> None:
        fd = hub_fd(self.handle)
        try:
            while True:
                await trio.lowlevel.wait_readable(fd)
                try:
                    self.dispatch()
                except BaseException as exc:  # noqa: BLE001
                    _end_run(exc)
        finally:
            try:
                self.end()
            except BaseException as exc:  # noqa: BLE001
                _end_run(exc)
            self._token = None  # the registry of hubs would keep both forever
            self._frame = None

    async def _rest(self) -> None:
        """Resumes the handlers that have let the scheduler have a round (csrc/python/rest.c)."""
        self._can_rest = True
        try:
            while True:
                self._rester = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort_rest)
                more = True
                while more:
                    try:
                        more = self._resume_rested(None)
                    except BaseException as exc:  # noqa: BLE001
                        _end_run(exc)
                    if more:
                        await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._stop_resting()

    def _abort_rest(self, _raise_cancel: Any) -> Abort:
        self._rester = None
        return Abort.SUCCEEDED

    async def _drive(self, loan: Loan, scope: trio.CancelScope) -> None:
        with scope:
            while not scope.cancel_called:  # another task may wait for that descriptor by then
                await trio.lowlevel.wait_readable(loan.fd)
                try:
                    self.drive(loan)
                except BaseException as exc:  # noqa: BLE001
                    _end_run(exc)

    def _watch(self, loan: Loan) -> None:
        self._scope = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._drive, loan, self._scope)

    def _unwatch(self, _loan: Loan) -> None:
        assert self._scope is not None
        self._scope.cancel()

    def _call_soon(self, function: Callable[..., None], *args: Any) -> None:
        token = self._token
        try:
            if token is not None:
                token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            return

    def check(self) -> None:
        if not self.is_here():
            raise RuntimeError("This object belongs to another event loop")

    def is_here(self) -> bool:
        try:
            return trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            return False

    def is_running(self) -> bool:
        return self._token is not None

    def current_task(self) -> object:
        try:
            return trio.lowlevel.current_task()
        except RuntimeError:
            return None

    async def wait_read(self, number: int) -> None:
        self.readers[number] = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(partial(_abort, self.readers, number))

    @property
    def can_resume_directly(self) -> bool:
        """Whether handlers can be resumed directly."""
        return self._slots is not None

    def _drive_trap(self, abort: Any) -> Any:
        return _wait_trap(abort)

    def _trap(self, number: int) -> Any:
        return _wait_trap(partial(_forget, self, number))

    def _wake_later(self, operation: Any, task: Task) -> None:
        """Resumes the running task once it waits, unless it is cancelled first."""
        task.custom_sleep_data = operation  # Trio forgets it with every rescheduling
        self._call_soon(self._wake_sleeping, operation, task)

    def _wake_sleeping(self, operation: Any, task: Task) -> None:
        if task.custom_sleep_data is operation:
            operation._wake()

    async def wait_write(self, number: int) -> None:
        task = trio.lowlevel.current_task()
        self.writers.setdefault(number, []).append(task)

        def abort(_raise_cancel: Any) -> Abort:
            waiters = self.writers.get(number, [])
            if task in waiters:
                waiters.remove(task)
                if not waiters:
                    del self.writers[number]
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def checkpoint(self) -> None:
        await trio.lowlevel.checkpoint()

    def spawn(self, function: Function, *, stoppable: bool = False) -> bool:  # noqa: ARG002
        token, context = self._token, copy_context()
        if token is None:
            return False
        try:
            if self.is_here():
                _spawn(function, context)
            else:
                token.run_sync_soon(_spawn_at_last, function, context)
        except RuntimeError:  # the run is over
            return False
        return True

    def tasks_in(self, group: TaskGroup, context: Context) -> Tasks:
        nursery = getattr(group, "_nursery", None)  # AnyIO's own; without it AnyIO is asked
        return Tasks((nursery if isinstance(nursery, trio.Nursery) else group).start_soon, context)

    def wake(self, waiter: Task) -> None:
        trio.lowlevel.reschedule(waiter)
