"""Process-wide state: the poller pool, one hub per event loop, fork and exit handling.

Nothing happens at import: the pool starts with the first connection or listener, and a hub with the
first one in its event loop. At exit it ends for good, before the interpreter does.

After a fork() the child starts afresh on first use. What it inherited it must not touch (its locks
may be held for ever, and epoll descriptors are shared with the parent), only close.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from asyncio import AbstractEventLoop
from collections.abc import MutableMapping
from dataclasses import replace
from errno import EIO
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.lowlevel import current_token

from .. import _epoll
from .._epoll import PollerEndedError
from .asyncio_hub import AsyncioHub
from .pollers import Pool, Settings, choose, logger

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from .._epoll import MemoryStatistics, Poller, PollerStatistics
    from .hub import Hub

#: Reentrant: the garbage collector and signal handlers run code of the user's anywhere, which may
#: ask for statistics. What is known to be the user's (load_balance, handlers of the log) is called
#: without it.
_lock = threading.RLock()
_settings = Settings()
_pool: Pool | None = None
#: The thread that exits the interpreter, once it has stopped the pollers: none is started any more.
_exiting_thread: int | None = None
_hubs: MutableMapping[Any, Hub] = weakref.WeakKeyDictionary()

#: Sockets whose descriptor Python owns, as long as the C side uses it. Strongly: in a garbage cycle
#: the order of finalising is arbitrary, and a socket's finaliser would close the descriptor under
#: the poller. And a child closes them through their objects.
raw_sockets: set[socket.socket] = set()

#: Handles of what is open, by number; strongly, for the same reason: a handle's destructor would
#: give the slot back, and the close that follows could meet somebody else in it.
handles: dict[int, object] = {}


def settings() -> Settings:
    """What was configured."""
    return _settings


def configure(**changes: Any) -> None:
    """Changes the settings, and the pool if it runs already.

    :raises TypeError: for an unknown option
    :raises ValueError: for nonsense; nothing is changed then
    """
    global _settings
    given = {name: value for name, value in changes.items() if value is not None}
    with _lock:
        new = replace(_settings, **given)
        if _pool is not None and _exiting_thread is None:
            _pool.configure(new)
        _settings = new
    bury_pollers()


def _active_pollers() -> tuple[Pool, list[Poller]]:
    global _pool
    with _lock:
        if _exiting_thread is None:
            if _pool is None:
                _pool = Pool(_settings)
            _pool.refill()
        elif _pool is None or not _pool.active() or _exiting_thread == threading.get_ident():
            raise RuntimeError("The interpreter exits, and anypoll's pollers have been stopped")
        # else a daemon thread: it may wait for what never moves, the interpreter ends it soon
        return _pool, _pool.active()


def pick_poller() -> Poller:
    """The poller for a new connection or listener; starts the pool if need be.

    :raises OSError: if the pool cannot be started
    :raises RuntimeError: if the interpreter exits, and the pool has been stopped
    """
    if _pool is not None and _pool.draining:
        bury_pollers()
    pool, active = _active_pollers()
    if len(active) == 1:
        return active[0]
    balance = _settings.load_balance
    poller = choose(active, balance, pool.turn)
    if callable(balance):  # it may have configured something
        _, active = _active_pollers()
        if poller not in active:
            poller = active[pool.turn() % len(active)]
    return poller


_TRIES = 8

_Handle = TypeVar("_Handle")


def on_poller(open_on: Callable[[Poller], _Handle]) -> tuple[Poller, _Handle]:
    """Picks a poller and opens something on it; on another one, if that has ended meanwhile.

    :raises OSError: if the pool cannot be started, or what ``open_on`` raises
    """
    for _ in range(_TRIES):
        poller = pick_poller()
        try:
            return poller, open_on(poller)
        except PollerEndedError:
            bury_pollers()
    raise OSError(EIO, "Pollers fail as soon as they are started")


def bury_pollers() -> None:
    """Takes notice of pollers that have ended: replaces and logs those that have failed."""
    with _lock:
        failed = [] if _pool is None or _exiting_thread is not None else _pool.bury()
    for error in failed:
        logger.error("A poller has failed, and all its connections with it: %s", os.strerror(error))


def poller_index(poller: Poller) -> int:
    """Where the poller is in :func:`poller_statistics`; -1 if it has ended."""
    with _lock:
        return -1 if _pool is None else _pool.index(poller)


def poller_statistics() -> tuple[PollerStatistics, ...]:
    """Of all pollers; nothing before first use."""
    bury_pollers()
    with _lock:
        return () if _pool is None else _pool.statistics()


def memory_statistics() -> MemoryStatistics:
    """The blocks of the process."""
    return _epoll.memory_statistics()


def nudge() -> None:
    """Makes the pollers recycle at once what is free, for tests and tools that count."""
    with _lock:
        if _pool is not None:
            _pool.nudge()


def stop_pollers() -> None:
    """At exit, and for good: ends all threads. The lock sees to it that a daemon thread starts none
    meanwhile, which would run into the end of the interpreter.
    """
    global _exiting_thread
    with _lock:
        _exiting_thread = threading.get_ident()
        if _pool is not None:
            _pool.stop()


# At import, since handlers run last in, first out: those that are registered from now on may still
# use connections.
atexit.register(stop_pollers)


def current_hub() -> Hub:
    """The hub of the running event loop, made on first use.

    :raises RuntimeError: outside of an event loop
    """
    token = current_token().native_token
    hub = _hubs.get(token)
    if hub is None or hub.dead:
        hub = _new_hub(token)
        _hubs[token] = hub
    return hub


def _new_hub(token: object) -> Hub:
    if isinstance(token, AbstractEventLoop):
        return AsyncioHub(token)
    from .trio_hub import TrioHub

    return TrioHub()


def _after_fork_in_child() -> None:
    global _lock, _pool, _hubs
    _lock = threading.RLock()
    _pool = None
    for sock in list(raw_sockets):
        sock.close()
    raw_sockets.clear()
    handles.clear()
    for hub in list(_hubs.values()):
        hub.end()  # what was inherited is closed, to whoever asks
    _hubs = weakref.WeakKeyDictionary()
    _epoll.fork_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
