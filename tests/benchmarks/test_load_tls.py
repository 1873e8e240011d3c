"""benchmarks/load.c with benchmarks/tls.h: the load generator that speaks TLS."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import certificates
import programs
import pytest
from catalog import HERE
from cells import COMPILE

pytestmark = pytest.mark.unsanitized


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, where there is what it takes to compile it."""
    program = tmp_path_factory.mktemp("load") / "load_tls"
    if shutil.which(COMPILE[0]) is None:
        pytest.skip("there is no C compiler")
    source = "#include <openssl/ssl.h>\n"
    command = [*COMPILE, "-E", "-"]
    headers = subprocess.run(command, check=False, input=source, capture_output=True, text=True)
    if headers.returncode != 0:
        pytest.skip("OpenSSL's headers are not installed")
    command = [*COMPILE, "-Werror", "-DLOAD_TLS", HERE / "load.c", "-lssl", "-lcrypto"]
    subprocess.run([*command, "-o", program], check=True)
    return program


@dataclass
class EchoServer:
    """Blocking sockets, a thread for each connection: as unlike the generator as can be."""

    context: ssl.SSLContext
    answer: Callable[[bytes], bytes]
    resumed: list[bool] = field(default_factory=list)
    versions: set[str | None] = field(default_factory=set)

    def serve(self, conn: socket.socket) -> None:
        with contextlib.suppress(OSError), self.context.wrap_socket(conn, server_side=True) as tls:
            self.resumed.append(bool(tls.session_reused))
            self.versions.add(tls.version())
            while data := tls.recv(1 << 16):
                tls.sendall(self.answer(data))


@contextlib.contextmanager
def echo_server(
    context: ssl.SSLContext, answer: Callable[[bytes], bytes] = bytes
) -> Iterator[tuple[EchoServer, int]]:
    server = EchoServer(context, answer)
    threads: list[threading.Thread] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                conn, _ = listener.accept()
                threads.append(threading.Thread(target=server.serve, args=[conn]))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield server, listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        listener.close()
        for thread in threads:
            thread.join()


def run(load: Path, port: int, *options: str) -> subprocess.CompletedProcess[str]:
    return programs.run_to_end([load, f"--port={port}", "--seconds=60", "--warmup=0", *options])


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("size", [1, 64, 16384, 100_000])
def test_every_request_is_answered_and_verified(load: Path, size: int) -> None:
    with echo_server(certificates.server_context()) as (server, port):
        options = ["--connections=3", "--requests=20", "--outstanding=4", f"--size={size}"]
        found = report(run(load, port, *options))
    assert found["requests"] == 60
    assert server.resumed == [False] * 3
    assert server.versions == {"TLSv1.3"}


def test_a_wrong_answer_is_found(load: Path) -> None:
    def damage(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    with echo_server(certificates.server_context(), damage) as (_, port):
        done = run(load, port, "--requests=1")
    assert done.returncode == 1
    assert "an answer differs from its request" in done.stderr


def test_a_connection_that_ends_early_is_found(load: Path) -> None:
    def end(_: bytes) -> bytes:
        raise ConnectionAbortedError

    with echo_server(certificates.server_context(), end) as (_, port):
        done = run(load, port, "--requests=1")
    assert done.returncode == 1
    assert "connection 0, request 0: unexpected eof while reading" in done.stderr


def reconnect(load: Path, port: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Two connections at a time, ten requests, and each on a connection of its own."""
    counted = ["--connections=2", "--requests=1", "--reconnect", "--counted=5", *options]
    return programs.run_to_end([load, f"--port={port}", *counted], fed="\n")


def test_handshakes_are_full_if_nothing_is_said(load: Path) -> None:
    with echo_server(certificates.server_context()) as (server, port):
        assert report(reconnect(load, port))["requests"] == 5
    # two connections are open at the end that have not begun a handshake
    assert server.resumed == [False] * 10


def test_sessions_are_resumed(load: Path) -> None:
    with echo_server(certificates.server_context()) as (server, port):
        assert report(reconnect(load, port, "--resume"))["requests"] == 5
    assert sorted(server.resumed) == [False] * 2 + [True] * 8


def test_a_handshake_that_should_resume_and_does_not_is_a_failure(load: Path) -> None:
    context = certificates.server_context()
    context.num_tickets = 0
    with echo_server(context) as (_, port):
        done = reconnect(load, port, "--resume")
    assert done.returncode == 1
    assert "a session was not resumed" in done.stderr


def test_a_server_without_tls_is_a_failure(load: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            conn, _ = listener.accept()
            with conn:
                conn.recv(1 << 16)
                conn.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        done = run(load, listener.getsockname()[1], "--requests=1")
        thread.join()
    assert done.returncode == 1
    assert "wrong version number" in done.stderr
