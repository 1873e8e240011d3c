"""The ``SSLObject`` of a session that the core has, for its reading methods."""

from __future__ import annotations

import ssl
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

from .._epoll import conn_hold_tls, conn_release_tls

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from .._connection.core import Core


class HeldSSLObject(ssl.SSLObject):
    """Tells all about a session that an ``SSLObject`` tells. The session, which other threads use,
    is held meanwhile. What would read or write raises ``RuntimeError``: that is the connection's.
    """

    def __init__(self, ssl_object: ssl.SSLObject, core: Core) -> None:
        self._core = core
        self._object = ssl_object
        """which the callbacks of OpenSSL are given"""

    def __new__(cls, *_: object) -> Self:
        """The base class has no public constructor."""
        return object.__new__(cls)


def _held(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of the object, while the session is held."""

    @wraps(function)
    def call(self: HeldSSLObject, *args: Any, **kwargs: Any) -> Any:
        handle = self._core.handle
        held = conn_hold_tls(handle) == 0  # otherwise nobody uses it any more
        try:
            return function(self._object, *args, **kwargs)
        finally:
            if held:
                conn_release_tls(handle)

    return call


def _refused(function: Callable[..., Any]) -> Callable[..., NoReturn]:
    @wraps(function)
    def call(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"{function.__name__}() is up to the connection that has the session")

    return call


def _cover() -> None:
    for name, thing in vars(ssl.SSLObject).items():
        if name.startswith("_"):
            continue
        if isinstance(thing, property):
            getter, setter = thing.fget, thing.fset
            assert getter is not None
            covered: Any = property(_held(getter), setter and _held(setter), doc=thing.__doc__)
        else:
            uses = name in ("do_handshake", "read", "unwrap", "write")
            covered = (_refused if uses else _held)(thing)
        setattr(HeldSSLObject, name, covered)


_cover()
