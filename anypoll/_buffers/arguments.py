"""Argument validation: numbers, durations, buffers, delimiters, encodings, connection limits.

Values that come out are valid, so later code need not check again. Otherwise the exception names
the argument at fault and says what is allowed.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

if TYPE_CHECKING:
    from typing_extensions import Buffer


KIB = 1024
MIB = 1024 * KIB

#: Bytes that a connection reads ahead at most; it resumes at a quarter of that.
READ_HIGH_WATER = 256 * KIB
#: Bytes of unsent output above which a reader call waits for it to drain.
WRITE_HIGH_WATER = 256 * KIB
#: Bytes that a single reader request may ask for.
READ_LIMIT = 64 * MIB

#: Bytes of a connection's first block of input, header included.
BLOCK_SIZE = 2 * KIB

#: Seconds that one close callback may take, unless a server says otherwise.
CLOSE_CALLBACK_TIMEOUT = 10.0


def shown(n: int) -> str:
    """``n`` for an error message: Python refuses to print integers of thousands of digits."""
    return str(n) if n.bit_length() <= 256 else f"an integer of {n.bit_length()} bits"


def count(value: SupportsIndex, name: str, *, least: int = 0, most: int | None = None) -> int:
    """``value`` as an ``int`` of at least ``least``.

    :raises TypeError: if it is not an integer
    :raises ValueError: if it is too small or too large
    """
    try:
        n = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if n < least or (most is not None and n > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} must be {bounds}, not {shown(n)}")
    return n


def positive(value: SupportsIndex, name: str) -> int:
    """``value`` as an ``int`` of at least 1; the message is AnyIO's.

    :raises TypeError: if it is not an integer
    :raises ValueError: if it is too small
    """
    try:
        n = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a positive integer, not {type(value).__name__}") from None
    if n < 1:
        raise ValueError(f"{name} must be a positive integer")
    return n


def flag(value: bool, name: str) -> bool:
    """``value``.

    :raises TypeError: if it is not a ``bool``
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {value!r}")
    return value


def seconds(value: float | None, name: str) -> float | None:
    """``value`` as a non-negative number of seconds; ``None`` stays ``None``.

    :raises TypeError: if it is not a number
    :raises ValueError: if it is negative, NaN, or an integer too large for a ``float``
    """
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or None, not {type(value).__name__}")
    if not value >= 0:
        text = shown(value) if isinstance(value, int) else str(value)
        raise ValueError(f"{name} must not be negative, not {text}")
    try:
        math.isinf(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be a number of seconds that a float can hold (inf: for ever), "
            f"not {shown(int(value))}"
        ) from None
    return value


def count_field(record: Any, name: str, *, least: int = 0, most: int | None = None) -> None:
    """Validates a field of a frozen dataclass, and converts it to an ``int``."""
    object.__setattr__(record, name, count(getattr(record, name), name, least=least, most=most))


def _memory(data: Buffer, name: str) -> memoryview:
    try:
        return memoryview(data)
    except TypeError:
        raise TypeError(f"{name} must be bytes-like, not {type(data).__name__}") from None


def as_bytes(data: Buffer, name: str = "data") -> bytes:
    """``data`` itself if it is ``bytes``, otherwise a copy.

    :raises TypeError: if it is not bytes-like
    """
    if type(data) is bytes:
        return data
    # Not bytes(data) of any object: that would take a number for a size.
    return data.tobytes() if type(data) is memoryview else bytes(_memory(data, name))


def flat_view(data: Buffer, name: str) -> memoryview:
    """A view of the bytes of ``data``, writable if ``data`` is.

    :raises TypeError: if it is not bytes-like
    :raises ValueError: if it is not contiguous
    """
    view = _memory(data, name)
    if not view.c_contiguous:
        raise ValueError(f"the bytes of {name} must lie side by side to be referenced")
    return view.cast("B")


def as_view(data: Buffer, name: str = "data") -> memoryview:
    """A read-only view of the bytes of ``data``.

    :raises TypeError: if it is not bytes-like
    :raises ValueError: if it is not contiguous
    """
    return flat_view(data, name).toreadonly()


def room_in(buffer: Buffer) -> memoryview:
    """A view of the bytes of a buffer for ``readinto()`` to fill.

    :raises TypeError: if it is not bytes-like, or not writable
    :raises ValueError: if it is not contiguous
    """
    into = flat_view(buffer, "buffer")
    if into.readonly:
        raise TypeError("readinto() needs a writable buffer")
    return into


def text_encoding(encoding: str) -> str:
    """``encoding``, if it exists.

    :raises TypeError: if it is not a ``str``
    :raises ValueError: if it is not the name of a text encoding
    """
    if not isinstance(encoding, str):
        raise TypeError(f"encoding must be a str, not {type(encoding).__name__}")
    try:
        b"a".decode(encoding)  # some codecs are not for text, and only this shows it
    except UnicodeDecodeError:
        return encoding  # an encoding with several bytes per character
    except (LookupError, ValueError):
        raise ValueError(
            f"encoding must be the name of a text encoding, not {encoding!r}"
        ) from None
    return encoding


def delimiter_bytes(delimiter: object) -> bytes:
    """``delimiter`` as ``bytes``.

    :raises TypeError, ValueError: if it is not bytes-like, or empty
    """
    if not isinstance(delimiter, (bytes, bytearray, memoryview)):
        raise TypeError(f"delimiter must be bytes, not {type(delimiter).__name__}")
    if not len(delimiter):
        raise ValueError("delimiter must not be empty")
    return bytes(delimiter)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one connection; all but the timeouts are in bytes."""

    read_high_water: int = READ_HIGH_WATER
    write_high_water: int = WRITE_HIGH_WATER
    read_limit: int = READ_LIMIT
    read_timeout: float | None = None
    write_timeout: float | None = None
    idle_timeout: float | None = None
    close_callback_timeout: float = CLOSE_CALLBACK_TIMEOUT

    def __post_init__(self) -> None:
        count_field(self, "read_high_water", least=1, most=2**30)
        count_field(self, "write_high_water", least=1)
        count_field(self, "read_limit", least=1, most=2**31)
        seconds(self.read_timeout, "read_timeout")
        seconds(self.write_timeout, "write_timeout")
        seconds(self.idle_timeout, "idle_timeout")
