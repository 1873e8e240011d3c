"""Workers by themselves: every job is done once, whatever becomes of the tasks."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from peers import holds

import anypoll
from anypoll._connection.requests import Requests
from anypoll._loop import runtime as _runtime
from anypoll._loop.workers import Workers

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")])
Function = Callable[[], Awaitable[Any]]

PARKED = 16  # idle workers are kept, at most (csrc/python/workers.c)


async def until(condition: Callable[..., object], *args: Any) -> None:
    """As ``holds``, for a condition about the values of now."""
    await holds(functools.partial(condition, *args))


class Step:
    """A step of a connection in request mode, whose owner this is. It counts what becomes of it."""

    cut = False
    caller = None

    def __init__(
        self, workers: Workers, function: Function, context: contextvars.Context | None = None
    ) -> None:
        self.workers = workers
        self.context = context or contextvars.Context()
        self._function = function
        self.begun = self.ended = 0
        self.failure: BaseException | None = None
        self.conn, self._peer = anypoll.socketpair()
        core = self.conn._core
        core.requests = Requests(self.conn, core, nothing, self)

    def submit(self) -> None:
        self.conn._core.requests.start(self._begin)

    async def _begin(self, _conn: Any) -> None:
        self.begun += 1
        await self._function()
        self.ended += 1

    async def conclude(self, _conn: Any, exc: BaseException | None) -> None:
        self.failure = exc


class Team:
    """Workers whose tasks are those of a group, and are counted."""

    def __init__(self, group: anyio.abc.TaskGroup) -> None:
        self._group = group
        self.started = 0
        self.workers = Workers(_runtime.current_hub(), self._start)

    def _start(self, function: Any) -> bool:
        self.started += 1
        self._group.start_soon(function)
        return True

    def submit(self, function: Function, context: contextvars.Context | None = None) -> Step:
        step = Step(self.workers, function, context)
        step.submit()
        return step

    @property
    def parked(self) -> int:
        return self.workers._parked

    @property
    def at_rest(self) -> bool:
        return not self.workers._looking and not self.workers._ready


async def nothing(*_: Any) -> None:
    pass


async def test_short_jobs_are_done_by_one_worker_in_order() -> None:
    done: list[int] = []

    async def job(i: int) -> None:
        done.append(i)

    async with anyio.create_task_group() as group:
        team = Team(group)
        for round_ in range(1, 4):
            for i in range(100):
                team.submit(functools.partial(job, i))
            assert len(done) == 100 * (round_ - 1)  # it is a plain function
            await until(lambda r: len(done) == 100 * r, round_)
        assert done == list(range(100)) * 3
        await holds(lambda: team.parked == 1)
        assert team.started == 1
        assert team.at_rest
        group.cancel_scope.cancel()


async def test_a_job_that_waits_holds_up_nobody() -> None:
    go_on = anyio.Event()
    async with anyio.create_task_group() as group:
        team = Team(group)
        slow, quick = [], []
        for _ in range(30):
            slow.append(team.submit(go_on.wait))
            quick.append(team.submit(nothing))
        await holds(lambda: all(step.begun for step in slow) and all(step.ended for step in quick))
        assert not any(step.ended for step in slow)
        go_on.set()
        await holds(lambda: all(step.ended == 1 for step in slow))
        await holds(lambda: team.parked == PARKED)  # the others have ended
        assert team.at_rest
        group.cancel_scope.cancel()


class Fatal(BaseException):
    """What ends the program."""


@pytest.mark.parametrize("error", [LookupError, Fatal])
async def test_what_a_job_raises(error: type[BaseException]) -> None:
    """The owner is told; and what ends the program ends the worker's task, and no other."""
    failures: list[BaseException] = []

    async def fail() -> None:
        raise error

    async def fail_later() -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    async with anyio.create_task_group() as group:

        def start(function: Callable[[], Awaitable[Any]]) -> bool:
            async def run() -> None:
                try:
                    await function()
                except Fatal as exc:
                    failures.append(exc)

            group.start_soon(run)
            return True

        workers = Workers(_runtime.current_hub(), start)
        steps = [Step(workers, (fail, fail_later, nothing)[i % 3]) for i in range(30)]
        for step in steps:
            step.submit()
        await holds(lambda: all(step.failure or step.ended for step in steps))
        await holds(lambda: len(failures) == (20 if error is Fatal else 0))
        await holds(lambda: not workers._looking)
        group.cancel_scope.cancel()
    assert all(step.begun == 1 for step in steps)
    assert all(step.ended == (i % 3 == 2) for i, step in enumerate(steps))
    assert all(isinstance(step.failure, error) for step in steps if not step.ended)


