"""httpcore, httpcore2 and what lies above them, over anypoll's connections: against a real HTTP
server, and stream by stream against a peer of which each segment is decided here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSListener, TLSStream
from certificates import certificate, client_context, server_context
from http_server import HTTPServer, bytes_of, serving
from peers import MIB, arrive, holds, opened, pattern, read_all, reset, send_all, within
from programs import run_to_end

import anypoll
from anypoll.integrations import httpcore as module
from anypoll.integrations.httpcore import AnypollBackend, AnypollStream

pytestmark = pytest.mark.anyio

LIBRARIES = ["httpcore", "httpcore2"]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Any:
    """Each of the forks; `httpcore2` needs CPython 3.11."""
    return pytest.importorskip(request.param)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, foreign_env: dict[str, str]
) -> Iterator[HTTPServer]:
    """It keeps idle connections for longer than the tests take."""
    directory = tmp_path_factory.mktemp("http")
    with serving(
        directory, foreign_env, certificate=certificate(), keep_alive_timeout=3600
    ) as server:
        yield server


@contextlib.asynccontextmanager
async def hasty_server(
    directory: Path,
) -> AsyncIterator[tuple[HTTPServer, Callable[[], None]]]:
    """A server that answers one request on each connection; and what makes it close the last one,
    as if that had been idle for long.
    """
    ends: list[anyio.Event] = []

    def close() -> None:
        ends[-1].set()

    async def answer(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            await BufferedByteReceiveStream(stream).receive_until(b"\r\n\r\n", 65536)
            ends.append(anyio.Event())
            await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
            await ends[-1].wait()

    path = str(directory / "hasty")
    tcp = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    tls = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    unix = await anypoll.create_unix_listener(path)
    listeners = [tcp, TLSListener(tls, server_context(), standard_compatible=False), unix]
    async with contextlib.AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        for listener in listeners:
            await stack.enter_async_context(listener)
            tasks.start_soon(listener.serve, answer)
        ports = [each.extra(SocketAttribute.local_port) for each in (tcp, tls)]
        yield HTTPServer(ports[0], path, ports[1]), close
        tasks.cancel_scope.cancel()


class Client:
    """A pool for one transport, and the addresses of a server on it."""

    def __init__(
        self, library: Any, server: HTTPServer, transport: str = "tcp", **options: Any
    ) -> None:
        self.library = library
        self.base = f"http://127.0.0.1:{server.port}/"
        if transport == "tls":
            self.base = f"https://127.0.0.1:{server.tls_port}/"
            options.setdefault("ssl_context", client_context())
        elif transport == "unix":
            options["uds"] = server.path
        self.pool = library.AsyncConnectionPool(network_backend=AnypollBackend(), **options)

    async def __aenter__(self) -> Any:
        await self.pool.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.pool.__aexit__(*exc_info)

    async def get(self, path: str, **options: Any) -> Any:
        return await within(self.pool.request("GET", self.base + path, **options))

    async def post(self, path: str, content: Any, **options: Any) -> Any:
        return await within(self.pool.request("POST", self.base + path, content=content, **options))

    def stream(self, path: str, **options: Any) -> Any:
        return self.pool.stream("GET", self.base + path, **options)


@pytest.fixture(params=["httpcore-tcp", "httpcore2-unix", "httpcore-tls", "httpcore2-tls"])
def client_of(request: pytest.FixtureRequest) -> Callable[..., Client]:
    """Makes clients of a server. Each transport, and each library."""
    name, _, transport = request.param.partition("-")
    return functools.partial(Client, pytest.importorskip(name), transport=transport)


class Body:
    """What is uploaded, in pieces; unlike a generator it need not be closed, and httpcore forgets
    to do that.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise StopAsyncIteration


def stream_of(response: Any) -> AnypollStream:
    return response.extensions["network_stream"]  # type: ignore[no-any-return]


def timeouts(**seconds: float) -> dict[str, Any]:
    return {"timeout": seconds}


