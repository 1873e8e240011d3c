"""How a connection's handler may end without anybody having to know.

A peer can end its stream, reset it, stall, or send nonsense; the reader and the writer raise then,
and a handler that lets that pass has done nothing wrong. A peer must not be able to fill the log
with it. Such an end is counted under its reason. Everything else that leaves a handler is an error.
"""

from __future__ import annotations

from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
)

from ._endpoint import ORIGIN
from ._errors import IdleTimeout, MessageTooLarge, ReadTimeout, WriteTimeout

_REASONS: dict[type[BaseException], str] = {
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

#: As good as a return: a peer that has ended its side may still wait for the answers.
GRACEFUL = frozenset({"done", "eof", "incomplete"})


def normal_end(exc: BaseException, number: int) -> str | None:
    """The reason, if nothing is in ``exc`` but what the peer of connection ``number`` can cause."""
    if isinstance(exc, BaseExceptionGroup):
        reasons = [normal_end(e, number) for e in exc.exceptions]
        return reasons[0] if all(reasons) else None
    about: BaseException | None = exc  # or a wrapper's, with the connection's own as its cause
    while about is not None and getattr(about, ORIGIN, None) != number:
        about = about.__cause__
    if about is None:
        return None
    kinds = {kind.__name__ for kind in type(exc).__mro__}  # Trio's exceptions have AnyIO's names
    return next((reason for kind, reason in _REASONS.items() if kind.__name__ in kinds), None)