async def test_jobs_see_their_own_context() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    seen: list[tuple[int, int]] = []

    async def job(i: int) -> None:
        before = variable.get()
        variable.set(-1)
        if i % 2:
            await anyio.lowlevel.checkpoint()
        assert variable.get() == -1
        seen.append((i, before))

    async with anyio.create_task_group() as group:
        team = Team(group)
        for i in range(100):
            context = contextvars.copy_context()
            context.run(variable.set, i)
            for _ in range(2):  # what is set is forgotten
                team.submit(functools.partial(job, i), context)
        await holds(lambda: len(seen) == 200)
        group.cancel_scope.cancel()
    assert all(i == value for i, value in seen)


async def test_nobody_can_do_it() -> None:
    workers = Workers(_runtime.current_hub(), lambda _: False)
    for _ in range(3):
        step = Step(workers, nothing)
        step.submit()
        assert step.begun == 0
        assert step.conn._core.closed  # nothing would ever happen to it
        assert not workers._ready


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("failures", [1, 2])
async def test_starting_a_worker_is_interrupted(begun: bool, failures: int) -> None:
    """An exception of a signal handler leaves the function that has made the job due. The job is
    done all the same, or abandoned.
    """
    async with anyio.create_task_group() as group:
        left = failures

        def start(function: Callable[[], Awaitable[Any]]) -> bool:
            nonlocal left
            left -= 1
            if begun or left < 0:
                group.start_soon(function)
            if left >= 0:
                raise Fatal
            return True

        workers = Workers(_runtime.current_hub(), start)
        step = Step(workers, nothing)
        with pytest.raises(Fatal):
            step.submit()
        assert step.conn._core.closed == (failures == 2)
        await holds(lambda: step.ended or failures == 2)
        left = 0
        for _ in range(3):
            following = Step(workers, nothing)
            following.submit()
            await until(lambda step: step.ended, following)
        await holds(lambda: not workers._looking and not workers._ready)
        assert step.begun == (failures == 1)
        group.cancel_scope.cancel()


async def test_a_worker_is_closed() -> None:
    """As at the end of a loop. Whatever its call makes of that, no other call is made in there."""

    class Stubborn(Step):
        async def _begin(self, _conn: Any) -> None:
            self.begun += 1
            with contextlib.suppress(GeneratorExit):
                await anyio.sleep_forever()
            self.ended += 1

    functions: list[Any] = []

    def start(function: Any) -> bool:
        functions.append(function)
        return True

    workers = Workers(_runtime.current_hub(), start)
    held, following = Stubborn(workers, nothing), Step(workers, nothing)
    held.submit()
    task = functions.pop()()
    task.send(None)
    assert held.begun
    following.submit()
    task.close()
    assert held.ended == 1
    assert following.begun == 0
    async with anyio.create_task_group() as group:
        group.start_soon(functions.pop())
        await holds(lambda: following.ended == 1)
        group.cancel_scope.cancel()


async def test_the_hub_resumes_nobody_any_more() -> None:
    """A worker has its turns by itself then, however long the queue is."""
    async with anyio.create_task_group() as group:
        team = Team(group)
        team.submit(nothing)
        await holds(lambda: team.parked == 1)
        team.workers.hub._stop_resting()
        try:
            steps = [team.submit(nothing) for _ in range(200)]
            await holds(lambda: all(step.ended == 1 for step in steps))
            await holds(lambda: team.at_rest)
        finally:
            team.workers.hub._can_rest = True
        assert team.started == 1
        group.cancel_scope.cancel()


async def test_the_scope_of_all_is_cancelled() -> None:
    """Those that wait see it, parked ones end, and what was not begun is begun and sees it."""
    async with anyio.create_task_group() as group:
        team = Team(group)
        steps = [team.submit(anyio.sleep_forever) for _ in range(5)]
        await holds(lambda: all(step.begun for step in steps))
        team.submit(nothing)
        await holds(lambda: team.parked == 1)
        late = team.submit(anyio.sleep_forever)

        async def stay() -> None:
            """Or the group might end before anybody has looked at the queue."""
            with anyio.CancelScope(shield=True):
                await holds(lambda: late.failure is not None)

        group.start_soon(stay)
        group.cancel_scope.cancel()
    assert all(step.failure is not None and step.begun == 1 for step in [*steps, late])
    assert team.at_rest
    assert team.parked == 0


