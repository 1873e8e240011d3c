"""Process-wide state: the poller pool, one hub per event loop, fork and exit handling.

Nothing happens at import: the pool starts with the process's first connection or listener, and a
hub with the first in its event loop. The pool ends for good at exit, before the interpreter does.

Who drives a poller is decided when something is opened on it, and when the settings change. An
event loop drives it if it is the only one that uses anypoll, and the poller the only one that gets
connections. As soon as another loop opens something, or there are more pollers, all are driven by
their threads; when the other loop has ended, what the first one opens next makes it drive again.

After a fork() the child starts afresh on first use. It must not touch what it inherited (locks may
be held forever, and epoll descriptors are shared with the parent), only close it.
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
from typing import TYPE_CHECKING, Any

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

#: Reentrant: the garbage collector and signal handlers may run user code anywhere, which may ask
#: for statistics. Functions known to be the user's (load_balance, log handlers) are called without
#: it.
_lock = threading.RLock()
_settings = Settings()
_pool: Pool | None = None
#: The thread that exits the interpreter, set once it has stopped the pollers: no more start.
_exiting_thread: int | None = None
_hubs: MutableMapping[Any, weakref.ref[Hub]] = weakref.WeakKeyDictionary()
_lent = False  # an event loop drives the poller, or did when it was last looked at

#: Sockets whose descriptor Python owns while the C side uses it. The references are strong: objects
#: in a garbage cycle are finalised in arbitrary order, and a socket's finaliser would close the
#: descriptor under the poller. A forked child also closes them through their objects.
raw_sockets: set[socket.socket] = set()

#: Handles of open listeners, by number; strong for the same reason: a handle's destructor would
#: free the slot, and the close that follows could hit the slot's next occupant.
handles: dict[int, object] = {}


def settings() -> Settings:
    """The current settings."""
    return _settings


def configure(**changes: Any) -> None:
    """Changes the settings, and the pool if it is running.

    :raises TypeError: for an unknown option
    :raises ValueError: for an invalid value; nothing is changed then
    """
    global _settings
    given = {name: value for name, value in changes.items() if value is not None}
    with _lock:
        new = replace(_settings, **given)
        if _pool is not None and _exiting_thread is None:
            _pool.configure(new)
        _settings = new
        _epoll.limit_spin(new.spin)
        if new.driver != "auto" or new.pollers > 1:
            _end_loans()
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
        # Otherwise a daemon thread: it may wait for connections that never move, until it is ended.
        return _pool, _pool.active()


def pick_poller() -> Poller:
    """The poller for a new connection or listener; starts the pool if necessary.

    :raises OSError: if the pool cannot be started
    :raises RuntimeError: if the interpreter is exiting, and the pool has been stopped
    """
    if _pool is not None and _pool.draining:
        bury_pollers()
    pool, active = _active_pollers()
    if len(active) == 1:
        return active[0]
    balance = _settings.load_balance
    poller = choose(active, balance, pool.turn)
    if callable(balance):  # it may have changed the configuration
        _, active = _active_pollers()
        if poller not in active:
            poller = active[pool.turn() % len(active)]
    return poller


def _end_loans() -> None:
    """Has all pollers driven by their threads. The caller holds the lock."""
    global _lent
    _lent = False
    for hub in _all_hubs():
        hub.give_back()


def _lend(hub: Hub, poller: Poller) -> None:
    """Has the hub's event loop drive the poller if it has it to itself; otherwise nobody's does.

    Call it in that loop.
    """
    global _lent
    if _settings.driver != "auto" or _settings.pollers > 1:
        return
    if hub.loan is not None and hub.loan.poller is poller:
        return
    with _lock:
        if _exiting_thread is not None:
            return
        if any(not other.dead for other in _all_hubs() if other is not hub):
            if _lent:
                _end_loans()
            return
        _epoll.limit_spin(_settings.spin)
        hub.borrow(poller)
        _lent = True


_TRIES = 8


def on_poller(hub: Hub, open_on: Callable[[Poller], None]) -> Poller:
    """Picks a poller and opens something on it for the event loop of ``hub``; on another poller, if
    that one has ended meanwhile.

    :raises OSError: if the pool cannot be started, or if ``open_on`` raises it
    """
    loan = hub.loan
    if loan is not None and _pool is not None and not _pool.draining:
        try:  # there is no choice
            open_on(loan.poller)
        except PollerEndedError:
            bury_pollers()
        else:
            return loan.poller
    for _ in range(_TRIES):
        poller = pick_poller()
        _lend(hub, poller)
        try:
            open_on(poller)
        except PollerEndedError:
            bury_pollers()
        else:
            return poller
    raise OSError(EIO, "Pollers fail as soon as they are started")


def bury_pollers() -> None:
    """Removes pollers that have ended; replaces and logs those that failed."""
    with _lock:
        failed = [] if _pool is None or _exiting_thread is not None else _pool.bury()
        if failed and _lent:
            _end_loans()
    for error in failed:
        logger.error("A poller has failed, and all its connections with it: %s", os.strerror(error))


def poller_index(poller: Poller) -> int:
    """The poller's index in :func:`poller_statistics`; -1 if it has ended."""
    with _lock:
        return -1 if _pool is None else _pool.index(poller)


def poller_statistics() -> tuple[PollerStatistics, ...]:
    """The statistics of all pollers; empty before first use."""
    bury_pollers()
    with _lock:
        return () if _pool is None else _pool.statistics()


def memory_statistics() -> MemoryStatistics:
    """The process's block memory."""
    return _epoll.memory_statistics()


def nudge() -> None:
    """Makes the pollers recycle free memory at once, for tests and tools that count."""
    with _lock:
        if _pool is not None:
            _pool.nudge()


def stop_pollers() -> None:
    """Ends all threads at exit, for good. The lock keeps daemon threads from starting one
    meanwhile, which would run into the end of the interpreter.
    """
    global _exiting_thread
    with _lock:
        _exiting_thread = threading.get_ident()
        if _pool is not None:
            _pool.stop()


# Registered at import, because handlers run last in, first out: those registered later may still
# use connections.
atexit.register(stop_pollers)


def current_hub() -> Hub:
    """The running event loop's hub, created on first use.

    :raises RuntimeError: outside an event loop
    """
    token = current_token().native_token
    found = _hubs.get(token)
    hub = found() if found is not None else None
    if hub is None or hub.dead:
        hub = _new_hub(token)
        with _lock:
            _hubs[token] = weakref.ref(hub)
    return hub


def _all_hubs() -> list[Hub]:
    return [hub for found in list(_hubs.values()) if (hub := found()) is not None]


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
    for hub in _all_hubs():
        hub.end()  # inherited connections then appear closed
    _hubs = weakref.WeakKeyDictionary()
    _epoll.fork_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
