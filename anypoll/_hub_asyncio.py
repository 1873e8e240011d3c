"""The hub of an asyncio event loop; uvloop's is one too.

One persistent reader callback on the hub's descriptor does all the waking; the loop alone holds it.
Nothing calls us when a loop ends, but it drops its callbacks when it is closed, so a finalizer on
the callback is the end of the hub. For that the hub must not hold the loop either.
"""

from __future__ import annotations

import weakref
from asyncio import AbstractEventLoop, Future, get_running_loop, sleep
from collections.abc import Iterable

from ._epoll import hub_fd
from ._hub import Hub


class _Drain:
    """The reader callback: an object of its own, since its end is the end of the hub."""

    __slots__ = ("__weakref__", "_hub")

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def __call__(self) -> None:
        self._hub.dispatch()


class AsyncioHub(Hub):
    """See the module."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        super().__init__()
        self._loop = weakref.ref(loop)
        drain = _Drain(self)
        weakref.finalize(drain, self.end).atexit = False
        loop.add_reader(hub_fd(self.handle), drain)

    def check(self) -> None:
        if get_running_loop() is not self._loop():
            raise RuntimeError("This object belongs to another event loop")

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

    # Calling wake_reader() and wake() for each would double the cost of a wake-up.
    def _wake_readers(self, tokens: Iterable[tuple[int, int, int]]) -> None:
        pop = self.readers.pop
        for number, _, end in tokens:
            future = pop(number, None)
            if future is not None and not future.done():
                future.set_result(end)

    def wake(self, waiter: Future[None]) -> None:
        if not waiter.done():  # it may have been cancelled meanwhile
            waiter.set_result(None)