# --- a pool and a real server --------------------------------------------------------------------


async def test_a_kept_connection_is_used_again(client_of: Any, server: HTTPServer) -> None:
    async with client_of(server) as client:
        responses = [await client.get("hello") for _ in range(5)]
        assert {response.content for response in responses} == {b"hello"}
        assert len({stream_of(response) for response in responses}) == 1
        [connection] = client.pool.connections
        assert connection.is_idle()
        last = await client.get("last")  # the server ends it
        assert last.content == b"last"
        assert client.pool.connections == []
        assert stream_of(await client.get("hello")) is not stream_of(last)
    assert stream_of(responses[0]).get_extra_info("is_readable")  # closed with the pool


async def test_concurrent_requests_share_the_pool(client_of: Any, server: HTTPServer) -> None:
    used = set()

    async def fetch(client: Client, n: int) -> None:
        response = await client.post("echo", str(n).encode())
        assert response.content == str(n).encode()
        used.add(stream_of(response))

    async with client_of(server, max_connections=3) as client:
        async with anyio.create_task_group() as tasks:
            for n in range(20):
                tasks.start_soon(fetch, client, n)
        assert len(client.pool.connections) == len(used) <= 3


async def test_idle_connections_that_the_server_has_closed_are_replaced(
    client_of: Any, tmp_path: Path
) -> None:
    """Without the answer to "is_readable" the second request would fail, time and again."""
    async with (
        hasty_server(tmp_path) as (server, close),
        client_of(server) as client,
    ):
        streams = []
        for _ in range(3):
            response = await client.get("hello")
            assert response.content == b"hello"
            streams.append(stream_of(response))
            close()
            await holds(lambda: streams[-1].get_extra_info("is_readable"))
            assert client.pool.connections[0].has_expired()
        assert len(set(streams)) == 3
        assert len(client.pool.connections) == 1


async def test_bodies(client_of: Any, server: HTTPServer) -> None:
    """Big ones, and such that are streamed, in both directions."""
    size = 5 * MIB + 321
    upload = pattern(size)
    pieces = [bytes([n]) * 1000 for n in range(100)]
    async with client_of(server) as client:
        response = await client.get(f"bytes/{size}")
        assert response.content == bytes_of(size)
        response = await client.post("hash", upload)
        assert response.content.decode() == hashlib.sha256(upload).hexdigest()
        response = await client.post("echo", Body(pieces))
        assert response.content == b"".join(pieces)
        assert len(client.pool.connections) == 1
        async with client.stream("drip") as response:
            stream = response.aiter_stream()
            assert await within(anext(stream)) == b"first"
            assert (await client.get("release")).content == b"hello"
            assert await within(anext(stream)) == b"second"
            assert [piece async for piece in stream] == []


async def test_http2(library: Any, server: HTTPServer) -> None:
    contents = []

    async def fetch(client: Client, n: int) -> None:
        response = await client.post("echo", bytes([n]) * 100_000)
        assert response.extensions["http_version"] == b"HTTP/2"
        contents.append(response.content)

    async with Client(library, server, "tls", http2=True) as client:
        await client.get("hello")
        async with anyio.create_task_group() as tasks:
            for n in range(10):
                tasks.start_soon(fetch, client, n)
        assert sorted(contents) == [bytes([n]) * 100_000 for n in range(10)]
        assert len(client.pool.connections) == 1


# --- what goes wrong -----------------------------------------------------------------------------


@contextlib.contextmanager
def full_backlog(path: Path | None = None) -> Iterator[Any]:
    """The address of a listener that accepts nobody and has no place left."""
    family = socket.AF_INET if path is None else socket.AF_UNIX
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(family))
        listening.bind(("127.0.0.1", 0) if path is None else str(path))
        listening.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket(family))
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening.getsockname()


