"""Disconnect handling: ``on_disconnect``, and cancellation of the handler's scope.

The hub reports the disconnect whatever the handler is doing, and whether or not all input has been
read. The hook runs once, in a task beside the handler, and never before ``on_connect`` has ended.
If the handler ends first and the peer has gone by then, the hook runs in the handler's task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from .._connection.core import Core
from .._epoll import IS_GONE, conn_status
from .._loop.tasks import wait_shielded


class PeerGoneError(Exception):
    """The handler was cancelled because the peer has gone."""


class DisconnectHook:
    """The disconnect hook of one connection.

    :param hook: runs ``on_disconnect`` and lets no exception out; ``None`` if there is none
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
        """the handler's scope, if the disconnect is to cancel it"""

    @property
    def gone(self) -> bool:
        """Whether the peer is known to have gone."""
        if not self._gone:  # works even if the handler has closed the connection
            self._gone = bool(conn_status(self._core.handle) & IS_GONE)
        return self._gone

    def notice(self) -> None:
        """Called by the hub when the peer has gone."""
        self._gone = True
        if self.scope is not None:
            self.scope.cancel()
        if self._open:
            self._start()

    def open(self) -> None:
        """Lets the hook run: ``on_connect`` has ended."""
        self._open = True
        if self._gone:
            self._start()

    def _start(self) -> None:
        if self._hook is not None:
            self._begin(self._run)

    async def _run(self) -> None:
        """Runs the hook, unless it was already started."""
        hook, self._hook = self._hook, None
        if hook is None:
            return
        self._ended = anyio.Event()
        try:
            await hook()
        finally:
            self._ended.set()

    async def settle(self, *, gone: bool) -> None:
        """Called when the handler has ended; returns once the hook, if it is due, has ended too.

        :param gone: the peer has ended its side in a way that the socket does not show
        """
        self._open = False
        if gone or self.gone:
            await self._run()  # here, unless its own task was faster
        if self._ended is not None:
            await self._ended.wait()

    async def over(self) -> None:
        """Keeps the hook from starting; if it is running, waits for its end, shielded. A hook whose
        task has not started is not waited for: while an event loop is torn down, it never starts.
        """
        self._open = False
        self._hook = None
        if self._ended is not None and not self._ended.is_set():
            await wait_shielded(self._ended)

    async def scoped(self, awaitable: Awaitable[Any]) -> None:
        """Awaits in a scope that is cancelled when the peer goes.

        :raises PeerGoneError: if the scope was cancelled
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
