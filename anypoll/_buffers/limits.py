"""Options, validated once and frozen, so that nothing behind them has to check again."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

if TYPE_CHECKING:
    from .._epoll import PollerStatistics

KIB = 1024
MIB = 1024 * KIB

#: What a connection reads ahead at most, in bytes; it goes on at a quarter of that.
READ_HIGH_WATER = 256 * KIB
#: Above this much unsent output a reader call waits for it to drain, in bytes.
WRITE_HIGH_WATER = 256 * KIB
#: The largest single request of a reader, in bytes.
READ_LIMIT = 64 * MIB

#: The first block of input of a connection, in bytes, header included.
BLOCK_SIZE = 2 * KIB

#: How long one close callback may take, in seconds, if no server says otherwise.
CLOSE_CALLBACK_TIMEOUT = 10.0

LoadBalance = str | Callable[[Sequence["PollerStatistics"]], int]


def shown(n: int) -> str:
    """``n`` for an error's text: Python refuses to print integers of thousands of digits."""
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
    """``value`` as an ``int`` of at least 1; the text is AnyIO's.

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
    """``value`` as a number of seconds that is not negative; ``None`` stays ``None``.

    :raises TypeError: if it is not a number
    :raises ValueError: if it is negative, not a number, or an integer that no ``float`` can hold
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


def _count_field(record: Any, name: str, *, least: int = 0, most: int | None = None) -> None:
    """Validates a field of a frozen dataclass, and makes it an ``int``."""
    object.__setattr__(record, name, count(getattr(record, name), name, least=least, most=most))


@dataclass(frozen=True, slots=True)
class Keepalive:
    """TCP keepalive: the first probe after ``idle`` seconds of silence, then one every
    ``interval`` seconds; the connection is broken after ``count`` probes without an answer
    (see ``tcp(7)``).
    """

    idle: int = 60
    interval: int = 15
    count: int = 4

    def __post_init__(self) -> None:
        for name in ("idle", "interval"):
            _count_field(self, name, least=1, most=32767)
        _count_field(self, "count", least=1, most=127)


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds one connection; all but the timeouts in bytes."""

    read_high_water: int = READ_HIGH_WATER
    write_high_water: int = WRITE_HIGH_WATER
    read_limit: int = READ_LIMIT
    read_timeout: float | None = None
    write_timeout: float | None = None
    idle_timeout: float | None = None
    close_callback_timeout: float = CLOSE_CALLBACK_TIMEOUT

    def __post_init__(self) -> None:
        _count_field(self, "read_high_water", least=1, most=2**30)
        _count_field(self, "write_high_water", least=1)
        _count_field(self, "read_limit", least=1, most=2**31)
        seconds(self.read_timeout, "read_timeout")
        seconds(self.write_timeout, "write_timeout")
        seconds(self.idle_timeout, "idle_timeout")


@dataclass(frozen=True, slots=True)
class Settings:
    """What :func:`anypoll.configure` sets for the process."""

    pollers: int = 1
    load_balance: LoadBalance = "round_robin"
    block_size: int = BLOCK_SIZE
    checkpoint_budget: int = 64

    def __post_init__(self) -> None:
        _count_field(self, "pollers", least=1, most=256)
        _count_field(self, "block_size", least=BLOCK_SIZE, most=MIB)
        _count_field(self, "checkpoint_budget", least=1)
        balance: Any = self.load_balance
        names = ("round_robin", "random", "least_connections")
        if not callable(balance) and balance not in names:
            raise ValueError(
                f"load_balance must be one of {', '.join(names)}, or a callable, not {balance!r}"
            )