async def test_connect_timeout(library: Any, tmp_path: Path) -> None:
    backend = AnypollBackend()
    with full_backlog() as (host, port):
        with pytest.raises(library.ConnectTimeout) as caught:
            await backend.connect_tcp(host, port, timeout=0.02)
        assert isinstance(caught.value.__cause__, anypoll.ConnectTimeout)
        with pytest.raises(library.ConnectTimeout):
            async with library.AsyncConnectionPool(network_backend=backend) as pool:
                await pool.request(
                    "GET", f"http://127.0.0.1:{port}/", extensions=timeouts(connect=0.02)
                )
    with full_backlog(tmp_path / "full") as path:
        with pytest.raises(library.ConnectTimeout) as caught:
            await backend.connect_unix_socket(path, timeout=0.02)
        assert isinstance(caught.value.__cause__, anypoll.ConnectTimeout)


class Patient(AnypollBackend):
    """Nothing but the handshake may time out."""

    async def connect_tcp(self, host: str, port: int, *_: Any, **options: Any) -> Any:
        return await super().connect_tcp(host, port, **{**options, "timeout": None})


async def test_a_handshake_that_does_not_come_times_out(library: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        async with library.AsyncConnectionPool(network_backend=Patient()) as pool:
            with pytest.raises(library.ConnectTimeout, match=r"not done within 0\.05 s"):
                await pool.request("GET", url, extensions=timeouts(connect=0.05))
            assert pool.connections == []
        stream = await AnypollBackend().connect_tcp(*silent.getsockname())
        with pytest.raises(library.ConnectTimeout) as caught:
            await stream.start_tls(client_context(), "anypoll.test", timeout=0.02)
        assert isinstance(caught.value.__cause__, TimeoutError)
        assert readable(stream)


@pytest.mark.parametrize("name", ["read", "write"])
async def test_timeouts(client_of: Any, server: HTTPServer, name: str) -> None:
    async with client_of(server) as client:
        error = getattr(client.library, f"{name.title()}Timeout")
        with pytest.raises(error, match=r"within 0\.1 s"):
            await client.post(
                "never",
                Body(itertools.repeat(bytes(MIB)) if name == "write" else []),
                extensions=timeouts(**{name: 0.1}),
            )
        assert client.pool.connections == []
        assert (await client.get("hello")).content == b"hello"


async def test_refused(library: Any, tmp_path: Path) -> None:
    backend = AnypollBackend()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(library.ConnectError, match="All connection attempts failed") as caught:
        await backend.connect_tcp("127.0.0.1", port)
    assert isinstance(caught.value.__cause__, OSError)
    assert isinstance(caught.value.__cause__.__cause__, ConnectionRefusedError)
    with pytest.raises(library.ConnectError) as caught:
        await backend.connect_unix_socket(str(tmp_path / "missing"))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


async def test_a_refused_connection_is_tried_again(library: Any, server: HTTPServer) -> None:
    """The library recognises what is raised as its own."""

    class Late(AnypollBackend):
        tries = 0

        async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> Any:
            self.tries += 1
            refused = self.tries == 1
            return await super().connect_tcp(host, 1 if refused else port, *args, **options)

    backend = Late()
    async with library.AsyncConnectionPool(network_backend=backend, retries=1) as pool:
        response = await pool.request("GET", f"http://127.0.0.1:{server.port}/hello")
        assert response.content == b"hello"
    assert backend.tries == 2


@pytest.mark.parametrize("name", ["anypoll.test", "127.0.0.1"])
async def test_certificate(library: Any, server: HTTPServer, name: str) -> None:
    async with Client(library, server, "tls") as client:
        response = await client.get("hello", extensions={"sni_hostname": name})
        assert response.content == b"hello"
        session = stream_of(response).get_extra_info("ssl_object")
        assert session.server_hostname == name
        assert session.selected_alpn_protocol() == "http/1.1"


async def test_wrong_certificates(library: Any, server: HTTPServer) -> None:
    async with Client(library, server, "tls") as client:
        with pytest.raises(library.ConnectError, match=r"other\.test"):
            await client.get("hello", extensions={"sni_hostname": "other.test"})
        assert client.pool.connections == []
    stranger = ssl.create_default_context()
    async with Client(library, server, "tls", ssl_context=stranger) as client:
        with pytest.raises(library.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await client.get("hello")
    stream = await AnypollBackend().connect_tcp("127.0.0.1", server.tls_port)
    with pytest.raises(library.ConnectError) as caught:
        await stream.start_tls(client_context(), "other.test")
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    assert readable(stream)


async def test_tls_with_a_server_that_has_none(library: Any, server: HTTPServer) -> None:
    stream = await AnypollBackend().connect_tcp("127.0.0.1", server.port)
    with pytest.raises(library.ConnectError) as caught:
        await within(stream.start_tls(client_context(), "anypoll.test"))
    assert isinstance(caught.value.__cause__, (ssl.SSLError, anyio.EndOfStream))


def left_by(client: Any) -> list[Any]:
    """What cancelled requests have left in the pool, but for connections on which none had begun:
    httpcore keeps one that was made in the moment of the cancellation.
    """
    return [connection for connection in client.pool.connections if " NEW," not in repr(connection)]


@pytest.mark.parametrize("path", ["never", "bytes/50000000"])
async def test_a_request_that_is_cancelled_leaves_nothing(
    client_of: Any, server: HTTPServer, path: str
) -> None:
    async with client_of(server) as client:
        for delay in (0, 0.002, 0.05):
            with anyio.move_on_after(delay) as scope:
                async with client.stream(path) as response:
                    async for _ in response.aiter_stream():
                        pass
            if scope.cancelled_caught:  # else all has come in time, and the connection is kept
                assert left_by(client) == []
        with anyio.CancelScope() as scope:
            async with client.stream("bytes/50000000") as response:
                async for _ in response.aiter_stream():
                    scope.cancel()
        assert scope.cancelled_caught
        assert left_by(client) == []
        for delay in (0.002, 0.05):
            with anyio.move_on_after(delay):
                await client.post("never", Body([bytes(20 * MIB)]))
            assert left_by(client) == []
        assert (await client.get("hello")).content == b"hello"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_connecting_that_is_cancelled_leaves_nothing(library: Any, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, full_backlog() as full:
        _, port = silent.getsockname() if scheme == "https" else full
        async with library.AsyncConnectionPool(network_backend=AnypollBackend()) as pool:
            with anyio.move_on_after(0.05) as scope:
                await pool.request("GET", f"{scheme}://127.0.0.1:{port}/")
            assert scope.cancelled_caught
            assert pool.connections == []


# --- httpx ---------------------------------------------------------------------------------------


@pytest.fixture(params=["httpx", "httpx2"])
def httpx(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def transport_of(httpx: Any, **options: Any) -> Any:
    """It has no parameter for a backend; its pool has."""
    transport = httpx.AsyncHTTPTransport(verify=client_context(), **options)
    transport._pool._network_backend = AnypollBackend()
    return transport


async def test_httpx(httpx: Any, server: HTTPServer) -> None:
    async with httpx.AsyncClient(transport=transport_of(httpx), timeout=30) as client:
        for base in (f"http://127.0.0.1:{server.port}", f"https://127.0.0.1:{server.tls_port}"):
            responses = [await client.get(f"{base}/hello") for _ in range(3)]
            assert {response.text for response in responses} == {"hello"}
            [stream] = {stream_of(response) for response in responses}
            assert isinstance(stream, AnypollStream)
            response = await client.post(f"{base}/echo", content=pattern(50_000))
            assert response.content == pattern(50_000)
    unix = transport_of(httpx, uds=server.path)
    async with httpx.AsyncClient(transport=unix, base_url="http://host") as client:
        assert (await client.get("/hello")).text == "hello"


async def test_httpx_gets_its_own_exceptions(httpx: Any, server: HTTPServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        refused = listening.getsockname()[1]
    async with httpx.AsyncClient(transport=transport_of(httpx)) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{refused}/")
        with pytest.raises(httpx.ReadTimeout):
            await client.get(
                f"http://127.0.0.1:{server.port}/never", timeout=httpx.Timeout(30, read=0.05)
            )
        with pytest.raises(httpx.ConnectError, match=r"other\.test"):
            await client.get(
                f"https://127.0.0.1:{server.tls_port}/", extensions={"sni_hostname": "other.test"}
            )


# --- one stream ----------------------------------------------------------------------------------


def end(peer: socket.socket, how: str) -> None:
    peer.shutdown(socket.SHUT_WR) if how == "fin" else reset(peer)


@contextlib.asynccontextmanager
async def stream_and_peer(
    kind: str = "tcp",
) -> AsyncIterator[tuple[AnypollStream, anypoll.Connection, socket.socket]]:
    async with opened(kind) as (conn, peer):
        yield AnypollStream(conn), conn, peer


def readable(stream: AnypollStream) -> bool:
    answer = stream.get_extra_info("is_readable")
    assert type(answer) is bool
    return answer


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_is_readable_tells_of_unread_bytes(kind: str) -> None:
    async with stream_and_peer(kind) as (stream, conn, peer):
        assert not readable(stream)
        await arrive(conn, peer, b"abcdef")
        reads = conn.statistics().reads
        assert readable(stream)
        assert conn.statistics().reads == reads
        assert await stream.read(4) == b"abcd"
        assert readable(stream)
        assert await stream.read(4) == b"ef"
        assert not readable(stream)
        await stream.write(b"x")
        assert not readable(stream)


@pytest.mark.parametrize(("kind", "how"), [("tcp", "fin"), ("unix", "fin"), ("tcp", "reset")])
async def test_is_readable_tells_of_the_end(kind: str, how: str) -> None:
    async with stream_and_peer(kind) as (stream, _, peer):
        end(peer, how)
        await holds(lambda: readable(stream))
        if how == "fin":
            assert await stream.read(1) == b""
            assert await stream.read(1) == b""
            assert readable(stream)


async def test_is_readable_tells_of_the_own_close() -> None:
    async with stream_and_peer() as (stream, _, _):
        await stream.aclose()
        assert readable(stream)
        await stream.aclose()


async def test_is_readable_over_paused_input() -> None:
    """What is behind more input than is read ahead can't be known, nor need it be."""
    async with stream_and_peer() as (stream, _, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_all, peer, bytes(2 * MIB))
            await holds(lambda: readable(stream))
            received = 0
            while received < 2 * MIB:
                received += len(await stream.read(65536))
        assert not readable(stream)


async def test_extra_info(library: Any, server: HTTPServer, tmp_path: Path) -> None:
    stream = await AnypollBackend().connect_tcp(
        "127.0.0.1",
        server.port,
        local_address="127.0.0.2",
        socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)],
    )
    assert isinstance(stream, library.AsyncNetworkStream)
    assert stream.get_extra_info("server_addr") == ("127.0.0.1", server.port)
    assert stream.get_extra_info("client_addr")[0] == "127.0.0.2"
    sock = stream.get_extra_info("socket")
    assert isinstance(sock, socket.socket)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert stream.get_extra_info("ssl_object") is None
    assert stream.get_extra_info("nonsense") is None
    await stream.aclose()
    assert stream.get_extra_info("client_addr") is None

    stream = await AnypollBackend().connect_unix_socket(server.path)
    assert stream.get_extra_info("server_addr") == server.path
    await stream.aclose()
    assert stream.get_extra_info("socket").fileno() == -1


async def test_an_option_that_is_refused(library: Any, server: HTTPServer) -> None:
    with pytest.raises(library.ConnectError, match="Protocol not available"):
        await AnypollBackend().connect_tcp(
            "127.0.0.1", server.port, socket_options=[(socket.SOL_SOCKET, 9999, 1)]
        )


async def test_errors_of_a_stream(library: Any) -> None:
    async with stream_and_peer() as (stream, _, peer):
        reset(peer)
        with pytest.raises(library.ReadError, match="reset by peer") as caught:
            await stream.read(10)
        assert isinstance(caught.value.__cause__, anyio.BrokenResourceError)
        with pytest.raises(library.WriteError) as caught:
            await stream.write(b"x")
        assert isinstance(caught.value.__cause__, anyio.BrokenResourceError)
        await stream.aclose()
        with pytest.raises(library.ReadError, match="ClosedResourceError"):
            await stream.read(10)
        with pytest.raises(library.WriteError):
            await stream.write(b"x")
        await stream.write(b"")  # nothing to do


async def test_a_read_that_times_out_loses_nothing(library: Any) -> None:
    async with stream_and_peer() as (stream, _, peer):
        for n in range(3):
            with pytest.raises(library.ReadTimeout) as caught:
                await stream.read(10, timeout=0.01)
            assert isinstance(caught.value.__cause__, anypoll.ReadTimeout)
            with pytest.raises(library.ReadTimeout):
                await stream.read(10, timeout=0)
            await send_all(peer, bytes([n]))
            assert await stream.read(10, timeout=30) == bytes([n])
            assert not readable(stream)


async def test_a_write_that_times_out_leaves_the_order(library: Any) -> None:
    data = pattern(8 * MIB)
    async with stream_and_peer() as (stream, _, peer):
        with pytest.raises(library.WriteTimeout) as caught:
            await stream.write(data, timeout=0.02)
        assert isinstance(caught.value.__cause__, anypoll.WriteTimeout)
        received = bytearray()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.write, b"next")
            received += await read_all(peer, len(data) + 4)
        assert bytes(received) == data + b"next"


async def test_sleep() -> None:
    with anyio.fail_after(30):
        await AnypollBackend().sleep(0.001)
    with anyio.move_on_after(0.001) as scope:
        await AnypollBackend().sleep(30)
    assert scope.cancelled_caught


# --- one stream over TLS -------------------------------------------------------------------------


class TLSPeer:
    """A server's side of TLS whose records are sent as the test decides."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = server_context().wrap_bio(self._in, self._out, server_side=True)

    async def _do(self, call: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                return call(*args)
            except ssl.SSLWantReadError:
                await send_all(self.peer, self._out.read())
                await within(anyio.wait_readable(self.peer))
                self._in.write(self.peer.recv(65536))

    async def handshake(self) -> None:
        await self._do(self.session.do_handshake)
        await send_all(self.peer, self._out.read())  # the tickets of TLS 1.3 are the last of it

    async def read(self, size: int) -> bytes:
        return await self._do(self.session.read, size)  # type: ignore[no-any-return]

    def records(self, *messages: bytes, end: bool = False) -> bytes:
        """One record for each message, and that of the end, encrypted and not sent."""
        for message in messages:
            self.session.write(message)
        if end:
            with contextlib.suppress(ssl.SSLWantReadError):
                self.session.unwrap()
        return self._out.read()


@contextlib.asynccontextmanager
async def tls_stream() -> AsyncIterator[tuple[AnypollStream, anypoll.Connection, TLSPeer]]:
    """After a first exchange, with which the session's tickets have come."""
    async with stream_and_peer() as (plain, conn, sock):
        peer = TLSPeer(sock)
        streams = []

        async def connect() -> None:
            streams.append(await plain.start_tls(client_context(), "anypoll.test", 30))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connect)
            await peer.handshake()
        [stream] = streams
        await stream.write(b"request")
        assert await peer.read(100) == b"request"
        await send_all(peer.peer, peer.records(b"response"))
        assert await stream.read(100) == b"response"
        yield stream, conn, peer


async def test_tls_is_readable_tells_of_bytes() -> None:
    async with tls_stream() as (stream, conn, peer):
        assert not readable(stream)
        await arrive(conn, peer.peer, peer.records(b"abcdef"))
        assert readable(stream)  # not looked at
        assert await stream.read(2) == b"ab"
        assert len(conn.reader) == 0
        assert readable(stream)  # decrypted
        assert await stream.read(100) == b"cdef"
        assert not readable(stream)
        await arrive(conn, peer.peer, peer.records(b"one", b"two"))
        assert await stream.read(100) == b"one"
        assert len(conn.reader) == 0
        assert readable(stream)  # taken from the connection, and not decrypted
        assert await stream.read(100) == b"two"
        assert not readable(stream)


async def test_tls_is_readable_tells_of_an_end_that_came_with_the_last_bytes() -> None:
    async with tls_stream() as (stream, conn, peer):
        await arrive(conn, peer.peer, peer.records(b"last", end=True))
        assert await stream.read(100) == b"last"
        assert len(conn.reader) == 0
        assert conn.is_active
        assert readable(stream)
        assert await stream.read(100) == b""
        assert conn.is_active
        assert readable(stream)


@pytest.mark.parametrize("how", ["end", "fin", "reset"])
async def test_tls_is_readable_tells_of_every_end(how: str) -> None:
    async with tls_stream() as (stream, _, peer):
        assert not readable(stream)
        if how == "end":
            await send_all(peer.peer, peer.records(end=True))
        else:
            end(peer.peer, how)
        await holds(lambda: readable(stream))
        if how != "reset":  # not only behind a closing handshake
            assert await stream.read(100) == b""


async def test_tls_errors(library: Any) -> None:
    async with tls_stream() as (stream, _, peer):
        reset(peer.peer)
        with pytest.raises(library.ReadError) as caught:
            await stream.read(100)
        assert isinstance(caught.value.__cause__, anyio.BrokenResourceError)
    async with tls_stream() as (stream, _, peer):
        await send_all(peer.peer, b"\x17\x03\x03\x00\x20" + bytes(32))  # no such record
        with pytest.raises(library.ReadError) as caught:
            await stream.read(100)
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        assert readable(stream)
    async with tls_stream() as (stream, _, _):
        await stream.aclose()
        with pytest.raises(library.WriteError):
            await stream.write(b"x")


async def test_tls_read_that_times_out_loses_nothing(library: Any) -> None:
    async with tls_stream() as (stream, _, peer):
        record = peer.records(b"late")
        for piece in (record[:3], record[3:10]):
            await send_all(peer.peer, piece)
            with pytest.raises(library.ReadTimeout) as caught:
                await stream.read(100, timeout=0.02)
            assert isinstance(caught.value.__cause__, TimeoutError)
        await send_all(peer.peer, record[10:])
        assert await stream.read(100, timeout=30) == b"late"
        assert not readable(stream)


async def test_tls_write_that_times_out_ends_the_session(library: Any) -> None:
    async with tls_stream() as (stream, _, peer):
        for timeout in (-1, float("nan")):  # which end nothing
            for call in (stream.read(1, timeout), stream.write(b"x", timeout)):
                with pytest.raises(ValueError, match="timeout must not be negative"):
                    await call
        await stream.write(b"y")
        assert await peer.read(1) == b"y"
        with pytest.raises(library.WriteTimeout) as caught:
            await stream.write(bytes(8 * MIB), timeout=0.02)
        assert isinstance(caught.value.__cause__, TimeoutError)
        assert readable(stream)
        with pytest.raises(library.WriteError):
            await stream.write(b"x")


async def test_timeouts_of_before_do_not_reach_into_the_session() -> None:
    """Below TLS a timeout would be a broken connection."""
    async with stream_and_peer() as (plain, conn, sock):
        await plain.write(b"STARTTLS", timeout=0.01)
        assert await read_all(sock, 8) == b"STARTTLS"
        await send_all(sock, b"OK")
        await holds(lambda: readable(plain))
        assert await plain.read(2, timeout=0.01) == b"OK"
        peer = TLSPeer(sock)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(plain.start_tls, client_context(), "anypoll.test")
            await anyio.sleep(0.05)  # longer than the timeouts of before
            await peer.handshake()
        assert (conn.read_timeout, conn.write_timeout) == (None, None)


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_peer_that_goes_in_the_handshake(library: Any, how: str) -> None:
    async with stream_and_peer() as (stream, conn, peer):
        end(peer, how)
        with pytest.raises(library.ConnectError) as caught:
            await stream.start_tls(client_context(), "anypoll.test")
        assert caught.value.__cause__ is not None
        assert conn.fileno() == -1


async def test_a_handshake_without_the_name_it_needs() -> None:
    async with stream_and_peer() as (stream, conn, _):
        with pytest.raises(ValueError, match="server_hostname is needed"):
            await within(stream.start_tls(client_context()))
        assert conn.fileno() == -1


async def test_tls_in_tls(library: Any) -> None:
    """As to a proxy with TLS, and through it."""

    async def handler(conn: anypoll.Connection) -> None:
        options = {"server_side": True, "ssl_context": server_context()}
        outer = await TLSStream.wrap(conn, standard_compatible=False, **options)
        await outer.send(await outer.receive())
        inner = await TLSStream.wrap(outer, standard_compatible=False, **options)
        async for chunk in inner:
            await inner.send(chunk)

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        plain = await AnypollBackend().connect_tcp("127.0.0.1", server.port)
        outer = await plain.start_tls(client_context(), "anypoll.test")
        await outer.write(b"connect")
        assert await outer.read(100) == b"connect"
        inner = await outer.start_tls(client_context(), "anypoll.test")
        assert inner.get_extra_info("ssl_object") is not outer.get_extra_info("ssl_object")
        await inner.write(b"request")
        assert await inner.read(3) == b"req"
        assert readable(inner)
        assert await inner.read(100) == b"uest"
        assert not readable(inner)
        await inner.aclose()
        assert plain.get_extra_info("is_readable")


# --- which libraries there are -------------------------------------------------------------------

_WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run_without(missing: list[str], program: str) -> str:
    done = run_to_end(
        [sys.executable, "-c", _WITHOUT.format(missing=missing) + program],
        cwd="/",  # or the working tree would be found before what is installed
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", LIBRARIES)
def test_one_library_is_enough(name: str) -> None:
    pytest.importorskip(name)
    others = [other for other in LIBRARIES if other != name]
    out = run_without(
        others,
        f"import {name} as library\n"
        "from anypoll.integrations import httpcore as module\n"
        "assert module.ReadError is library.ReadError\n"
        "assert issubclass(module.AnypollBackend, library.AsyncNetworkBackend)\n"
        "assert issubclass(module.AnypollStream, library.AsyncNetworkStream)\n"
        "print('fine')\n",
    )
    assert out == "fine\n"


def test_without_a_library_the_import_says_what_is_missing() -> None:
    out = run_without(LIBRARIES, "import anypoll.integrations.httpcore\n")
    assert out.endswith(
        "ModuleNotFoundError: anypoll.integrations.httpcore needs httpcore or httpcore2\n"
    )


def test_an_exception_is_that_of_every_library() -> None:
    for library in (importlib.import_module(n) for n in LIBRARIES if importlib.util.find_spec(n)):
        for name in ("ConnectError", "ReadError", "ReadTimeout", "WriteTimeout"):
            ours = getattr(module, name)
            above = library.TimeoutException if "Timeout" in name else library.NetworkError
            assert issubclass(ours, getattr(library, name))
            assert issubclass(ours, above)


def test_what_is_public_is_complete() -> None:
    assert {name for name in vars(module) if name.startswith("Anypoll")} == set(module.__all__)
    for name in module.__all__:
        members = vars(getattr(module, name)).items()
        for member, thing in [(name, getattr(module, name)), *members]:
            assert member.startswith("_") or inspect.getdoc(thing)
