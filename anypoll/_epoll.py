"""Typed bindings to the compiled core; the only module that imports it.

Core functions on the path of a request are passed through as they are, under their names without
the ``ap_`` (``conn_read``, ``conn_write``, ...): a wrapper would cost as much as the call. They
return a number, a negative errno, or one of the ``E*`` codes; csrc/anypoll.h has the prose. All
others are wrapped here, and go through :func:`check`.

Handles are cffi pointers with a destructor: the core counts references, and a handle that is
collected drops its own, in whichever thread that happens. Functions called for every request take a
bare pointer (:func:`bare`) instead, which cffi converts in half the time.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from errno import ECANCELED
from struct import Struct, calcsize
from typing import TYPE_CHECKING, TypeVar

from ._buffers.chain import Piece
from ._buffers.errors import POLLER_ENDED, os_error, stream_error
from ._buffers.reader import SCATTER
from ._native._core import ffi, lib

if TYPE_CHECKING:
    from ._native import Core
    from ._native._core import (
        Accepted,
        Account,
        Block,
        Conn,
        Hub,
        Listener,
        Poller,
        TLSStatus,
        View,
    )

    __all__ = (
        "Accepted",
        "Account",
        "Block",
        "Conn",
        "Hub",
        "Listener",
        "Poller",
        "TLSStatus",
        "View",
    )

NULL = ffi.NULL

# Numbers that files below this one repeat.
assert (SCATTER, POLLER_ENDED) == (lib.AP_SCATTER, lib.AP_EPOLLER)

EEOF = lib.AP_EEOF
EQUEUED = lib.AP_EQUEUED
EDELIM = lib.AP_EDELIM
EIDLE = lib.AP_EIDLE
ELATE = lib.AP_ELATE
ETLS = lib.AP_ETLS
ECUT = lib.AP_ECUT
TCP = lib.AP_TCP
UNIX = lib.AP_UNIX
SEQPACKET = lib.AP_SEQPACKET
FDS_MOST = lib.AP_FDS_MOST
NOWAIT = lib.AP_NOWAIT
NEW_BLOCK = 1 << lib.AP_NEW_BLOCK_SHIFT
MAIL_READ = lib.AP_MAIL_READ
MAIL_WRITE = lib.AP_MAIL_WRITE
MAIL_SENT = lib.AP_MAIL_SENT
MAIL_TRIM = lib.AP_MAIL_TRIM
MAIL_ACCEPT = lib.AP_MAIL_ACCEPT
MAIL_STARVED = lib.AP_MAIL_STARVED
MAIL_IDLE = lib.AP_MAIL_IDLE
MAIL_FDS = lib.AP_MAIL_FDS
MAIL_GONE = lib.AP_MAIL_GONE
MAIL_FAILED = lib.AP_MAIL_FAILED
IS_CLOSED = lib.AP_IS_CLOSED
IS_BROKEN = lib.AP_IS_BROKEN
IS_EOF = lib.AP_IS_EOF
IS_IDLE_END = lib.AP_IS_IDLE_END
IS_SHUT = lib.AP_IS_SHUT
IS_GONE = lib.AP_IS_GONE
IS_FAILED = lib.AP_IS_FAILED
IS_CUT = lib.AP_IS_CUT
TLS_SERVER = lib.AP_TLS_SERVER
TLS_RAGGED = lib.AP_TLS_RAGGED

conn_read = lib.ap_conn_read
conn_find = lib.ap_conn_find
conn_watch_peer = lib.ap_conn_watch_peer
conn_write = lib.ap_conn_write
conn_drain = lib.ap_conn_drain
conn_consume = lib.ap_conn_consume
conn_set_window = lib.ap_conn_set_window
conn_set_block = lib.ap_conn_set_block
conn_buffered = lib.ap_conn_buffered
conn_arrived = lib.ap_conn_arrived
conn_queued = lib.ap_conn_queued
conn_awaited = lib.ap_conn_awaited
conn_give_up = lib.ap_conn_give_up
conn_hold = lib.ap_conn_hold
conn_status = lib.ap_conn_status
conn_disarm_read = lib.ap_conn_disarm_read
conn_disarm_write = lib.ap_conn_disarm_write
conn_shutdown = lib.ap_conn_shutdown
conn_linger = lib.ap_conn_linger
conn_detach = lib.ap_conn_detach
conn_report = lib.ap_conn_report
conn_fd = lib.ap_conn_fd
conn_set_idle = lib.ap_conn_set_idle
conn_shake = lib.ap_conn_shake
conn_say_goodbye = lib.ap_conn_say_goodbye
conn_end_tls = lib.ap_conn_end_tls
conn_hold_tls = lib.ap_conn_hold_tls
conn_release_tls = lib.ap_conn_release_tls
hub_trim = lib.ap_hub_trim
hub_kill = lib.ap_hub_kill
listener_close = lib.ap_listener_close
listener_fd = lib.ap_listener_fd
fd_close = lib.ap_fd_close
fork_child = lib.ap_fork_child


def check(code: int) -> int:
    """Returns ``code`` if it is not negative.

    :raises OSError: for a negative errno
    """
    if code < 0:
        raise os_error(code)
    return code


class PollerEndedError(Exception):
    """The chosen poller takes no more connections; another one does."""


def _check_open(code: int) -> None:
    """:raises PollerEndedError, OSError: for a failure to open a connection or listener"""
    if code <= POLLER_ENDED:
        raise PollerEndedError
    check(code)


# --- pollers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PollerStatistics:
    """Counters of one poller since its start, and current gauges."""

    connections: int
    """open connections and listeners assigned to it"""
    waits: int
    """``epoll_wait`` calls that blocked"""
    events: int
    reads: int
    writes: int
    bytes_received: int
    bytes_sent: int
    wakeups: int
    """how often it woke an event loop"""
    wakeups_coalesced: int
    """notifications for an event loop that had already been woken"""
    stale_tokens: int
    """events and notifications for connections closed meanwhile"""
    stalls: int
    """writes that the kernel took only in part, or not at all"""
    timeouts: int
    blocks_in_use: int
    blocks_free: int
    bytes_in_use: int
    bytes_free: int
    bytes_pinned: int
    """in blocks that are fully read, but kept by views"""
    polls: int
    """all ``epoll_wait`` calls"""
    again: int
    """reads, writes and accepts that found nothing to do"""
    accepts: int
    slots: int
    """connections and listeners, including closed ones that something still refers to"""
    looks: int
    """how often an event loop that drives it looked for more before it went on"""
    spins: int
    """how often it then waited without sleeping, for ``configure(spin=...)``"""
    hits: int
    """how many of the looks found something"""


_STATISTICS = tuple(PollerStatistics.__dataclass_fields__)


def open_poller() -> Poller:
    """A new poller with a running thread.

    :raises OSError: if descriptors, memory or threads are exhausted
    """
    out = ffi.new("ap_poller **")
    check(lib.ap_poller_new(out))
    poller: Poller = ffi.gc(out[0], lib.ap_poller_unref)
    check(lib.ap_poller_start(poller))
    return poller


def stop_poller(poller: Poller) -> None:
    """Ends and joins the poller's thread."""
    lib.ap_poller_stop(poller)


