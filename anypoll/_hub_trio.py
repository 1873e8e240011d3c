"""The hub of a Trio run: a system task that waits for the hub's descriptor.

An exception that left the system task would end the run as a TrioInternalError, so
:meth:`Hub.dispatch` lets none out. The task is cancelled when the run ends, and takes the hub
along; what uses a connection after that (another system task, an async generator's finaliser) finds
it closed.
"""

from __future__ import annotations

from typing import Any

import trio
from trio.lowlevel import Abort, Task

from ._epoll import hub_fd
from ._hub import Hub


class TrioHub(Hub):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self._token: trio.lowlevel.TrioToken | None = trio.lowlevel.current_trio_token()
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
        try:
            same = trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            same = False
        if not same:
            raise RuntimeError("This object belongs to another event loop")

    async def wait_read(self, number: int) -> None:
        task = trio.lowlevel.current_task()
        self.readers[number] = task

        def abort(_raise_cancel: Any) -> Abort:
            if self.readers.get(number) is task:
                del self.readers[number]
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

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

    def wake(self, waiter: Task) -> None:
        trio.lowlevel.reschedule(waiter)
