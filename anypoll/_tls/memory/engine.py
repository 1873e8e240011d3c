"""The TLS engine: OpenSSL between two memory BIOs, driven by the connection below.

OpenSSL's output goes to the connection's own writer at once, without waiting. A record is numbered
as soon as it exists, so the peer must get it whatever becomes of the call that made it; and what is
in a connection's writer is never lost: it goes out with the next flush, or when the reader has to
wait.

Whatever needs more ciphertext pulls it: a reader, a handshake, or a write that must read first
according to OpenSSL. One task pulls, and the others wait until it has got some, or has given up.

Timeouts lie around this layer: the connection below has none, and a cancelled call loses nothing.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    EndOfStream,
    WouldBlock,
)

from ..._buffers.chain import EMPTY, Chain
from ..._buffers.errors import IdleTimeout
from ..._epoll import IS_EOF
from ..session import cut_off

if TYPE_CHECKING:
    from ..._buffers.chain import Piece
    from ..._buffers.writer import Writer
    from ..._connection.core import Core

T = TypeVar("T")

_AT_ONCE = 64 * 1024  # more than any record has
_HEADER = 5  # bytes of a record header; the last two are the length of the rest (RFC 8446, 5.1)


class Engine:
    """The TLS session of one connection; see the module."""

    __slots__ = (
        "_answered",
        "_dry",
        "_fin",
        "_header",
        "_incoming",
        "_left",
        "_outgoing",
        "_pulled",
        "_pulling",
        "_standard_compatible",
        "chain",
        "closed",
        "core",
        "decrypted",
        "ended",
        "ending",
        "established",
        "failure",
        "ssl",
        "writer",
    )

    writer: Writer
    """of plaintext; shut when nothing can be sent any more"""

    def __init__(
        self,
        core: Core,
        ssl_object: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        standard_compatible: bool,
    ) -> None:
        self.core = core
        self.ssl = ssl_object
        self._incoming = incoming
        self._outgoing = outgoing
        self._standard_compatible = standard_compatible
        self.chain = Chain()  # decrypted and not consumed
        self.decrypted = 0  # bytes of plaintext, in total
        self.established = False  # the handshake is done
        self.closed = False  # to the user: a closing handshake may still be under way
        self.ended = False  # the peer has ended its side
        self.ending = False  # the server is ending: a wait with nothing buffered does not begin
        self.failure: ssl.SSLError | None = None
        self._pulling = False
        self._pulled: anyio.Event | None = None  # set after the pull, if someone waits for it
        self._dry = False  # OpenSSL has asked for more ciphertext, and has got none since
        self._fin = False  # the peer has ended the connection: no more ciphertext will come
        self._answered = 0  # bytes that OpenSSL has sent on its own since they last drained
        self._header = b""  # the part of a record header that has come
        self._left = 0  # bytes of a record that have not come yet

    # --- errors ----------------------------------------------------------------------------------

    def check(self) -> None:
        """:raises ClosedResourceError: after the close
        :raises RuntimeError: in another event loop
        """
        if self.closed:
            raise self.core._own(ClosedResourceError())
        self.core._check_usable()

    def broken(self) -> Exception:
        """The error of a session that is unusable; the reason is its cause."""
        error = self.core._own(BrokenResourceError())
        error.__cause__ = self.failure
        return error

    def failed(self, exc: ssl.SSLError) -> Exception:
        """The exception to raise for an OpenSSL error; an alert tells the peer."""
        self.failure = self.failure or exc  # errors from further use mean nothing
        self._shut_output()
        self.collect()
        self.send_collected()
        if self.established or _is_truncation(exc):
            return self.broken()
        return self.core._own(exc)

    def _shut_output(self) -> None:
        self.writer._shut = True

    # --- output ----------------------------------------------------------------------------------

    def collect(self) -> None:
        """Moves OpenSSL's output to the connection's writer."""
        if self._outgoing.pending:
            ciphertext = self._outgoing.read()
            if not self.core.writer._shut:  # otherwise nobody can get it any more
                self.core.writer.write(ciphertext)

    def send_collected(self) -> None:
        """Sends it without waiting: the poller sends what the kernel does not take."""
        core = self.core
        if core.writer._size:
            core._send_pending()

    def encrypt(self, data: Piece) -> None:
        """Encrypts all of ``data``, for the connection's writer.

        :raises ssl.SSLWantReadError: if the peer must send something first; nothing has happened
        """
        try:
            self.ssl.write(data)
        except ssl.SSLWantReadError:
            raise
        except ssl.SSLError as exc:
            raise self.failed(exc) from exc
        finally:
            self.collect()

    def say_goodbye(self) -> None:
        """Ends this side with a ``close_notify``. Input that has arrived is decrypted first:
        OpenSSL would take it for an answer, and a wrong one.
        """
        while self.decrypt():
            if self.ended:
                break
        try:
            self.ssl.unwrap()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            raise self.failed(exc) from exc
        else:
            self.ended = True
        finally:
            self.collect()

    # --- input -----------------------------------------------------------------------------------

    def decrypt(self) -> bool:
        """Decrypts the next record that OpenSSL holds onto the chain. False: there is none.

        :raises BrokenResourceError: if the input is not TLS
        """
        if self.ended:
            return True
        if self.failure:
            raise self.broken()
        if self._dry:
            return False
        try:
            data = self.ssl.read(_AT_ONCE)
        except ssl.SSLWantReadError:
            if not self._fin:
                self._dry = True
                return False
            if self._standard_compatible:
                raise self.failed(cut_off()) from self.failure
            data = b""
        except ssl.SSLZeroReturnError:  # raised once this side has sent a close_notify
            data = b""
        except ssl.SSLError as exc:
            raise self.failed(exc) from exc
        finally:
            self._answered += self._outgoing.pending
            self.collect()
        if data:
            self.chain.append(memoryview(data))
            self.decrypted += len(data)
        else:
            self.ended = True
        return True

    def arrived(self) -> bool:
        """Whether another record, or the end, has arrived; does not wait."""
        if self.decrypt():
            return not self.ended
        if self._pulling:
            return False
        try:
            self.core.reader.peek_nowait(1)
        except WouldBlock:
            return False
        except EndOfStream:
            self._at_end_of_file()
        else:
            self._feed()
        return True

    @property
    def is_pulling(self) -> bool:
        """Whether a task waits for ciphertext."""
        return self._pulling

    async def pull(self) -> bool:
        """Waits for ciphertext, and gives it to OpenSSL. Returns whether the task was suspended.

        :raises EndOfStream: if the server is ending, and nothing has begun
        :raises BrokenResourceError, ClosedResourceError, IdleTimeout: as the connection
        """
        if self._pulling:
            self._pulled = self._pulled or anyio.Event()
            await self._pulled.wait()
            return True
        self._pulling = True
        try:
            return await self._pull()
        except (BrokenResourceError, IdleTimeout):
            self._shut_output()
            raise
        finally:
            self._pulling = False
            if self._pulled is not None:
                self._pulled.set()
                self._pulled = None

    @property
    def has_answered_much(self) -> bool:
        """Whether OpenSSL's own answers must drain, even while another task is sending."""
        return self._answered >= self.core.limits.write_high_water

    def has_drained(self) -> None:
        """The kernel has what OpenSSL sent on its own."""
        self._answered = 0

    async def _pull(self) -> bool:
        core = self.core
        self.collect()
        if self.has_answered_much:
            await core.flush_claimed()
            self.has_drained()
        self.follow_draining()
        if self._fin:  # so no answer will come either
            raise self.failed(cut_off())
        try:
            suspended = await core.fill(1)
        except EndOfStream:
            return self._no_more()
        self._feed()
        return suspended

    def follow_draining(self) -> None:
        """The server is ending: the connection's wait sees that, unless something has begun."""
        core = self.core
        self.ending = self.ending or (core.draining and not self.closed)
        core.draining = self.ending and not self.closed and not self.has_begun

    def _no_more(self) -> bool:
        core = self.core
        if core.status() & IS_EOF:
            self._at_end_of_file()
        elif self.closed:
            raise core._own(ClosedResourceError()) from None
        else:
            self.ending = True
            if not self.has_begun:
                raise core._own(EndOfStream()) from None
        return False

    async def interrupt(self) -> None:
        """Makes the pulling task find this closed; returns when that has happened."""
        if self._pulling:
            self._pulled = self._pulled or anyio.Event()
            self.core.end_if_idle()
            await self._pulled.wait()
        self.core.draining = False

    def _at_end_of_file(self) -> None:
        """Handles the peer's FIN. Earlier input is decrypted first. OpenSSL is not told: it might
        take the FIN for a ``close_notify``, because some Pythons set ``OP_IGNORE_UNEXPECTED_EOF``.
        """
        self._fin = True
        self._dry = False

    def _feed(self) -> None:
        """Gives OpenSSL the bytes in the window of the connection's reader."""
        reader = self.core.reader
        start, end = reader._start, reader._end
        view = reader._view[start:end] if end > start else EMPTY
        self._incoming.write(view)
        self._dry = False
        reader._start = max(start, end)
        self._follow(view)

    # --- where records end -----------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether anything is unread, even if it is only part of a record."""
        return bool(len(self.chain) or self._left or self._header)

    def _follow(self, view: memoryview) -> None:
        """Tracks record boundaries: OpenSSL does not tell whether it holds part of a record."""
        while view:
            if self._left:
                step = min(self._left, len(view))
                self._left -= step
            else:
                step = min(_HEADER - len(self._header), len(view))
                self._header += bytes(view[:step])
                if len(self._header) == _HEADER:
                    self._left = int.from_bytes(self._header[3:], "big")
                    self._header = b""
            view = view[step:]

    # --- handshakes ------------------------------------------------------------------------------

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Repeats a call that may want to read first, until it does not."""
        while True:
            try:
                return function(*args)
            except ssl.SSLWantReadError:
                if self._fin and not self._standard_compatible:
                    raise self.core._own(EndOfStream()) from None
                await self.pull()
            except ssl.SSLError as exc:
                error = self.failed(exc)
                if error is exc:  # it must not become its own cause
                    raise
                raise error from exc
            finally:
                self.collect()

    def leftover(self) -> bytes:
        """The bytes that came after the end of the session."""
        return self._incoming.read()


def _is_truncation(exc: ssl.SSLError) -> bool:
    """Whether the peer has ended without a ``close_notify``."""
    return isinstance(exc, (ssl.SSLEOFError, ssl.SSLSyscallError)) or "UNEXPECTED_EOF" in str(
        exc.reason
    )
