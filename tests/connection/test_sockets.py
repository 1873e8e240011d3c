"""Typed attributes: AnyIO's as AnyIO's own streams have them, and ours."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, TypedAttributeLookupError
from anyio.abc import SocketAttribute
from peers import holds, opened, send_all, within
from programs import run_to_end

import anypoll
from anypoll import AnypollAttribute, Connection, PeerCredentials
from anypoll._loop import runtime as _runtime

pytestmark = pytest.mark.anyio


@pytest.fixture
def path() -> Iterator[Path]:
    """A path for UNIX sockets, which may not be long."""
    with tempfile.TemporaryDirectory(prefix="anypoll") as directory:
        yield Path(directory, "socket")


# --- AnyIO's -------------------------------------------------------------------------------------


@asynccontextmanager
async def both_ends(library: Any, where: str, path: Path) -> AsyncIterator[tuple[Any, Any]]:
    """A listener's and a client's stream of the library, connected to each other."""
    if where in {"unix", "abstract"}:
        name = str(path) if where == "unix" else "\0anypoll attributes"
        listener = await library.create_unix_listener(name)
        first = await library.connect_unix(name)
    else:
        multi = await library.create_tcp_listener(local_host=where)
        [listener] = multi.listeners
        first = await library.connect_tcp(where, listener.extra(SocketAttribute.local_port))
    async with listener, first, await within(listener.accept()) as second:
        yield first, second


def told(stream: Any) -> dict[Any, Any]:
    """AnyIO's attributes of a stream, except for what can't be the same twice: ports by their
    presence, the raw socket by its properties.
    """
    names = {getattr(SocketAttribute, name): name for name in SocketAttribute.__annotations__}
    found = {names[key]: get() for key, get in stream.extra_attributes.items() if key in names}
    for name, value in found.items():
        if name.endswith("_port"):
            found[name] = type(value)
        elif name.endswith("_address") and isinstance(value, tuple):
            found[name] = (value[0], type(value[1]), len(value))
    raw = found["raw_socket"]
    found["raw_socket"] = (raw.family, raw.type, raw.gettimeout())
    return found


@pytest.mark.parametrize("where", ["127.0.0.1", "::1", "unix", "abstract"])
async def test_socket_attributes_are_those_of_anyios_own_streams(where: str, path: Path) -> None:
    async with both_ends(anyio, where, path) as theirs:
        expected = [told(stream) for stream in theirs]
    async with both_ends(anypoll, where, path) as ours:
        assert [told(stream) for stream in ours] == expected


async def test_a_peer_that_has_gone_has_no_address() -> None:
    """As with AnyIO: there is no remote address if `getpeername()` does not work."""
    async with opened("tcp") as (conn, peer):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
        await holds(lambda: not conn.is_active)
        assert conn.extra(SocketAttribute.remote_address, None) is None
        assert conn.extra(SocketAttribute.remote_port, None) is None
        assert conn.extra(SocketAttribute.local_port) == conn.local_address[1]


# --- ours ----------------------------------------------------------------------------------------


def test_every_attribute_has_a_type() -> None:
    names = set(AnypollAttribute.__annotations__)
    assert names == {"poller", "statistics", "peer_credentials", "tls_native"}
    assert len({id(getattr(AnypollAttribute, name)) for name in names}) == 4


async def test_statistics_are_the_connections() -> None:
    async with opened() as (conn, peer):
        await send_all(peer, b"12345")
        await holds(lambda: conn.extra(AnypollAttribute.statistics).bytes_received == 5)
        assert conn.extra(AnypollAttribute.statistics) == conn.statistics()
    assert conn.extra(AnypollAttribute.statistics) == conn.statistics()  # also after the close


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_the_poller_is_an_index_into_the_statistics(kind: str) -> None:
    async with opened(kind) as (conn, _):
        index = conn.extra(AnypollAttribute.poller)
        with_it = anypoll.statistics().pollers[index].connections
        await conn.aclose()
        assert anypoll.statistics().pollers[index].connections == with_it - 1
        with pytest.raises(TypedAttributeLookupError):
            conn.extra(AnypollAttribute.poller)


def test_the_poller_among_several() -> None:
    """In a process of its own: pollers do not go away."""
    code = (
        "import anyio, anypoll\n"
        "async def main():\n"
        "    pairs = [anypoll.socketpair() for _ in range(4)]\n"
        "    found = [c.extra(anypoll.AnypollAttribute.poller) for pair in pairs for c in pair]\n"
        "    counts = [p.connections for p in anypoll.statistics().pollers]\n"
        "    assert [found.count(i) for i in range(3)] == counts, (found, counts)\n"
        "    assert min(counts) >= 2, counts\n"
        "    for pair in pairs:\n"
        "        for c in pair: c.abort()\n"
        "anypoll.configure(pollers=3)\n"
        "anyio.run(main)\n"
    )
    done = run_to_end([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_a_poller_before_first_use_has_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    poller = _runtime.pick_poller()
    assert _runtime.poller_index(poller) >= 0
    monkeypatch.setattr(_runtime, "_pool", None)  # as in the child of a fork
    assert _runtime.poller_index(poller) == -1


async def test_peer_credentials_of_a_unix_connection(path: Path) -> None:
    async with await anypoll.create_unix_listener(path) as listener:
        client = await anypoll.connect_unix(path)
        async with client, await within(listener.accept()) as conn:
            for each in (client, conn):
                credentials = each.extra(AnypollAttribute.peer_credentials)
                assert type(credentials) is PeerCredentials
                assert credentials == (os.getpid(), os.getuid(), os.getgid())
                assert credentials.pid == os.getpid()
            await conn.aclose()
            assert conn.extra(AnypollAttribute.peer_credentials, None) is None


async def test_peer_credentials_of_another_process(path: Path) -> None:
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); s.recv(1)"
    async with await anypoll.create_unix_listener(path) as listener:
        process = subprocess.Popen([sys.executable, "-c", code])
        try:
            async with await within(listener.accept()) as conn:
                assert conn.extra(AnypollAttribute.peer_credentials).pid == process.pid
        finally:
            process.wait()


async def test_tcp_connections_have_no_peer_credentials() -> None:
    async with opened("tcp") as (conn, _):
        with pytest.raises(TypedAttributeLookupError):
            conn.extra(AnypollAttribute.peer_credentials)


async def test_an_attribute_that_was_fetched_before_the_close() -> None:
    async with opened("unix") as (conn, _):
        get = conn.extra_attributes[AnypollAttribute.peer_credentials]
        await conn.aclose()
        with pytest.raises(ClosedResourceError):
            get()


async def test_wrapping_streams_hand_the_attributes_on() -> None:
    from anyio.streams.text import TextStream

    async with opened() as (conn, _):
        assert TextStream(conn).extra(AnypollAttribute.poller) >= 0


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_options_refuse_nonsense(kind: str) -> None:
    async with opened(kind) as (conn, _):
        with pytest.raises(TypeError, match="must be a bool"):
            conn.set_nodelay("yes")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="must be a bool or a Keepalive"):
            conn.set_keepalive(5)  # type: ignore[arg-type]
        set_options(conn)
    with pytest.raises(ClosedResourceError):
        conn.set_nodelay(True)
    with pytest.raises(ClosedResourceError):
        conn.set_keepalive(True)


def set_options(conn: Connection) -> None:
    """Without effect on UNIX sockets, but no error either."""
    conn.set_nodelay(False)
    conn.set_nodelay(True)
    conn.set_keepalive(anypoll.Keepalive(idle=7))
    conn.set_keepalive(False)
