"""Sockets before they become connections or listeners: making, options, addresses. No awaits but
for name resolution, which is AnyIO's, and for another server that takes a path over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import anyio
import anyio.lowlevel

from .._buffers.limits import Keepalive, count
from .._connection.attributes import PeerCredentials

IPAddress = tuple[str, int]
Address = IPAddress | str | bytes

BACKLOG_MOST = 65536
_BIND_TRIES = 10
_LOCK_TRIES = 1000

#: Errors of a socket or an address of a family that this machine lacks, or has turned off.
LACKING = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})

_INET = {socket.AF_INET, socket.AF_INET6}


# --- addresses -----------------------------------------------------------------------------------


def plain_address(address: Any) -> Address:
    """A socket's address as AnyIO gives it: an IPv6 one as ``(host%scope, port)``; the path of a
    UNIX socket as ``str``, an abstract name as ``bytes``, with its leading NUL.
    """
    if isinstance(address, bytes):
        return address
    if isinstance(address, tuple):
        host, port, *rest = address
        scope = rest[1] if len(rest) == 2 else 0
        return (f"{host.partition('%')[0]}%{scope}" if scope else host), port
    return str(address)


def host_text(host: object, name: str) -> str:
    """A host as text.

    :raises TypeError: if it is neither a ``str`` nor an address of :mod:`ipaddress`
    """
    if isinstance(host, str):
        return host
    if isinstance(host, (IPv4Address, IPv6Address)):
        return str(host)
    raise TypeError(f"{name} must be a str or an IP address, not {type(host).__name__}")


def port_number(port: int, name: str) -> int:
    """:raises TypeError, ValueError: if it is not an integer, or not within 0 to 65535"""
    return count(port, name, most=65535)


# --- options -------------------------------------------------------------------------------------


def set_nodelay(sock: socket.socket, on: bool) -> None:
    """``TCP_NODELAY``."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, on)


def check_keepalive(keepalive: object) -> None:
    """:raises TypeError: for anything but a ``bool`` or a :class:`~anypoll.Keepalive`"""
    if not isinstance(keepalive, (bool, Keepalive)):
        raise TypeError(f"keepalive must be a bool or a Keepalive, not {keepalive!r}")


def set_keepalive(sock: socket.socket, keepalive: bool | Keepalive) -> None:
    """``SO_KEEPALIVE``, and its times if a :class:`~anypoll.Keepalive` is given.

    :raises TypeError: for anything else
    """
    check_keepalive(keepalive)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(keepalive))
    if isinstance(keepalive, Keepalive):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, keepalive.idle)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, keepalive.interval)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, keepalive.count)