def drain_poller(poller: Poller) -> None:
    """Lets the poller and its thread end with the last connection and listener."""
    lib.ap_poller_drain(poller, 1)


def keep_poller(poller: Poller) -> bool:
    """Undoes :func:`drain_poller`. False: the poller has already ended."""
    return lib.ap_poller_drain(poller, 0) == 0


def poller_ended(poller: Poller) -> int | None:
    """``None`` while it runs; 0 if it has ended as requested; the errno with which it failed."""
    state = lib.ap_poller_state(poller)
    if state > POLLER_ENDED:
        return None
    error = POLLER_ENDED - state
    return 0 if error == ECANCELED else error


def limit_spin(microseconds: int) -> None:
    """For how long an event loop that drives waits for more without sleeping; 0: not at all. For
    the whole process.
    """
    check(lib.ap_spin_limit(microseconds * 1000))


def lend_poller(poller: Poller, hub: Hub | None) -> None:
    """Has the event loop of ``hub`` drive the poller with ``hub_drive``, whenever
    :func:`poller_fd` is readable; with ``None`` the poller's thread drives it again.
    """
    lib.ap_poller_lend(poller, NULL if hub is None else hub)


def poller_fd(poller: Poller) -> int:
    """The descriptor that is readable while there is something to drive for."""
    return check(lib.ap_poller_fd(poller))


