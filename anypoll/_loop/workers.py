"""A worker pool: tasks, bound to no connection, that take jobs from one queue.

A job is one step of a connection in request mode. Ready jobs stand in a queue, which one worker at
a time processes. As long as its jobs do not suspend, it does the whole queue in one go, without a
task switch; before a job suspends for the first time, the worker has another take its place. So a
burst of short calls costs one wake-up, and a slow call delays nobody. A worker that finds no more
jobs parks, and is woken for the next, which is cheaper than starting a task; only a few may park.

A call may set context variables. Calls of other connections must not see those, so each job runs in
a copy of its own context, whatever the context of the worker's task.

Any code that finds a worker's task may cancel it. The worker's current job, if any, sees that, and
the worker ends; other ready jobs are left to the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from itertools import count
from types import coroutine
from typing import TYPE_CHECKING, Any, Protocol

from anyio import get_cancelled_exc_class

if TYPE_CHECKING:
    from .hub import Hub

#: Idle workers to keep.
_PARKED = 16
#: Jobs done in a row without suspending, before other tasks get a turn.
_JOBS = 64

_keys = count(1)  # of parked workers, among the hub's readers: negated, unlike connections


class Job(Protocol):
    """A unit of work."""

    context: Context
    """the job runs in copies of it"""

    def step(self) -> Coroutine[Any, Any, None]:
        """Does the job. An exception ends the worker's task."""

    def on_suspend(self) -> None:
        """Called when the job suspends for the first time. A plain function."""

    def abandon(self) -> None:
        """Called when no task will ever do the job."""


class Workers:
    """The worker pool; see the module. Call it only in the event loop's thread.

    :param start: starts a task that runs an async function; returns False if that is impossible now
    """

    __slots__ = ("_looking", "_parked", "_ready", "_start", "hub")

    def __init__(
        self, hub: Hub, start: Callable[[Callable[[], Coroutine[Any, Any, None]]], bool]
    ) -> None:
        self.hub = hub
        self._start = start
        self._ready: deque[Job] = deque()
        self._parked: list[int] = []
        self._looking = 0  # workers that will look at the queue, including those being woken

    def submit(self, job: Job) -> None:
        """Has the job done as soon as possible. A plain function."""
        self._ready.append(job)
        if not self._looking:
            self._rouse()

    def _rouse(self) -> None:
        self._looking += 1
        if self._parked:
            self.hub.wake_reader(self._parked.pop())
        elif not self._start(self._work):
            self._looking -= 1
            while self._ready:
                self._ready.popleft().abandon()

    async def _work(self) -> None:
        key = -next(_keys)
        try:
            await self._do_all()
            while len(self._parked) < _PARKED:
                await self._park(key)
                await self._do_all()
        except GeneratorExit:  # there may be no event loop any more
            raise
        except get_cancelled_exc_class():
            pass  # the cancellation ends here: a task group would take it for a failure
        finally:
            self.hub.forget(key)
            self._step_aside()

    async def _do_all(self) -> None:
        """Does all ready jobs."""
        done = 0
        while self._ready:
            await self._run(self._ready.popleft())
            done += 1
            if done % _JOBS == 0:
                await self.hub.checkpoint()

    def _step_aside(self) -> None:
        self._looking -= 1
        if self._ready and not self._looking:
            self._rouse()

    async def _park(self, key: int) -> None:
        self._parked.append(key)
        self._looking -= 1
        try:
            await self.hub.wait_read(key)
        except BaseException:
            self.hub.readers.pop(key, None)
            if key in self._parked:  # otherwise it was being woken, and counts as looking
                self._parked.remove(key)
                self._looking += 1
            raise

    @coroutine
    def _run(self, job: Job) -> Generator[Any, Any, None]:
        """``await job.step()``, stepping aside before that suspends for the first time."""
        step, run = job.step(), job.context.copy().run
        try:
            trap = run(step.send, None)
        except StopIteration:
            return
        run(job.on_suspend)
        self._step_aside()
        try:
            while True:
                raised = None
                try:
                    value = yield trap
                except GeneratorExit:
                    run(step.close)
                    raise
                except BaseException as exc:  # noqa: BLE001 -- it goes to the job
                    raised = exc
                trap = run(step.send, value) if raised is None else run(step.throw, raised)
        except StopIteration:
            return
        finally:
            raised = None  # its traceback refers to this frame
            self._looking += 1
