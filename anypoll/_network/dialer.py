"""A Happy Eyeballs dialer: connects over several addresses, with a deadline."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from .._buffers.arguments import Limits, seconds
from .._buffers.errors import ConnectTimeout
from .._connection.sockets import check_keepalive, set_keepalive
from .._connection.stream import Connection, UNIXConnection, open_fd
from .._tls.connection import TLSConnection, check_tls
from .addresses import (
    LACKING,
    any_address,
    closed_on_error,
    host_text,
    naming,
    port_number,
    resolved,
    unix_kind,
    unix_path,
    with_scope,
)

if TYPE_CHECKING:
    from .._connection.sockets import Keepalive

__all__ = ("connect_tcp", "connect_unix")


@contextmanager
def _connect_timeout(timeout: float | None) -> Iterator[None]:
    timeout = seconds(timeout, "timeout")
    try:
        with anyio.fail_after(timeout) as scope:
            yield
    except TimeoutError:
        if scope.cancelled_caught:
            raise ConnectTimeout(f"not connected within {timeout} s") from None
        raise


async def connect_tcp(
    remote_host: Any,
    remote_port: int,
    *,
    local_host: Any = None,
    local_port: int | None = None,
    tls: bool = False,
    ssl_context: ssl.SSLContext | None = None,
    tls_standard_compatible: bool = True,
    tls_hostname: str | None = None,
    happy_eyeballs_delay: float = 0.25,
    timeout: float | None = None,
    read_timeout: float | None = None,
    write_timeout: float | None = None,
    keepalive: bool | Keepalive = False,
) -> Any:
    """Connects to a TCP server, like :func:`anyio.connect_tcp`, with these additions.

    :param local_port: allowed without ``local_host`` too, and then binds on any address
    :param happy_eyeballs_delay: seconds before the next address is tried as well; ``None``: only
        when the one before has failed
    :param timeout: seconds for everything, including name resolution and TLS
    :param read_timeout: of the new connection
    :param write_timeout: likewise
    :param keepalive: TCP keepalive of the new connection
    :return: a :class:`Connection`; with ``tls``, ``ssl_context`` or ``tls_hostname`` a
        :class:`TLSConnection` over one
    :raises ConnectTimeout: after ``timeout`` seconds
    :raises OSError: if no address could be connected, with the reasons as its cause
    :raises socket.gaierror: an ``OSError`` too: for a name without addresses, or an invalid one
    :raises ValueError, TypeError: for invalid arguments; nothing is sent then
    """
    limits = Limits(read_timeout=read_timeout, write_timeout=write_timeout)
    check_keepalive(keepalive)
    check_tls(ssl_context, tls_hostname, "tls_hostname")
    route = _Route(remote_host, remote_port, local_host, local_port, happy_eyeballs_delay)
    with _connect_timeout(timeout):
        sock = await _race(route)
        try:
            set_keepalive(sock, keepalive)
        except BaseException:
            sock.close()
            raise
        connection = open_fd(sock, limits)
        if not (tls or tls_hostname or ssl_context):
            return connection
        try:
            return await TLSConnection.wrap(
                connection,
                server_side=False,
                hostname=tls_hostname or route.host,
                ssl_context=ssl_context,
                standard_compatible=tls_standard_compatible,
            )
        except BaseException:
            await anyio.aclose_forcefully(connection)  # no RST: it would destroy the alert
            raise


@dataclass(frozen=True, slots=True)
class _Route:
    """The validated ends of a connection attempt. ``delay``: seconds between two attempts."""

    host: Any
    port: int
    local_host: Any
    local_port: int | None
    delay: float | None

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        put("host", host_text(self.host, "remote_host"))
        put("port", port_number(self.port, "remote_port"))
        if self.local_host is not None:
            put("local_host", host_text(self.local_host, "local_host"))
        if self.local_port is not None:
            put("local_port", port_number(self.local_port, "local_port"))
        seconds(self.delay, "happy_eyeballs_delay")


async def _local_addresses(host: str | None, port: int | None) -> list[tuple[int, Any]]:
    """The addresses to connect from; if empty, the kernel chooses."""
    if host is not None:
        return await resolved(host, port or 0)
    if port is not None:
        return [any_address(family, port) for family in (socket.AF_INET, socket.AF_INET6)]
    return []


async def _remote_addresses(host: str, port: int, families: set[int]) -> list[tuple[int, Any]]:
    """Remote addresses, the families alternating, IPv6 first (RFC 8305, section 4)."""
    family = families.pop() if len(families) == 1 else socket.AF_UNSPEC
    found = await resolved(host, port, family=family)
    six = [each for each in found if each[0] == socket.AF_INET6]
    four = [each for each in found if each[0] == socket.AF_INET]
    mixed = [a for pair in zip(six, four, strict=False) for a in pair]
    return mixed + six[len(four) :] + four[len(six) :]


async def _race(route: _Route) -> socket.socket:
    """Happy Eyeballs (RFC 8305): tries the addresses in turn, ``delay`` seconds apart, or at once
    after a failure; the first to connect wins.
    """
    local = await _local_addresses(route.local_host, route.local_port)
    families = {family for family, _ in local}
    targets = await _remote_addresses(route.host, route.port, families)
    winner: socket.socket | None = None
    errors: list[OSError] = []

    async def attempt(family: int, address: Any, done: anyio.Event) -> None:
        nonlocal winner
        try:
            sock = await _connected(family, address, local)
        except OSError as exc:
            errors.append(exc)
        else:
            if winner is None:
                winner = sock
                group.cancel_scope.cancel()
            else:
                sock.close()
        finally:
            done.set()

    try:
        async with anyio.create_task_group() as group:
            for target_family, address in targets:
                done = anyio.Event()
                group.start_soon(attempt, target_family, address, done)
                with anyio.move_on_after(route.delay):
                    await done.wait()
        if winner is None:
            raise _failure(errors)
    except BaseException:  # cancelled from outside at the last moment: the winner goes too
        if winner is not None:
            winner.close()
        raise
    finally:
        errors.clear()  # breaks the cycle of exceptions, tracebacks and this frame
    return winner


def _failure(errors: list[OSError]) -> OSError:
    cause = errors[0] if len(errors) == 1 else ExceptionGroup("all attempts", errors)
    failure = OSError("All connection attempts failed")
    if all(isinstance(exc, socket.gaierror) for exc in errors):  # the network was not tried
        failure = socket.gaierror(errors[0].errno, *failure.args)
    failure.__cause__ = cause
    return failure


async def _connected(family: int, address: Any, local: list[tuple[int, Any]]) -> socket.socket:
    with closed_on_error(socket.socket(family, socket.SOCK_STREAM)) as sock:
        sock.setblocking(False)
        if local:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(sock, [each for of, each in local if of == family])
        await connect(sock, with_scope(family, address))
    return sock


def _bind(sock: socket.socket, addresses: list[Any]) -> None:
    """Binds to the first address that this machine has.

    :raises OSError: if it has none of them
    """
    for number, address in enumerate(addresses, 1):
        try:
            with naming(address):
                sock.bind(with_scope(sock.family, address))
        except OSError as exc:
            if exc.errno not in LACKING or number == len(addresses):
                raise
        else:
            return
    raise socket.gaierror(socket.EAI_FAMILY, "no local address of the remote one's family")


async def connect_unix(
    path: str | bytes | os.PathLike[Any],
    kind: int = socket.SOCK_STREAM,
    *,
    timeout: float | None = None,
    read_timeout: float | None = None,
    write_timeout: float | None = None,
    keepalive: bool | Keepalive = False,
) -> UNIXConnection:
    """Connects to a UNIX socket, like :func:`anyio.connect_unix`.

    :param path: a leading NUL makes it abstract
    :param kind: ``SOCK_STREAM`` or ``SOCK_SEQPACKET``
    :param timeout: seconds for connecting
    :param read_timeout: of the new connection
    :param write_timeout: likewise
    :param keepalive: ignored, as always on UNIX sockets
    :raises ConnectTimeout: after ``timeout`` seconds
    :raises OSError: ``FileNotFoundError``, ``ConnectionRefusedError``, ...
    :raises ValueError, TypeError: for any other ``kind``, and other invalid arguments
    """
    limits = Limits(read_timeout=read_timeout, write_timeout=write_timeout)
    check_keepalive(keepalive)
    name = unix_path(path)
    with closed_on_error(socket.socket(socket.AF_UNIX, unix_kind(kind))) as sock:
        sock.setblocking(False)
        with _connect_timeout(timeout):
            await _connect_unix(sock, name)
    connection: Connection = open_fd(sock, limits)
    assert isinstance(connection, UNIXConnection)
    return connection


async def _connect_unix(sock: socket.socket, path: bytes) -> None:
    while True:
        try:
            await connect(sock, path)
        except BlockingIOError:  # a full backlog; unlike TCP, there is nothing to wait for
            await anyio.sleep(0.01)
        else:
            return


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