def nudge_poller(poller: Poller) -> None:
    """Makes the poller check at once for memory to recycle."""
    lib.ap_poller_nudge(poller)


def poller_statistics(poller: Poller) -> PollerStatistics:
    """The poller's counters.

    :raises OSError: ``ECHILD`` in the child of a fork
    """
    out = ffi.new("ap_poller_stats *")
    check(lib.ap_poller_statistics(poller, out))
    return PollerStatistics(**{name: getattr(out, name) for name in _STATISTICS})


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """The blocks of received bytes in the whole process: those of the pollers, those of the event
    loops (read by a loop itself, or merged for a request), and those of ended pollers and loops
    that views keep.
    """

    blocks_in_use: int
    blocks_free: int
    bytes_in_use: int
    bytes_free: int
    bytes_pinned: int
    """in blocks that are fully read, but kept by views"""


_MEMORY = tuple(MemoryStatistics.__dataclass_fields__)


def memory_statistics() -> MemoryStatistics:
    """The current values."""
    out = ffi.new("ap_poller_stats *")
    lib.ap_memory_statistics(out)
    return MemoryStatistics(**{name: getattr(out, name) for name in _MEMORY})


# --- hubs ----------------------------------------------------------------------------------------


def open_hub() -> Hub:
    """A new hub.

    :raises OSError: if descriptors or memory are exhausted
    """
    out = ffi.new("ap_hub **")
    check(lib.ap_hub_new(out))
    hub: Hub = ffi.gc(out[0], lib.ap_hub_unref)
    return hub


def hub_fd(hub: Hub) -> int:
    """The descriptor that is readable while the hub has tokens."""
    return check(lib.ap_hub_fd(hub))


Handle = TypeVar("Handle")
_CONN = ffi.typeof("ap_conn *")
_POINTER = ffi.typeof("void *")
_WORDS = ffi.typeof("uintptr_t *")


def address(handle: object) -> int:
    """The pointer as a number, for the native types."""
    return int(ffi.cast("uintptr_t", handle))


def bare(handle: Handle) -> Handle:
    """The same pointer without the destructor; valid as long as ``handle`` is."""
    pointer: Handle = ffi.cast(ffi.typeof(handle), handle)
    return pointer


# --- connections ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """Counters of one connection; they work after its end too."""

    bytes_received: int
    bytes_sent: int
    reads: int
    """system calls that read something"""
    writes: int
    """system calls that wrote something"""
    wakeups: int
    """how often the event loop was notified about it"""
    buffered_input: int
    """bytes received and not consumed"""
    buffered_output: int
    """bytes written and not taken by the kernel"""
    pinned: int
    """bytes of blocks that only views keep alive"""
    created_at: float
    """seconds, as ``time.monotonic()``"""
    last_activity: float
    """likewise, to within about 4 ms: when a byte last went in or out"""


def open_connection(core: Core, poller: Poller, fd: int, high_water: int) -> None:
    """Takes over a connected, non-blocking socket; ``core`` owns ``fd`` when it returns.

    :raises OSError: ``ENOMEM``; ``EBADF`` if the hub's loop has ended
    :raises PollerEndedError: if the poller has ended
    """
    code = core._open(address(poller), fd, high_water)
    if code < 0:
        _check_open(code)


def connection_at(address: int) -> Conn:
    """The connection at that address, which a native ``Core`` owns."""
    conn: Conn = ffi.cast(_CONN, address)
    return conn


def set_nodelay(fd: int) -> None:
    """Sets ``TCP_NODELAY``.

    :raises OSError: if that fails
    """
    check(lib.ap_fd_nodelay(fd))


def new_view() -> View:
    """A record for a call to fill."""
    view: View = ffi.new("ap_view *")
    return view


def _pieces(pieces: Sequence[Piece]) -> tuple[object, object]:
    keep = [ffi.from_buffer("char[]", piece) for piece in pieces]
    sizes = [len(buffer) for buffer in keep]
    return ffi.new("ap_piece[]", list(zip(keep, sizes, strict=True))), keep


def conn_send(conn: Conn, pieces: Sequence[Piece]) -> int:
    """Sends the pieces; returns the number of bytes queued, or a negative errno.

    If any are queued, the caller keeps the objects alive and unchanged until ``MAIL_SENT``.
    """
    array, _keep = _pieces(pieces)
    return lib.ap_conn_send(conn, array, len(pieces))


