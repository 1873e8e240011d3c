"""The exceptions that AnyIO lacks, and the one place where an errno becomes one of AnyIO's."""

from __future__ import annotations

import os
from errno import EBADF, ECHILD, EMFILE, ENFILE, ENOBUFS, ENOMEM
from typing import TypeVar

from anyio import BrokenResourceError, ClosedResourceError

__all__ = (
    "ConnectTimeout",
    "IdleTimeout",
    "MessageTooLarge",
    "ReadTimeout",
    "WriteTimeout",
)

#: The attribute that says which connection an exception is about.
ORIGIN = "_anypoll_connection"

#: The attribute for the reason of an end, where the exception's type does not tell it.
REASON = "_anypoll_reason"

E = TypeVar("E", bound=BaseException)


def about(exc: E, connection: int | None) -> E:
    """Marks ``exc`` as something that the peer of that connection can cause, so that a server can
    tell it from what its handler has done wrong.

    :param connection: its number; ``None``: of none that is known
    """
    if connection is not None:
        exc.__dict__[ORIGIN] = connection
    return exc


class ReadTimeout(TimeoutError):
    """A read did not end within ``read_timeout`` seconds.

    Nothing was consumed and nothing was lost; the connection can still be used.
    """


class WriteTimeout(TimeoutError):
    """A write did not end within ``write_timeout`` seconds.

    If a part of it had been sent, the rest is still pending and goes out first.
    """


class ConnectTimeout(TimeoutError):
    """A connection could not be made within ``timeout`` seconds."""


class IdleTimeout(TimeoutError):
    """No byte went in or out for ``idle_timeout`` seconds, and the connection was ended."""


class MessageTooLarge(ValueError):
    """A single request for more bytes than ``read_limit`` allows.

    Raised before any waiting, so that a hostile length prefix costs nothing.
    """


#: Errors that mean a lack of resources of this process, not a fault of the peer.
LACK_OF_RESOURCES = frozenset({EMFILE, ENFILE, ENOBUFS, ENOMEM})


#: ``POLLER_ENDED - errno`` says that a poller has failed, and is not an errno of a socket. Equal to
#: csrc/anypoll.h's ``AP_EPOLLER``.
POLLER_ENDED = -7000


def os_error(code: int) -> OSError:
    """The ``OSError`` (of the fitting subclass) for a negative errno."""
    if code <= POLLER_ENDED:
        number = POLLER_ENDED - code
        return OSError(number, f"The poller has failed: {os.strerror(number)}")
    return OSError(-code, os.strerror(-code))


def stream_error(code: int) -> Exception:
    """The exception of a stream for a negative errno of its socket, with its cause."""
    if code in {-EBADF, -ECHILD}:  # closed here, or inherited through fork()
        return ClosedResourceError()
    if code == -ENOMEM:
        return MemoryError(os.strerror(ENOMEM))
    error = BrokenResourceError()
    error.__cause__ = os_error(code)
    return error
