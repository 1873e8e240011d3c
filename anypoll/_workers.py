"""Tasks that are not bound to a connection: each does one job after another.

A job is one step of a connection in request mode. Jobs that are ready stand in a queue, and one
worker at a time looks at it. As long as what it does there does not suspend, it does the whole
queue in one go, without a switch of tasks; before it suspends for the first time, it sees to it
that another worker takes its place. So a burst of short calls costs one wake-up, and a slow call
delays nobody. A worker that finds nothing more parks, and is woken for the next job, which is
cheaper than starting a task; only a few may park.

A call may set context variables. Those must not be seen by the call of another connection, so a
worker whose context has changed ends instead of taking another job.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from itertools import count
from types import coroutine
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ._hub import Hub

#: Idle workers that are kept.
_PARKED = 16
#: Jobs done in a row without a suspension, before other tasks get their turn.
_JOBS = 64

_keys = count(1)  # of parked workers, among the hub's readers: negated, unlike connections


class Job(Protocol):
    """What workers do."""

    def step(self) -> Coroutine[Any, Any, None]:
        """Does it. What it raises ends the worker's task."""

    def on_suspend(self) -> None:
        """It suspends for the first time. A plain function."""

    def abandon(self) -> None:
        """No task will ever do it."""


class Workers:
    """See the module. All calls come from the thread of the event loop.

    :param start: begins a task that runs an async function; False if that is not possible any more
    """

    __slots__ = ("_hub", "_looking", "_parked", "_ready", "_start")

    def __init__(
        self, hub: Hub, start: Callable[[Callable[[], Coroutine[Any, Any, None]]], bool]
    ) -> None:
        self._hub = hub
        self._start = start
        self._ready: deque[Job] = deque()
        self._parked: list[int] = []
        self._looking = 0  # workers that will look at the queue, those that are being woken too

    def submit(self, job: Job) -> None:
        """Has it done, as soon as possible. A plain function."""
        self._ready.append(job)
        if not self._looking:
            self._rouse()

    def _rouse(self) -> None:
        self._looking += 1
        if self._parked:
            self._hub.wake_reader(self._parked.pop())
        elif not self._start(self._work):
            self._looking -= 1
            while self._ready:
                self._ready.popleft().abandon()

    async def _work(self) -> None:
        base = copy_context()
        key = -next(_keys)
        try:
            while await self._do_all(base) and len(self._parked) < _PARKED:
                await self._park(key)
        finally:
            self._hub.forget(key)
            self._step_aside()

    async def _do_all(self, base: Context) -> bool:
        """Does what is ready. Returns whether this task may do more."""
        done = 0
        while self._ready:
            await self._run(self._ready.popleft())
            if not _same(copy_context(), base):
                return False
            done += 1
            if done % _JOBS == 0:
                await self._hub.checkpoint()
        return True

    def _step_aside(self) -> None:
        self._looking -= 1
        if self._ready and not self._looking:
            self._rouse()

    async def _park(self, key: int) -> None:
        self._parked.append(key)
        self._looking -= 1
        try:
            await self._hub.wait_read(key)
        except BaseException:
            self._hub.readers.pop(key, None)
            if key in self._parked:  # else it was being woken, and counts as one that looks
                self._parked.remove(key)
                self._looking += 1
            raise

    @coroutine
    def _run(self, job: Job) -> Generator[Any, Any, None]:
        """``await job.step()``, and steps aside before that suspends for the first time."""
        step = job.step()
        try:
            trap = step.send(None)
        except StopIteration:
            return
        job.on_suspend()
        self._step_aside()
        try:
            while True:
                raised = None
                try:
                    value = yield trap
                except GeneratorExit:
                    step.close()
                    raise
                except BaseException as exc:  # noqa: BLE001 -- it goes to the job
                    raised = exc
                trap = step.send(value) if raised is None else step.throw(raised)
        except StopIteration:
            return
        finally:
            self._looking += 1


def _same(a: Context, b: Context) -> bool:
    try:
        return a == b
    except Exception:  # noqa: BLE001 -- of a value that does not like to be compared
        return False
