"""Gather messages: any number of buffers, and callables that return buffers, sent as one.

A message is examined twice. When it is accepted, mutable buffers are copied and invalid ones
refused. When its turn has come, its callables are called and its ``LinkBuffer``s emptied, and not
before: until then the message may be withdrawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments import as_bytes
from .linkbuffer import LinkBuffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .chain import Piece

UNKNOWN = -1  # the size of a message that is not fixed before its turn


def accepted(buffer: object) -> Any:
    """``buffer`` in a form that can be kept until its turn; copied only if it may change.

    :raises TypeError: if it is neither bytes-like, nor a ``LinkBuffer``, nor callable
    """
    if isinstance(buffer, LinkBuffer):
        return buffer
    try:
        return as_bytes(buffer)  # type: ignore[arg-type]
    except TypeError:
        if callable(buffer):
            return buffer
    kind = type(buffer).__name__
    raise TypeError(f"a buffer must be bytes-like, a LinkBuffer or a callable, not {kind}")


def _called(part: Any) -> bytes | LinkBuffer:
    """The result of calling ``part``, if it is callable.

    :raises TypeError: if the result is neither bytes-like nor a ``LinkBuffer``
    """
    if type(part) is bytes or isinstance(part, LinkBuffer):
        return part
    result = part()
    return result if isinstance(result, LinkBuffer) else as_bytes(result, "what a callable returns")


def size_of(parts: Sequence[Any]) -> int:
    """The size of a message in bytes, or ``UNKNOWN`` if something may still change it."""
    size = 0
    for part in parts:
        if type(part) is not bytes:
            return UNKNOWN
        size += len(part)
    return size


def gathered(parts: Sequence[Any]) -> list[Piece]:
    """The pieces of a message whose turn has come.

    Steps that can raise come first: a ``LinkBuffer`` is emptied only if none did.
    """
    ready = [_called(part) for part in parts]
    for part in ready:
        if isinstance(part, LinkBuffer):
            part._check()
    pieces: list[Piece] = []
    for part in ready:
        if isinstance(part, LinkBuffer):
            pieces += part._give_all()
        else:
            pieces.append(part)
    return pieces