_UCRED = struct.Struct("=iII")  # struct ucred


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Of a connected UNIX socket; see unix(7), ``SO_PEERCRED``."""
    record = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(record))


# --- adopting ------------------------------------------------------------------------------------


def _described(sock: socket.socket) -> tuple[str, str]:
    return socket.AddressFamily(sock.family).name, socket.SocketKind(sock.type).name


def validated(sock_or_fd: Any, *, families: Sequence[int], listening: bool) -> socket.socket:
    """The socket, non-blocking and known to be what is wanted. The messages are AnyIO's.

    :raises TypeError: if it is neither a socket nor a descriptor
    :raises ValueError: if it is a wrong kind of socket
    """
    if isinstance(sock_or_fd, socket.socket):
        sock, made = sock_or_fd, False
    elif isinstance(sock_or_fd, int):
        if not -(2**31) <= sock_or_fd < 2**31:  # Python would raise an OverflowError
            raise ValueError(_MISSING[listening])
        try:
            sock, made = socket.socket(fileno=sock_or_fd), True
        except OSError as exc:
            if exc.errno == errno.ENOTSOCK:
                raise ValueError("the file descriptor does not refer to a socket") from exc
            raise ValueError(_MISSING[listening]) from exc
    else:
        raise TypeError(f"expected an int or socket, got {type(sock_or_fd).__qualname__} instead")
    try:
        _validate(sock, families, listening=listening)
    except BaseException:
        if made:
            sock.detach()  # the descriptor stays the caller's
        raise
    sock.setblocking(False)
    return sock


_MISSING = {
    False: "the socket must be connected",
    True: "the socket must be bound to a local address",
}


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _validate(sock: socket.socket, families: Sequence[int], *, listening: bool) -> None:
    try:
        ready = _is_bound(sock) if listening else bool(sock.getpeername() or True)
    except OSError as exc:
        raise ValueError(_MISSING[listening]) from exc
    if not ready:
        raise ValueError(_MISSING[listening])
    if listening and sock.type == socket.SOCK_STREAM and _has_peer(sock):
        raise ValueError("the socket must not be connected")
    family, kind = _described(sock)
    if sock.family not in families:
        wanted = " or ".join(socket.AddressFamily(f).name for f in families)
        raise ValueError(f"address family mismatch: expected {wanted}, got {family}")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"socket type mismatch: expected SOCK_STREAM, got {kind}")


def _is_bound(sock: socket.socket) -> bool:
    name = sock.getsockname()
    return bool(name[1] if sock.family in _INET else name)


# --- listening -----------------------------------------------------------------------------------


def _backlog(backlog: int) -> int:
    return min(count(backlog, "backlog"), BACKLOG_MOST)


async def tcp_listening(
    host: str | None, port: int, *, family: int, backlog: int, reuse_port: bool
) -> list[socket.socket]:
    """Listening sockets for every address of ``host``; one dual-stack socket for ``None``, or one
    of each family where there are no such sockets. With port 0 all get the same ephemeral port.

    :raises OSError: for a failed bind, with the address in its text; nothing is left open
    """
    backlog = _backlog(backlog)
    addresses = await _local_addresses(host, port, _ip_family(family))
    for attempt in range(_BIND_TRIES):
        try:
            return _bind_all(addresses, backlog, family=family, reuse_port=reuse_port)
        except OSError as exc:
            # the ephemeral port of the first address was taken on another one: the next may be free
            taken = exc.errno == errno.EADDRINUSE and port == 0 and len(addresses) > 1
            if not taken or attempt == _BIND_TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _ip_family(family: object) -> int:
    if isinstance(family, int) and family in {socket.AF_UNSPEC, *_INET}:
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


def any_address(family: int, port: int) -> tuple[int, tuple[str, int]]:
    """All interfaces of a family."""
    return family, ("::" if family == socket.AF_INET6 else "0.0.0.0", port)  # noqa: S104 -- asked for


def _bind_all(
    addresses: Sequence[tuple[int, Any]], backlog: int, *, family: int, reuse_port: bool
) -> list[socket.socket]:
    # alone on "::" a socket takes both families, unless one was asked for; else each takes its own
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
        # a name may have addresses of a family that this machine lacks
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


@contextmanager
def closed_on_error(sock: socket.socket) -> Iterator[socket.socket]:
    """Closes the socket if the block fails."""
    try:
        yield sock
    except BaseException:
        sock.close()
        raise


@contextmanager
def naming(address: Any) -> Iterator[None]:
    """An ``OSError`` of the system that leaves the block tells which address it is about.

    :param address: host and port, or the path of a UNIX socket
    """
    try:
        yield
    except socket.gaierror:
        raise
    except OSError as exc:
        # Python itself refuses a path that is too long, without a number
        code = errno.ENAMETOOLONG if exc.errno is None else exc.errno
        text = os.strerror(code)
        if isinstance(address, bytes):
            raise OSError(code, text, os.fsdecode(address)) from None
        host, port = address[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise OSError(code, f"{where}: {text}") from None


# --- names ---------------------------------------------------------------------------------------


async def resolved(
    host: str, port: int, *, family: int = socket.AF_UNSPEC, flags: int = 0
) -> list[tuple[int, Any]]:
    """Families and addresses of a host, each once, at least one.

    :raises gaierror: if there are none, also for text that can be no host at all
    """
    known = literal(host, port)
    # C ends a string at a NUL, and uvloop an address at a "%": both would pass as another host
    if "\0" in host or ("%" in host and known is None):
        raise socket.gaierror(socket.EAI_NONAME, f"no name of a host: {host!r}")
    if known is not None and family in {socket.AF_UNSPEC, known[0]}:
        return [known]
    try:
        found = await anyio.getaddrinfo(
            host, port, family=family, type=socket.SOCK_STREAM, flags=flags
        )
    except UnicodeError as exc:  # IDNA's errors are such
        raise socket.gaierror(socket.EAI_NONAME, f"no name of a host: {host!r}") from exc
    addresses = dict.fromkeys((int(f), address) for f, *_, address in found if f in _INET)
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, f"no address of {host!r}")
    return list(addresses)


def literal(host: str, port: int) -> tuple[int, tuple[str, int]] | None:
    """Family and address, if ``host`` is one and no name. It is not resolved then: uvloop's
    ``getaddrinfo()`` loses the scope.
    """
    try:
        version = ip_address(host).version
    except ValueError:
        return None
    return (socket.AF_INET6 if version == 6 else socket.AF_INET), (host, port)


def with_scope(family: int, address: Any) -> Any:
    """``("fe80::1%eth0", port)`` as ``bind`` and ``connect`` take it.

    :raises gaierror: if there is no such interface
    """
    if family == socket.AF_INET6 and "%" in address[0]:
        host, _, scope = address[0].partition("%")
        try:
            index = _index(scope)
        except (OSError, ValueError):  # ValueError: for what cannot be a name
            raise socket.gaierror(socket.EAI_NONAME, f"no interface {scope!r}") from None
        return host, address[1], 0, index
    return address


def _index(scope: str) -> int:
    if scope.isascii() and scope.isdecimal() and int(scope) < 2**32:
        return int(scope)
    return socket.if_nametoindex(scope)


def unix_path(path: str | bytes | os.PathLike[Any]) -> bytes:
    """The path as ``bind`` and ``connect`` take it.

    :raises TypeError: if it is none
    :raises ValueError: if it is empty (the kernel would choose an abstract name), or for a NUL
        inside of it, which would end it there; one in front is right
    """
    try:
        raw = os.fsencode(os.fspath(path))
    except TypeError:
        kind = type(path).__name__
        raise TypeError(f"path must be str, bytes or os.PathLike, not {kind}") from None
    if not raw:
        raise ValueError("path must not be empty")
    if b"\0" in raw and not raw.startswith(b"\0"):
        raise ValueError(f"a path must not contain a NUL, except as its first character: {path!r}")
    return raw


def unix_kind(kind: int) -> socket.SocketKind:
    """:raises ValueError: if it is neither ``SOCK_STREAM`` nor ``SOCK_SEQPACKET``"""
    if kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        return socket.SocketKind(kind)
    named = getattr(_named(kind), "name", repr(kind))
    raise ValueError(f"kind must be SOCK_STREAM or SOCK_SEQPACKET, not {named}")


def _named(kind: int) -> socket.SocketKind | None:
    try:
        return socket.SocketKind(kind)
    except ValueError:
        return None


async def unix_listening(
    path: str | bytes | os.PathLike[Any],
    *,
    mode: int | None,
    backlog: int,
    kind: int = socket.SOCK_STREAM,
) -> socket.socket:
    """A listening UNIX socket. A dead socket's file is replaced; one that is in use, and any other
    file, never.

    :raises OSError: for a failed bind, with the path in its text; nothing is left open
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
    """Binds the socket to a path that has a file, if that is a dead socket's.

    :raises OSError: ``EADDRINUSE``, or what keeps us from knowing
    """
    lock = await _lock_directory(path)
    try:
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            in_use = not stat.S_ISSOCK(os.lstat(path).st_mode)  # a link is a file of its own
            if in_use or _is_alive(path, sock.type):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            os.unlink(path)
        sock.bind(path)
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was just forked has the descriptor too
            os.close(lock)


