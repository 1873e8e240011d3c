"""Binding listening sockets: TCP on all addresses of a host, UNIX on a path not in use."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.lowlevel

from .._buffers.arguments import count
from .addresses import (
    INET,
    LACKING,
    any_address,
    closed_on_error,
    naming,
    resolved,
    unix_kind,
    unix_path,
    with_scope,
)

BACKLOG_MOST = 65536
_BIND_TRIES = 10
_LOCK_TRIES = 1000


def _backlog(backlog: int) -> int:
    return min(count(backlog, "backlog"), BACKLOG_MOST)


async def tcp_listening(
    host: str | None, port: int, *, family: int, backlog: int, reuse_port: bool
) -> list[socket.socket]:
    """Listening sockets for every address of ``host``. For ``None``, one dual-stack socket, or one
    per family where dual-stack sockets do not exist. With port 0 all get the same ephemeral port.

    :raises OSError: if binding fails, with the address in its text; nothing is left open
    """
    backlog = _backlog(backlog)
    addresses = await _local_addresses(host, port, _ip_family(family))
    for attempt in range(_BIND_TRIES):
        try:
            return _bind_all(addresses, backlog, family=family, reuse_port=reuse_port)
        except OSError as exc:
            # The first address's ephemeral port was taken on another address: try the next port.
            taken = exc.errno == errno.EADDRINUSE and port == 0 and len(addresses) > 1
            if not taken or attempt == _BIND_TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _ip_family(family: object) -> int:
    if isinstance(family, int) and family in {socket.AF_UNSPEC, *INET}:
        return family
    raise ValueError(f"family must be AF_UNSPEC, AF_INET or AF_INET6, not {family!r}")


async def _local_addresses(host: str | None, port: int, family: int) -> list[tuple[int, Any]]:
    if host is not None:
        flags = socket.AI_PASSIVE | socket.AI_ADDRCONFIG
        return await resolved(host, port, family=family, flags=flags)
    everywhere = [any_address(each, port) for each in (socket.AF_INET, socket.AF_INET6)]
    if family == socket.AF_UNSPEC and socket.has_dualstack_ipv6():
        family = socket.AF_INET6
    return [each for each in everywhere if family in {socket.AF_UNSPEC, each[0]}]


def _bind_all(
    addresses: Sequence[tuple[int, Any]], backlog: int, *, family: int, reuse_port: bool
) -> list[socket.socket]:
    # A lone socket on "::" takes both families, unless one was asked for; otherwise each its own.
    both = len(addresses) == 1 and addresses[0][1][0] == "::" and family == socket.AF_UNSPEC
    both = both and socket.has_dualstack_ipv6()
    sockets: list[socket.socket] = []
    lacking: dict[int, OSError] = {}
    try:
        for each, address in addresses:
            if not address[1] and sockets:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_bound(each, address, backlog, both=both, reuse_port=reuse_port))
            except OSError as exc:
                if exc.errno not in LACKING:
                    raise
                lacking.setdefault(each, exc)
        # A name may have addresses of a family that this machine lacks.
        bound = {sock.family for sock in sockets}
        wrong = [each for each in lacking if not bound or each in bound]
        if wrong:
            raise lacking[wrong[0]]
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    finally:
        lacking.clear()  # breaks the cycle of exceptions, tracebacks and this frame
    return sockets


def _bound(
    family: int, address: Any, backlog: int, *, both: bool, reuse_port: bool
) -> socket.socket:
    with naming(address), closed_on_error(socket.socket(family, socket.SOCK_STREAM)) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        sock.bind(with_scope(family, address))
        sock.listen(backlog)
    return sock


async def unix_listening(
    path: str | bytes | os.PathLike[Any],
    *,
    mode: int | None,
    backlog: int,
    kind: int = socket.SOCK_STREAM,
) -> socket.socket:
    """A listening UNIX socket. The file of a dead socket is replaced; that of a live socket, and
    any other file, never is.

    :raises OSError: if binding fails, with the path in its text; nothing is left open
    """
    raw, backlog, kind = unix_path(path), _backlog(backlog), unix_kind(kind)
    mode = None if mode is None else count(mode, "mode", most=0o7777)
    is_file = not raw.startswith(b"\0")
    with naming(raw), closed_on_error(socket.socket(socket.AF_UNIX, kind)) as sock:
        sock.setblocking(False)
        try:
            sock.bind(raw)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or not is_file:
                raise
            await _take_over(sock, raw)
        if mode is not None and is_file:
            os.chmod(raw, mode)
        sock.listen(backlog)
    return sock


async def _take_over(sock: socket.socket, path: bytes) -> None:
    """Binds the socket to a path that has a file, if that file is a dead socket's.

    :raises OSError: ``EADDRINUSE``, or the error that prevents finding out
    """
    lock = await _lock_directory(path)
    try:
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            in_use = not stat.S_ISSOCK(os.lstat(path).st_mode)  # a link counts as another file
            if in_use or _is_alive(path, sock.type):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            os.unlink(path)
        sock.bind(path)
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a newly forked child has the descriptor too
            os.close(lock)


async def _lock_directory(path: bytes) -> int | None:
    """Locks the directory, so that of several servers that find the same dead socket one goes
    first: otherwise the second could remove the file that the first has just created. ``None`` if
    the directory cannot be locked, or stays locked by someone else; starting matters more then.
    """
    try:
        lock = os.open(os.path.dirname(path) or b".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await anyio.sleep(0.001)
            else:
                return lock
    except OSError:  # a file system without locks
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _is_alive(path: bytes, kind: int) -> bool:
    """Whether a socket is bound to the path.

    :raises OSError: if that cannot be determined
    """
    # Linux reports with EPROTOTYPE that the socket is of another type before it checks whether that
    # socket listens. So a datagram socket finds every socket, even between bind() and listen(), and
    # no server has to accept it. The second try is for kernels that just refuse such a socket.
    for each in (socket.SOCK_DGRAM, kind):
        with socket.socket(socket.AF_UNIX, each) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                continue
            except OSError as exc:
                # A full backlog; another type; a datagram socket connected to someone else.
                if exc.errno not in {errno.EAGAIN, errno.EPROTOTYPE, errno.EPERM}:
                    raise
            return True
    return False
