"""An address parser and resolver: hosts, ports and UNIX paths, to listen on or connect to."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import anyio

from .._buffers.arguments import count

INET = {socket.AF_INET, socket.AF_INET6}

#: Errors of sockets or addresses of a family that this machine lacks or has turned off.
LACKING = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})


def host_text(host: object, name: str) -> str:
    """A host as text.

    :raises TypeError: if it is neither a ``str`` nor an address from :mod:`ipaddress`
    """
    if isinstance(host, str):
        return host
    if isinstance(host, (IPv4Address, IPv6Address)):
        return str(host)
    raise TypeError(f"{name} must be a str or an IP address, not {type(host).__name__}")


def port_number(port: int, name: str) -> int:
    """:raises TypeError, ValueError: if it is not an integer, or not between 0 and 65535"""
    return count(port, name, most=65535)


def any_address(family: int, port: int) -> tuple[int, tuple[str, int]]:
    """The address of all interfaces, for a family."""
    return family, ("::" if family == socket.AF_INET6 else "0.0.0.0", port)  # noqa: S104 -- asked for


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
    """Makes the system's ``OSError``s that leave the block name the address they are about.

    :param address: host and port, or the path of a UNIX socket
    """
    try:
        yield
    except socket.gaierror:
        raise
    except OSError as exc:
        # Python itself refuses a path that is too long, without an errno.
        code = errno.ENAMETOOLONG if exc.errno is None else exc.errno
        text = os.strerror(code)
        if isinstance(address, bytes):
            raise OSError(code, text, os.fsdecode(address)) from None
        host, port = address[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise OSError(code, f"{where}: {text}") from None


async def resolved(
    host: str, port: int, *, family: int = socket.AF_UNSPEC, flags: int = 0
) -> list[tuple[int, Any]]:
    """The families and addresses of a host, each once, at least one.

    :raises gaierror: if there are none, including for text that cannot be a host
    """
    known = literal(host, port)
    # C ends a string at a NUL, and uvloop an address at a "%": both would pass as another host.
    if "\0" in host or ("%" in host and known is None):
        raise socket.gaierror(socket.EAI_NONAME, f"no name of a host: {host!r}")
    if known is not None and family in {socket.AF_UNSPEC, known[0]}:
        return [known]
    try:
        found = await anyio.getaddrinfo(
            host, port, family=family, type=socket.SOCK_STREAM, flags=flags
        )
    except UnicodeError as exc:  # IDNA's errors are UnicodeErrors
        raise socket.gaierror(socket.EAI_NONAME, f"no name of a host: {host!r}") from exc
    addresses = dict.fromkeys((int(f), address) for f, *_, address in found if f in INET)
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, f"no address of {host!r}")
    return list(addresses)


def literal(host: str, port: int) -> tuple[int, tuple[str, int]] | None:
    """The family and address, if ``host`` is an address and not a name. Addresses are not resolved:
    uvloop's ``getaddrinfo()`` loses the scope.
    """
    try:
        version = ip_address(host).version
    except ValueError:
        return None
    return (socket.AF_INET6 if version == 6 else socket.AF_INET), (host, port)


def with_scope(family: int, address: Any) -> Any:
    """``("fe80::1%eth0", port)`` in the form that ``bind`` and ``connect`` take.

    :raises gaierror: if there is no such interface
    """
    if family == socket.AF_INET6 and "%" in address[0]:
        host, _, scope = address[0].partition("%")
        try:
            index = _index(scope)
        except (OSError, ValueError):  # ValueError: for text that cannot be a name
            raise socket.gaierror(socket.EAI_NONAME, f"no interface {scope!r}") from None
        return host, address[1], 0, index
    return address


def _index(scope: str) -> int:
    if scope.isascii() and scope.isdecimal() and int(scope) < 2**32:
        return int(scope)
    return socket.if_nametoindex(scope)


def unix_path(path: str | bytes | os.PathLike[Any]) -> bytes:
    """The path in the form that ``bind`` and ``connect`` take.

    :raises TypeError: if it is not a path
    :raises ValueError: if it is empty (the kernel would choose an abstract name), or has a NUL
        inside, which would cut it off there; a leading NUL is fine
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
