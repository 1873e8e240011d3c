"""What follows when a peer has gone: ``on_disconnect``, and the end of the handler's scope.

The hub tells it, whatever the handler is doing, and whether or not the input has been read. The
hook runs once, in a task beside the handler; but never before ``on_connect`` has ended, and never
behind the end of the handler: then it runs in that one's task, if the peer had gone by that time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from .._connection.core import Core
from .._epoll import IS_GONE, conn_status
from .._loop.callbacks import wait_shielded


class PeerGoneError(Exception):
    """The handler was cancelled because the peer has gone."""


class DisconnectHook:
    """Of one connection.

    :param hook: runs ``on_disconnect``, and lets no exception out; ``None``: there is none
    :param begin: runs an async function in a task of the server
    """

    __slots__ = ("_begin", "_core", "_ended", "_gone", "_hook", "_open", "scope")

    def __init__(
        self,
        core: Core,
        hook: Callable[[], Awaitable[None]] | None,
        begin: Callable[[Callable[[], Awaitable[None]]], bool],
    ) -> None:
        self._core = core
        self._hook = hook
        self._begin = begin
        self._gone = self._open = False
        self._ended: anyio.Event | None = None
        self.scope: anyio.CancelScope | None = None
        """the handler's, if that is to be cancelled"""

    @property
    def gone(self) -> bool:
        """Whether the peer has gone, as far as anybody knows."""
        if not self._gone:  # also of a connection that the handler has closed
            self._gone = bool(conn_status(self._core.handle) & IS_GONE)
        return self._gone

    def notice(self) -> None:
        """Called by the hub."""
        self._gone = True
        if self.scope is not None:
            self.scope.cancel()
        if self._open:
            self._start()

    def open(self) -> None:
        """``on_connect`` has ended: the hook may run."""
        self._open = True
        if self._gone:
            self._start()

    def _start(self) -> None:
        if self._hook is not None:
            self._begin(self._run)

    async def _run(self) -> None:
        """The hook, unless somebody else has begun it."""
        hook, self._hook = self._hook, None
        if hook is None:
            return
        self._ended = anyio.Event()
        try:
            await hook()
        finally:
            self._ended.set()

    async def settle(self, *, gone: bool) -> None:
        """The handler has ended: so has the hook when this returns, if it was to run at all.

        :param gone: the peer has ended its side in a way that the socket does not show
        """
        self._open = False
        if gone or self.gone:
            await self._run()  # here, if its own task has not come to it yet
        if self._ended is not None:
            await self._ended.wait()

    async def over(self) -> None:
        """The hook does not begin any more; if it runs, waits for its end, shielded. One whose task
        has not begun is not waited for: when an event loop is torn down it never does.
        """
        self._open = False
        self._hook = None
        if self._ended is not None and not self._ended.is_set():
            await wait_shielded(self._ended)

    async def scoped(self, awaitable: Awaitable[Any]) -> None:
        """Awaits, and is cancelled when the peer goes.

        :raises PeerGoneError: if it was
        """
        with anyio.CancelScope() as self.scope:
            if self.gone:
                self.scope.cancel()
            try:
                await awaitable
            finally:
                scope, self.scope = self.scope, None
        if scope.cancelled_caught:
            raise PeerGoneError