# --- cancelled natively --------------------------------------------------------------------------


class Tasks(Team):
    """Workers in plain tasks of asyncio, which anybody may cancel."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        self.workers = Workers(_runtime.current_hub(), self._begin)

    def _begin(self, function: Any) -> bool:
        self.tasks.append(asyncio.create_task(function()))
        return True

    async def gone(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@on_asyncio
@pytest.mark.parametrize("first_job", ["ended", "waits"])
@pytest.mark.parametrize("order", ["submit, cancel", "cancel, submit", "cancel, see it, submit"])
async def test_a_worker_is_cancelled(first_job: str, order: str) -> None:
    """No job is lost or done twice, at whatever moment: only the one that it was at sees it. A
    parked worker may be woken already, or be cancelled and not have seen it yet.
    """
    team = Tasks()
    first = team.submit(nothing if first_job == "ended" else anyio.sleep_forever)
    await holds(lambda: team.parked == 1 if first_job == "ended" else first.begun)
    steps = [Step(team.workers, nothing) for _ in range(5)]
    for verb in order.split(", "):
        if verb == "submit":
            for step in steps:
                step.submit()
        elif verb == "cancel":
            team.tasks[0].cancel()
        else:
            await asyncio.wait(team.tasks[:1])
    await holds(lambda: all(step.ended for step in steps))
    await holds(lambda: team.at_rest)
    assert [step.begun for step in steps] == [1] * 5
    assert isinstance(first.failure, asyncio.CancelledError) == (first_job == "waits")
    assert team.tasks[0].done()
    assert team.tasks[0].exception() is None  # to a task group it would be a failure
    await team.gone()


@on_asyncio
@pytest.mark.parametrize("resumed", ["by the task", "by the hub"])
async def test_a_call_does_not_notice_and_its_worker_ends(resumed: str) -> None:
    """As there are enough idle ones. The task has ended, and has not been cancelled."""
    team, go_on = Tasks(), asyncio.Event()
    others = [team.submit(go_on.wait) for _ in range(PARKED)]
    conn, peer = anypoll.socketpair()

    async def cancel_itself() -> None:
        await conn.receive()
        if resumed == "by the task":
            await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    last = team.submit(cancel_itself)
    await holds(lambda: last.begun)
    go_on.set()
    await holds(lambda: team.parked == PARKED)
    await peer.send(b"x")
    await holds(team.tasks[-1].done)
    assert last.ended == 1
    assert all(step.ended for step in others)
    assert not team.tasks[-1].cancelled()
    assert team.tasks[-1].exception() is None
    await team.gone()


@on_asyncio
async def test_a_cancelled_step_is_in_no_cycle() -> None:
    """The exception that went through the worker does not keep what the step had."""

    class Thing:
        pass

    async def hold(_thing: Thing) -> None:
        await anyio.sleep_forever()

    async def cancelled() -> weakref.ref[Thing]:
        team, thing = Tasks(), Thing()
        step = team.submit(functools.partial(hold, thing))
        await holds(lambda: step.begun)
        await team.gone()
        step.failure = None
        return weakref.ref(thing)

    gc.collect()
    gc.disable()
    try:
        found = await cancelled()
        await holds(lambda: found() is None)
    finally:
        gc.enable()


@on_asyncio
@pytest.mark.parametrize("resumed", ["by the task", "by the hub"])
async def test_a_cancellation_that_a_call_does_not_notice_finds_no_other_call(resumed: str) -> None:
    """Though that was ready already, and stood next in the queue."""
    team, go_on = Tasks(), asyncio.Event()
    conn, peer = anypoll.socketpair()
    others: list[Step] = []

    async def cancel_itself() -> None:
        await (go_on.wait() if resumed == "by the task" else conn.receive())
        others.extend(team.submit(functools.partial(asyncio.sleep, 0)) for _ in range(3))
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    first = team.submit(cancel_itself)
    await holds(lambda: first.begun)
    go_on.set()
    await peer.send(b"x")
    await holds(lambda: len(others) == 3 and all(step.ended for step in others))
    assert first.ended == 1
    assert not any(step.failure for step in others)
    await holds(lambda: team.at_rest)
    await team.gone()