def conn_requeue(conn: Conn, pieces: Sequence[Piece]) -> int:
    """Replaces the queue with ``pieces``, after ``conn_hold``."""
    array, _keep = _pieces(pieces)
    return lib.ap_conn_requeue(conn, array, len(pieces))


def conn_rest(conn: Conn) -> bytes:
    """The bytes that a detached connection had read ahead."""
    parts = []
    room = ffi.new("char[]", 65536)
    while n := check(lib.ap_conn_rest(conn, room, 65536)):
        parts.append(bytes(ffi.buffer(room, n)))
    return b"".join(parts)


# --- UNIX sockets --------------------------------------------------------------------------------

_BYTES_AT_ONCE = 256 * 1024


def take_fds(conn: Conn, pos: int, size: int, most: int) -> tuple[bytes, list[int]]:
    """Consumes at most ``size`` unread bytes, and takes at most ``most`` of the descriptors that
    came with them; any others are closed.

    :raises OSError: ``EBADF`` after the close
    """
    size = min(size, check(lib.ap_conn_buffered(conn, pos)), _BYTES_AT_ONCE)
    room, fds = ffi.new("char[]", size), ffi.new("int[]", FDS_MOST)
    count = ffi.new("int *", min(most, FDS_MOST))
    got = check(lib.ap_conn_take_fds(conn, pos, room, size, fds, count))
    return bytes(ffi.buffer(room, got)), list(fds[0 : count[0]])


def receive_message(
    conn: Conn, size: int, most: int, deadline: int
) -> tuple[bytes, list[int]] | int:
    """The next message, truncated to ``size`` bytes, and at most ``most`` of its descriptors; or a
    negative code.
    """
    view, fds = new_view(), ffi.new("int[]", max(min(most, FDS_MOST), 1))
    count = ffi.new("int *", min(most, FDS_MOST))
    got = lib.ap_conn_receive(conn, min(size, 2**40), deadline, view, fds, count)
    if got < 0:
        return got
    block = ffi.gc(view.block, lib.ap_block_unref, view.size)
    message = bytes(ffi.buffer(block, view.end)[view.start :])
    return message, list(fds[0 : count[0]])


def send_fds(conn: Conn, message: Piece, fds: Sequence[int]) -> int:
    """Sends as much of ``message`` as one system call takes, with copies of the descriptors;
    returns the bytes taken, or a negative code.
    """
    data = ffi.from_buffer("char[]", message)
    return lib.ap_conn_send_fds(conn, data, len(data), list(fds), len(fds))


def connection_statistics(conn: Conn, pos: int, output: int) -> ConnectionStatistics:
    """The connection's counters; ``output``: bytes that Python still holds."""
    out = ffi.new("ap_conn_stats *")
    check(lib.ap_conn_statistics(conn, pos, out))
    return ConnectionStatistics(
        bytes_received=out.bytes_received,
        bytes_sent=out.bytes_sent,
        reads=out.reads,
        writes=out.writes,
        wakeups=out.wakeups,
        buffered_input=out.buffered_input,
        buffered_output=out.buffered_output + output,
        pinned=out.pinned,
        created_at=out.created_at / 1e9,
        last_activity=out.last_activity / 1e9,
    )


# --- accepting -----------------------------------------------------------------------------------


def open_account() -> Account:
    """An account of accept credits, to be shared by listeners.

    :raises OSError: ``ENOMEM``
    """
    out = ffi.new("ap_account **")
    check(lib.ap_account_new(out))
    account: Account = ffi.gc(out[0], lib.ap_account_unref)
    return account


def add_credits(account: Account, credits: int) -> None:
    """Lets the account's listeners accept that many more connections."""
    check(lib.ap_account_add(account, credits))


def take_back_credit(account: Account) -> bool:
    """Takes back a credit; returns whether there was one left."""
    return lib.ap_account_take_back(account) == 1


def open_listener(poller: Poller, hub: Hub, fd: int, account: Account) -> Listener:
    """Takes over a listening, non-blocking socket; owns ``fd`` when it returns.

    :raises OSError: ``ENOMEM``, ``ENOSPC``; ``EBADF`` if the hub's loop has ended
    :raises PollerEndedError: if the poller has ended
    """
    out = ffi.new("ap_listener **")
    _check_open(lib.ap_listener_new(poller, hub, fd, account, out))
    listener: Listener = ffi.gc(out[0], lib.ap_listener_release)
    return listener