async def _lock_directory(path: bytes) -> int | None:
    """Of several servers that find the same dead socket, one goes first: otherwise the second could
    remove the file that the first has just made. ``None`` if the directory cannot be locked, or
    somebody keeps it locked; to start is more important then.
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
    except OSError:  # file systems without locks
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _is_alive(path: bytes, kind: int) -> bool:
    """Whether a socket is bound to the path.

    :raises OSError: if that cannot be known
    """
    # Linux tells with EPROTOTYPE that the socket is of another type, before it looks whether that
    # listens: so a datagram socket finds all, also between bind() and listen(), and no server has
    # to accept it. The second try is for kernels that refuse datagrams without that.
    for each in (socket.SOCK_DGRAM, kind):
        with socket.socket(socket.AF_UNIX, each) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                continue
            except OSError as exc:
                # a full backlog; another type; a datagram socket that talks to somebody else
                if exc.errno not in {errno.EAGAIN, errno.EPROTOTYPE, errno.EPERM}:
                    raise
            return True
    return False


# --- connecting ----------------------------------------------------------------------------------


async def connect(sock: socket.socket, address: Any) -> None:
    """Connects a non-blocking socket.

    :raises OSError: if it is refused, unreachable, or the like
    """
    try:
        sock.connect(address)
    except BlockingIOError as exc:
        if exc.errno != errno.EINPROGRESS:
            raise  # a UNIX socket's backlog is full: nothing is under way
        await anyio.wait_writable(sock)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error)) from None
    else:
        await anyio.lowlevel.checkpoint()
