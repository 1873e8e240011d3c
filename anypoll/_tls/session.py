"""What a :class:`TLSConnection` asks of the session behind it, and the time that it may take."""

from __future__ import annotations

import ssl
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import anyio

from .._connection.endpoint import LONG

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager

    from .._buffers.reader import Reader
    from .._buffers.writer import Writer
    from .._connection.core import Core

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

#: Seconds that a closing handshake may take if there is no ``write_timeout``.
CLOSE_TIMEOUT = 10.0

#: What a handshake is that comes too late.
NO_HANDSHAKE = "no TLS handshake"

#: Bytes of ciphertext that a close reads while it waits for the peer's end: a peer that keeps
#: sending must not keep it until the timeout.
CLOSE_MOST = 64 * 1024


@dataclass(frozen=True, slots=True)
class TLSHandshake:
    """What there is to tell of a connection's handshake."""

    seconds: float
    """from its beginning to its end, most of which is spent waiting for the peer"""
    resumed: bool
    """whether an earlier session went on, without certificates"""


class Session(Protocol):
    """A TLS session over one connection.

    There are two kinds, which behave alike. A native one encrypts and decrypts in the core: the
    reader and the writer are the connection's own, and carry plaintext. The other one is OpenSSL
    between two memory BIOs, driven from Python.
    """

    handshake: TLSHandshake
    """what :meth:`shake_hands` has found"""
    read_timeout: float | None
    """seconds for one reader call in all"""
    write_timeout: float | None
    """seconds for one ``send()`` or ``flush()``"""

    @property
    def native(self) -> bool:
        """Whether it is of the first kind."""

    @property
    def ssl(self) -> ssl.SSLObject:
        """OpenSSL's side, for its reading methods."""

    @property
    def reader(self) -> Reader:
        """Of plaintext. Its source has AnyIO's ``receive()`` and ``send()``."""

    @property
    def writer(self) -> Writer:
        """Of plaintext."""

    @property
    def closed(self) -> bool:
        """Whether it is closed to the user: a closing handshake may still be under way."""

    @property
    def is_reading(self) -> bool:
        """Whether a task is reading."""

    @property
    def is_broken(self) -> bool:
        """Whether the session has failed."""

    @property
    def has_ended(self) -> bool:
        """Whether the peer has ended its side, as far as anybody has looked."""

    async def shake_hands(self, timeout: float | None) -> None:
        """Performs the handshake.

        :raises ReadTimeout: after ``timeout`` seconds
        """

    async def send_eof(self) -> None:
        """Flushes, and sends a ``close_notify``. Idempotent."""

    async def to_the_end(self) -> None:
        """Reads ahead until the peer has ended its side.

        :raises MessageTooLarge: if that is more than ``read_limit`` bytes
        """

    async def part(self) -> bytes:
        """Leaves the connection after both ends; what is unread can still be read. Returns the
        bytes that came after the peer's.
        """

    async def close(self, *, wait: bool) -> None:
        """Makes all other calls find the session closed, sends pending output, then a
        ``close_notify``. What the peer can cause is ignored. All this may take ``closing_time()``;
        nothing is done while another task is sending, or if only abandoned output is under way.

        :param wait: await the peer's ``close_notify``; discard what comes before, but stop at
            ``CLOSE_MOST``
        """

    async def finish(self, timeout: float) -> None:
        """Ends a connection whose handler has returned: like ``Core.finish()``, with a
        ``close_notify``.
        """

    def shut(self) -> None:
        """From now on no call finds anything."""


async def within(
    core: Core,
    timeout: float | None,
    function: Callable[[], Awaitable[T]],
    late: type[E],
    what: str,
) -> T:
    """Awaits ``function()`` for at most that many seconds.

    :raises Exception: a ``late``, when they are over
    """
    if timeout is None or timeout > LONG:
        return await function()
    with anyio.move_on_after(timeout):
        return await function()
    raise core._own(late(f"{what} within {timeout} s"))


def closing_time(write_timeout: float | None) -> float:
    """Seconds that a closing handshake may take."""
    return CLOSE_TIMEOUT if write_timeout is None else write_timeout


def reads_to_close(core: Core) -> AbstractContextManager[None]:
    """For a closing handshake, which reads: an idle connection in request mode then does not."""
    return nullcontext() if core.requests is None else core.requests.closing()


def cut_off() -> ssl.SSLError:
    """The error that OpenSSL raises for a FIN, if it is told and must not ignore it."""
    exc = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol")
    exc.library, exc.reason = "SSL", "UNEXPECTED_EOF_WHILE_READING"
    return exc
