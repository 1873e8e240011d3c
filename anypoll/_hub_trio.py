"""The hub of a Trio run: a system task that waits for the hub's descriptor.

An exception that left the system task would end the run as a TrioInternalError, so
:meth:`Hub.dispatch` lets none out. The task is cancelled when the run ends, and takes the hub
along; what uses a connection after that (another system task, an async generator's finaliser) finds
it closed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Iterable
from contextvars import Context, copy_context
from functools import partial
from threading import get_ident
from types import coroutine
from typing import Any

import trio
from outcome import Value
from trio.lowlevel import Abort, Task

from ._epoll import hub_fd
from ._hub import Hub, logger

_VALUES = 1024  # window ends for which the wake-up is kept


def _wait_trap(abort: Any) -> Any:
    """What ``wait_task_rescheduled(abort)`` yields to Trio's scheduler.

    Yielding it again and again, once for every wait, is cheaper than calling that function, which
    takes two more frames and builds a new message and a new result each time.
    """
    waiting = trio.lowlevel.wait_task_rescheduled(abort)  # noqa: ASYNC105 -- it never waits
    trap = waiting.send(None)
    waiting.close()
    return trap


def _abort(readers: dict[int, Any], number: int, _raise_cancel: Any) -> Abort:
    readers.pop(number, None)  # None: the hub has ended
    return Abort.SUCCEEDED


Function = Callable[[], Coroutine[Any, Any, None]]


async def _background(function: Function) -> None:
    """An exception that left a system task would end the run."""
    try:
        await function()
    except trio.Cancelled:
        raise
    except BaseException:  # noqa: BLE001
        logger.exception("A background task of a hub has failed")


def _spawn(function: Function, context: Context) -> None:
    trio.lowlevel.spawn_system_task(_background, function, context=context)


def _spawn_at_last(function: Function, context: Context) -> None:
    try:
        _spawn(function, context)
    except RuntimeError:
        logger.exception("A background task of a hub came after the end of its run")


class TrioHub(Hub):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._token: trio.lowlevel.TrioToken | None = trio.lowlevel.current_trio_token()
        self._thread = get_ident()
        self._traps: dict[int, Any] = {}
        self._values: dict[int, Value[int]] = {}
        trio.lowlevel.spawn_system_task(self._drain)

    async def _drain(self) -> None:
        fd = hub_fd(self.handle)
        try:
            while True:
                await trio.lowlevel.wait_readable(fd)
                self.dispatch()
        finally:
            self.end()
            self._token = None  # the registry of hubs would keep both for ever

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

    @coroutine
    def wait_read(self, number: int) -> Generator[Any, Any, int | None]:
        if get_ident() != self._thread:  # a thread has one run at a time
            raise RuntimeError("This object belongs to another event loop")
        trap = self._traps.get(number) or self._trap(number)
        self.readers[number] = trio.lowlevel.current_task()
        result = yield trap
        if type(result) is Value:
            return result.value  # type: ignore[no-any-return]  # unwrap() would be its last use
        return result.unwrap()  # type: ignore[no-any-return]

    def _trap(self, number: int) -> Any:
        trap = self._traps[number] = _wait_trap(partial(_abort, self.readers, number))
        return trap

    def forget(self, number: int) -> None:
        super().forget(number)
        self._traps.pop(number, None)

    def _wake_readers(self, tokens: Iterable[tuple[int, int, int]]) -> None:
        pop, reschedule, values = self.readers.pop, trio.lowlevel.reschedule, self._values
        for number, _, end in tokens:
            task = pop(number, None)
            if task is not None:
                reschedule(task, values.get(end) or self._value(end))
            else:
                self._read_over(number)

    def _value(self, end: int) -> Value[int]:
        value = Value(end)
        if len(self._values) < _VALUES:
            self._values[end] = value
        return value

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

    def wake(self, waiter: Task) -> None:
        trio.lowlevel.reschedule(waiter)
