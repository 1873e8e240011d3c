"""How a connection's handler may end without anybody having to know.

A peer can end its stream, reset it, stall, or send nonsense; the reader and the writer raise then,
and a handler that lets that pass has done nothing wrong. A peer must not be able to fill the log
with it. Such an end is counted under its reason. Everything else that leaves a handler is an error.
docs/errors.md has the list.
"""

from __future__ import annotations

import ssl
from typing import Literal

from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
    WouldBlock,
)

from .._buffers.errors import (
    ORIGIN,
    REASON,
    IdleTimeout,
    MessageTooLarge,
    ReadTimeout,
    WriteTimeout,
)

#: What ``Server.statistics().closed`` counts by.
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

#: Also of a wrapper's exception, such as AnyIO's or Trio's, with the connection's as its cause.
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

#: Of the connection's own exceptions only: others of these types are of the program's making.
_OWN: dict[type[BaseException], Reason] = {
    **_STREAMS,
    WouldBlock: "would_block",
    UnicodeError: "decoding",
    ssl.SSLError: "tls_handshake",
    NotImplementedError: "tls_version",
}

#: As good as a return: a peer that has ended its side may still wait for the answers.
GRACEFUL: frozenset[Reason] = frozenset({"done", "eof", "incomplete"})


def normal_end(exc: BaseException, number: int) -> Reason | None:
    """The reason, if nothing is in ``exc`` but what the peer of connection ``number`` can cause."""
    if isinstance(exc, BaseExceptionGroup):
        reasons = [normal_end(e, number) for e in exc.exceptions]
        return reasons[0] if all(reasons) else None
    own = [e for e in _with_causes(exc) if getattr(e, ORIGIN, None) == number]
    if not own:
        return None
    if own[0] is not exc:
        return _named(exc, _STREAMS)
    told = next((e.__dict__[REASON] for e in own if REASON in e.__dict__), None)
    return told or _named(own[-1], _OWN)  # a translation of an own one is as that is


def _with_causes(exc: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = exc
    while cause is not None and not any(cause is e for e in chain):  # anybody can make it a circle
        chain.append(cause)
        cause = cause.__cause__
    return chain


def _named(exc: BaseException, reasons: dict[type[BaseException], Reason]) -> Reason | None:
    kinds = {kind.__name__ for kind in type(exc).__mro__}  # Trio's exceptions have AnyIO's names
    return next((reason for kind, reason in reasons.items() if kind.__name__ in kinds), None)
