"""Error handling: the exceptions AnyIO lacks, errno translation, and which ends a peer can cause.

A peer can end its stream, reset it, stall, or send garbage. The reader and the writer then raise,
and a handler that lets the exception pass has done nothing wrong. A peer must not be able to fill
the log that way, so such ends are only counted, by reason. Any other exception that leaves a
handler is an error. docs/errors.md has the list.
"""

from __future__ import annotations

import os
import ssl
from errno import EBADF, ECHILD, EMFILE, ENFILE, ENOBUFS, ENOMEM
from typing import Literal, TypeVar

from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
    WouldBlock,
    get_cancelled_exc_class,
)

__all__ = (
    "ConnectTimeout",
    "IdleTimeout",
    "MessageTooLarge",
    "ReadTimeout",
    "WriteTimeout",
)

#: The attribute that says which connection an exception is about.
ORIGIN = "_anypoll_connection"

#: The typed attribute that gives a connection's number, through any wrapper.
ORIGIN_KEY = object()

#: The attribute for the reason of an end, where the exception's type does not determine it.
REASON = "_anypoll_reason"

E = TypeVar("E", bound=BaseException)


def about(exc: E, connection: int | None) -> E:
    """Marks ``exc`` as something that the connection's peer can cause, so that a server can tell it
    from a fault of the handler.

    :param connection: the connection's number; ``None`` if it is unknown
    """
    if connection is not None:
        exc.__dict__[ORIGIN] = connection
    return exc


class ReadTimeout(TimeoutError):
    """A read took longer than ``read_timeout`` seconds.

    Nothing was consumed and nothing was lost; the connection can still be used.
    """


class WriteTimeout(TimeoutError):
    """A write took longer than ``write_timeout`` seconds.

    If part of it was sent, the rest is still pending and goes out first.
    """


class ConnectTimeout(TimeoutError):
    """Connecting took longer than ``timeout`` seconds."""


class IdleTimeout(TimeoutError):
    """No byte went in or out for ``idle_timeout`` seconds, and the connection was ended."""


class MessageTooLarge(ValueError):
    """A single request asked for more bytes than ``read_limit`` allows.

    Raised before any waiting, so that a hostile length prefix costs nothing.
    """


#: Errors that mean this process lacks resources, not that the peer is at fault.
LACK_OF_RESOURCES = frozenset({EMFILE, ENFILE, ENOBUFS, ENOMEM})


#: ``POLLER_ENDED - errno`` says that a poller has failed; it is not a socket's errno. The same as
#: ``AP_EPOLLER`` in csrc/anypoll.h.
POLLER_ENDED = -7000


def os_error(code: int) -> OSError:
    """The ``OSError`` (of the matching subclass) for a negative errno."""
    if code <= POLLER_ENDED:
        number = POLLER_ENDED - code
        return OSError(number, f"The poller has failed: {os.strerror(number)}")
    return OSError(-code, os.strerror(-code))


def stream_error(code: int) -> Exception:
    """A stream's exception for a negative errno of its socket, with its cause."""
    if code in {-EBADF, -ECHILD}:  # closed here, or inherited through fork()
        return ClosedResourceError()
    if code == -ENOMEM:
        return MemoryError(os.strerror(ENOMEM))
    error = BrokenResourceError()
    error.__cause__ = os_error(code)
    return error


# --- how handlers end ----------------------------------------------------------------------------

#: The keys of ``Server.statistics().closed``.
Reason = Literal[
    "done",
    "eof",
    "incomplete",
    "broken",
    "closed",
    "read_timeout",
    "write_timeout",
    "idle_timeout",
    "delimiter_not_found",
    "message_too_large",
    "would_block",
    "decoding",
    "tls_handshake",
    "tls_version",
    "error",
    "cancelled",
    "disconnected",
    "refused",
    "failed",
]

#: Applies also to a wrapper's exception, such as AnyIO's or Trio's, caused by the connection's.
_STREAMS: dict[type[BaseException], Reason] = {
    EndOfStream: "eof",
    IncompleteRead: "incomplete",
    BrokenResourceError: "broken",
    ClosedResourceError: "closed",
    ReadTimeout: "read_timeout",
    WriteTimeout: "write_timeout",
    IdleTimeout: "idle_timeout",
    DelimiterNotFound: "delimiter_not_found",
    MessageTooLarge: "message_too_large",
}

#: Applies only to the connection's own exceptions: others of these types are the program's doing.
_OWN: dict[type[BaseException], Reason] = {
    **_STREAMS,
    WouldBlock: "would_block",
    UnicodeError: "decoding",
    ssl.SSLError: "tls_handshake",
    NotImplementedError: "tls_version",
}

#: As good as a return: a peer that has ended its side may still be waiting for answers.
GRACEFUL: frozenset[Reason] = frozenset({"done", "eof", "incomplete"})


def error_in(exc: BaseException) -> Exception | None:
    """The error in ``exc``, if it holds more than a cancellation: in a cancelled Trio nursery, the
    errors of its tasks stand beside that. ``None`` also for exceptions that end the program.
    """
    if isinstance(exc, Exception):
        return exc
    rest: BaseException | None = None
    if isinstance(exc, BaseExceptionGroup):
        _, rest = exc.split(get_cancelled_exc_class())
    return rest if isinstance(rest, Exception) else None


def normal_end(exc: BaseException, number: int) -> Reason | None:
    """The reason, if ``exc`` holds only what the peer of connection ``number`` can cause."""
    if exc.__cause__ is None and (usual := _OWN.get(type(exc))) is not None:
        marks = exc.__dict__
        return marks.get(REASON, usual) if marks.get(ORIGIN) == number else None
    if isinstance(exc, BaseExceptionGroup):
        reasons = [normal_end(e, number) for e in exc.exceptions]
        return reasons[0] if all(reasons) else None
    own = [e for e in _with_causes(exc) if getattr(e, ORIGIN, None) == number]
    if not own:
        return None
    if own[0] is not exc:
        return _named(exc, _STREAMS)
    told = next((e.__dict__[REASON] for e in own if REASON in e.__dict__), None)
    return told or _named(own[-1], _OWN)  # a translation of an own exception counts the same


def _with_causes(exc: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = exc
    while cause is not None and not any(cause is e for e in chain):  # user code can make a cycle
        chain.append(cause)
        cause = cause.__cause__
    return chain


def _named(exc: BaseException, reasons: dict[type[BaseException], Reason]) -> Reason | None:
    kinds = {kind.__name__ for kind in type(exc).__mro__}  # Trio's exceptions have AnyIO's names
    return next((reason for kind, reason in reasons.items() if kind.__name__ in kinds), None)
