"""A worker pool: tasks, bound to no connection, that take the steps of request mode from one queue.

A job is one step of a connection in request mode. Ready jobs stand in a queue, which one worker at
a time processes. As long as its jobs do not suspend, it does the whole queue in one go, without a
task switch; when a job suspends, another worker takes its place. So a burst of short calls costs no
task switch at all, and a slow call delays nobody. A worker that finds no more jobs parks, and costs
nothing; only a few may park. All of this is native (csrc/python/workers.c), but for the tasks.

A call may set context variables. Calls of other connections must not see those, so each job runs in
a copy of its own context, whatever the context of the worker's task.

Any code that finds a worker's task may cancel it. The worker's current job, if any, sees that, and
the worker ends; other ready jobs are left to the next one.
"""

from __future__ import annotations

from anyio import get_cancelled_exc_class

from .. import _native
from . import runtime


class Workers(_native.Workers):
    """The worker pool; see the module. Use it only in the event loop's thread.

    :param hub: of the event loop
    :param start: starts a task that runs an async function; returns False if that is impossible now
    """

    __slots__ = ()

    async def _work(self) -> None:
        """A worker's task."""
        wanted = runtime.settings().direct_resume
        try:
            await self._worker(wanted and self.hub.can_resume_directly)
            await self.hub.checkpoint()  # also one that the last call did not notice
        except GeneratorExit:  # there may be no event loop any more
            raise
        except get_cancelled_exc_class():
            pass  # the cancellation ends here: a task group would take it for a failure