def listener_id(listener: Listener) -> int:
    """The number by which tokens name the listener."""
    return lib.ap_listener_id(listener)


_ACCEPTED = Struct("=iHHI16s")
_ACCEPT_MOST = 64


def take_accepted(listener: Listener) -> list[tuple[int, bytes]]:
    """Descriptors of accepted connections, which the caller then owns, each with the peer's address
    for :func:`peer_address`.

    :raises OSError: for an error of ``accept4``; ``EBADF`` after the close
    :raises BrokenResourceError: if the poller has failed
    """
    room = ffi.new("ap_accepted[]", _ACCEPT_MOST)
    n = lib.ap_listener_take(listener, room, _ACCEPT_MOST)
    if n <= POLLER_ENDED:
        raise stream_error(n)
    check(n)
    size = _ACCEPTED.size
    memory = bytes(ffi.buffer(room, n * size))
    return [(room[i].fd, memory[i * size : (i + 1) * size]) for i in range(n)]


def peer_address(record: bytes) -> tuple[str, int] | str | None:
    """The address as AnyIO gives it: host (with ``%scope``, if any) and port; ``""`` for a UNIX
    socket without a name, and ``None`` for one with a name, for which the socket must be asked.
    """
    _fd, family, port, scope, address = _ACCEPTED.unpack(record)
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, address[:4]), port
    if family == socket.AF_INET6:
        host = socket.inet_ntop(socket.AF_INET6, address)
        return (f"{host}%{scope}" if scope else host), port
    return None if port else ""


# --- TLS -----------------------------------------------------------------------------------------


def words(thing: object, count: int) -> list[int]:
    """The first machine words of an object's own memory.

    :raises ValueError: if it has fewer
    """
    if count * calcsize("P") > type(thing).__basicsize__:
        raise ValueError(f"{type(thing).__name__} has no {count} words")
    memory: list[int] = ffi.unpack(ffi.cast(_WORDS, id(thing)), count)
    return memory


def tls_load(path: bytes | None, version: int) -> int:
    """Finds the functions of OpenSSL. 0, or a negative errno; see csrc/anypoll.h."""
    return lib.ap_tls_load(NULL if path is None else path, version)


def tls_check(ssl: int, ctx: int, options: int, verify_mode: int) -> bool:
    """Whether these addresses are an ``SSL`` and its ``SSL_CTX``, which has such settings."""
    pointers = ffi.cast(_POINTER, ssl), ffi.cast(_POINTER, ctx)
    return lib.ap_tls_check(*pointers, options, verify_mode) == 1


def conn_start_tls(conn: Conn, pos: int, ssl: int, flags: int) -> int:
    """Has the connection carry the session of the ``SSL`` at that address. 0, or a negative code;
    see csrc/anypoll.h.
    """
    return lib.ap_conn_start_tls(conn, pos, ffi.cast(_POINTER, ssl), flags)


def tls_status(conn: Conn) -> TLSStatus:
    """The state of the connection's session."""
    status: TLSStatus = ffi.new("ap_tls_status *")
    check(lib.ap_conn_tls_status(conn, status))
    return status


def text_of(memory: object) -> str:
    """The text in a record that a call has filled."""
    text: bytes = ffi.string(memory)
    return text.decode("utf-8", "replace")


# --- fault injection, for tests ------------------------------------------------------------------


def set_fault(call: str, error: int = 0, *, skip: int = 0, times: int = 1, limit: int = 0) -> None:
    """Makes system calls of a kind (``"READ"``, ``"WRITE"``, ...) fail; see csrc/anypoll.h.

    :raises OSError: ``EINVAL``
    """
    check(lib.ap_fault_set(getattr(lib, f"AP_CALL_{call}"), error, skip, times, limit))


def fault_hits(call: str) -> int:
    """How many calls of that kind have failed since :func:`set_fault`."""
    return check(lib.ap_fault_hits(getattr(lib, f"AP_CALL_{call}")))


def clear_faults() -> None:
    """Removes all faults."""
    lib.ap_fault_clear()
