"""The command: what it serves, what it says, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from programs import output_at_end, run_to_end, running, stop

from anypoll import __main__ as _cli

# Programs that are started, and must have stopped in time.
pytestmark = pytest.mark.unsanitized

TARGETS = """
import functools

import anyio
import sibling


async def echo(conn):
    async for chunk in conn:
        await conn.send(chunk)


async def request(conn):
    previous, conn.state = conn.state or b"first", bytes(await conn.receive())
    await conn.send(previous)


async def environment(conn):
    import os

    listening = [name for name in os.environ if name.startswith("LISTEN_")]
    inherited = [fd for fd in (3, 4) if os.get_inheritable(fd)]
    await conn.send(repr((listening, inherited)).encode())


async def busy(conn):
    await conn.send(b"busy")
    await anyio.sleep_forever()


async def failing(conn):
    raise RuntimeError("as told")


async def two(first, conn):
    await echo(conn)


class Server:
    async def method(self, conn):
        await echo(conn)

    async def __call__(self, conn):
        await echo(conn)


@functools.wraps(echo)
def wrapped(conn):
    return echo(conn)


partial = functools.partial(two, 1)
instance = Server()


def plain(conn):
    pass
"""

Run = Callable[..., "tuple[int, str, str]"]


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=30)


def knock_until_refused(address: str) -> None:
    with contextlib.suppress(ConnectionError):  # refused; or reset, by a listener that closes
        while True:
            connect(address).close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with targets."""
    (tmp_path / "targets.py").write_text(TARGETS)
    (tmp_path / "sibling.py").touch()
    (tmp_path / "broken.py").write_text("x = 1\n\nraise KeyError('told\\nso')\n")
    (tmp_path / "syntax.py").write_text("x = 1\ny = = 2\n")
    (tmp_path / "needy.py").write_text("import no_such_module\n")
    return tmp_path


@pytest.fixture
def called(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Calls the command's main function in that directory, to do what needs no serving: gives the
    status and both outputs.
    """
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = {*sys.modules}

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            status = _cli.main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    yield call
    for name in {*sys.modules} - known:
        del sys.modules[name]


@pytest.fixture
def serving(anypoll_command: list[str], directory: Path) -> Callable[..., Any]:
    """Runs the command in that directory: a context of the process, and of where it listens."""

    def run(target: str, *options: str, cwd: Path = directory) -> Any:
        return running([*anypoll_command, "serve", target, *options], cwd)

    return run


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is missing")
    return request.param  # type: ignore[no-any-return]


def asks(client: socket.socket, data: bytes = b"hello", answer: bytes | None = None) -> None:
    client.sendall(data)
    assert client.recv(100) == (data if answer is None else answer)


# --- wrong calls ---------------------------------------------------------------------------------

FORM = "is not of the form MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE"
NO_MODULE = "ModuleNotFoundError: No module named"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("targets", f"'targets' {FORM}"),
        ("targets.py", f"'targets.py' {FORM}"),
        (":echo", f"':echo' {FORM}"),
        ("targets:", f"'targets:' {FORM}"),
        ("nosuch:echo", f"cannot import 'nosuch': {NO_MODULE} 'nosuch'"),
        ("no/such.py:echo", "there is no file 'no/such.py'"),
        ("targets.py:nosuch", "'targets.py' has no attribute 'nosuch'"),
        ("targets:nosuch", "'targets' has no attribute 'nosuch'"),
        ("targets:instance.nosuch", "'targets' has no attribute 'instance.nosuch'"),
        ("targets:plain", "'plain' in 'targets' is not a coroutine function"),
        ("targets:Server", "'Server' in 'targets' is not a coroutine function"),
        ("targets:__name__", "'__name__' in 'targets' is not a coroutine function"),
        ("needy:echo", f"cannot import 'needy': {NO_MODULE} 'no_such_module'"),
        ("broken:x", "cannot import 'broken': KeyError: 'told\\nso' ({cwd}/broken.py:3)"),
        ("broken.py:x", "cannot import 'broken.py': KeyError: 'told\\nso' ({cwd}/broken.py:3)"),
        ("syntax:x", "cannot import 'syntax': SyntaxError: invalid syntax (syntax.py, line 2)"),
        (
            "syntax.py:x",
            "cannot import 'syntax.py': SyntaxError: invalid syntax (syntax.py, line 2)",
        ),
        ("targets:echo --path s --port 1", "--path excludes --host and --port"),
        ("targets:echo --path s --host localhost", "--path excludes --host and --port"),
        ("targets:echo --port 65536", "--port must be between 0 and 65535, not 65536"),
        ("targets:echo --port -1", "--port must be between 0 and 65535, not -1"),
        ("targets:echo --max-connections 0", "--max-connections must be at least 1, not 0"),
        ("targets:echo --max-connections -3", "--max-connections must be at least 1, not -3"),
        ("targets:echo --pollers 0", "--pollers 0: pollers must be between 1 and 256, not 0"),
    ],
)
def test_a_wrong_call_gives_one_line(
    called: Run, directory: Path, arguments: str, message: str
) -> None:
    status, out, err = called("serve", *arguments.split())
    assert (status, out) == (2, "")
    assert err == f"anypoll: {message.format(cwd=directory)}\n"


def test_the_exit_status_is_that_of_main(anypoll_command: list[str], directory: Path) -> None:
    done = run_to_end([*anypoll_command, "serve", "targets:nosuch"], cwd=directory)
    message = "anypoll: 'targets' has no attribute 'nosuch'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "nosuch",
        "serve",
        "serve targets:echo --port x",
        "serve targets:echo --backend curio",
        "serve targets:echo --max-connections many",
        "serve targets:echo --request-mode yes",
    ],
)
def test_what_cannot_be_parsed(called: Run, arguments: str) -> None:
    status, out, err = called(*arguments.split())
    assert (status, out) == (2, "")
    assert err.startswith("usage: anypoll")


@pytest.mark.parametrize("backend", ["uvloop", "trio"])
def test_a_backend_that_is_not_installed(
    backend: str, called: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = f"anypoll: --backend {backend}: {backend} is not installed\n"
    assert called("serve", "asyncio:sleep", "--backend", backend) == (2, "", message)


@pytest.mark.parametrize("arguments", ["--help", "serve --help"])
def test_help(called: Run, arguments: str) -> None:
    status, out, err = called(*arguments.split())
    assert (status, err) == (0, "")
    assert out.startswith("usage: anypoll")


# --- listening -----------------------------------------------------------------------------------


def test_a_port_in_use_gives_one_line(called: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = called("serve", "targets:echo", "--port", str(port))
    assert (status, out) == (1, "")
    assert err == f"anypoll: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_path_that_is_a_file_stays_one(called: Run, directory: Path) -> None:
    status, out, err = called("serve", "targets:echo", "--path", "targets.py")
    assert (status, out) == (1, "")
    assert err.startswith("anypoll: cannot listen on targets.py: ")
    assert err.count("\n") == 1
    assert (directory / "targets.py").read_text() == TARGETS


class Hello:
    """A connection on which that has come, as far as the targets need one."""

    sent = b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"hello"

    async def send(self, data: bytes) -> None:
        self.sent += data


@pytest.mark.parametrize(
    "target",
    [
        "targets:echo",
        "targets.py:echo",
        "./targets.py:echo",
        "targets:partial",
        "targets:wrapped",
        "targets:instance",
        "targets:instance.method",
    ],
)
def test_targets(called: Run, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    handlers = []

    def run(_serve: Any, arguments: dict[str, Any], **_: Any) -> int:
        handlers.append(arguments["handler"])
        return 0

    monkeypatch.setattr(_cli.anyio, "run", run)
    assert called("serve", target) == (0, "", "")
    [handler] = handlers
    conn = Hello()
    asyncio.run(handler(conn))
    assert conn.sent == b"hello"


@pytest.mark.parametrize("target", ["targets:echo", "{}/targets.py:echo"])
def test_a_target_finds_its_siblings(
    serving: Callable[..., Any], directory: Path, target: str
) -> None:
    """Of a module in the current directory; of a file, wherever that is."""
    cwd = Path("/") if "/" in target else directory
    with serving(target.format(directory), cwd=cwd) as (process, address):
        with connect(address) as client:
            asks(client)
        stop(process)


def test_a_unix_socket(serving: Callable[..., Any], directory: Path, backend: str) -> None:
    with serving("targets:echo", "--path", "s", "--backend", backend) as (process, address):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(directory / address))
            asks(client)
        stop(process)


def test_two_pollers_and_all_interfaces(serving: Callable[..., Any]) -> None:
    with serving("targets:echo", "--host", "", "--pollers", "2") as (process, address):
        port = address.rpartition(":")[2]
        for _ in range(4):
            with connect(f"127.0.0.1:{port}") as client:
                asks(client)
        process.terminate()
        more, errors = output_at_end(process)
        assert (process.returncode, errors) == (0, "")
        assert all(line.startswith("listening on ") for line in more.splitlines())


def test_addresses_are_shown_as_people_write_them() -> None:
    assert _cli._show(("127.0.0.1", 80)) == "127.0.0.1:80"
    assert _cli._show(("::1", 80, 0, 0)) == "[::1]:80"
    assert _cli._show("/run/s") == "/run/s"
    assert _cli._show(b"/run/\xff") == "/run/\udcff"
    assert _cli._show("\0name") == "@name"


def test_request_mode(serving: Callable[..., Any], backend: str) -> None:
    """The function is called for each request, not for each connection."""
    options = ["--request-mode", "--backend", backend]
    with serving("targets:request", *options) as (process, address):
        with connect(address) as client:
            for sent, got in ((b"one", b"first"), (b"two", b"one"), (b"three", b"two")):
                asks(client, sent, got)
        stop(process)


def test_a_limit_of_connections(serving: Callable[..., Any]) -> None:
    """The others wait until one has ended."""
    with serving("targets:echo", "--max-connections", "1") as (process, address):
        with connect(address) as first:
            asks(first, b"one")
            second = connect(address)
            second.sendall(b"two")
            asks(first, b"one again")  # answered behind what the second has sent
            second.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.recv(100)
            second.settimeout(30)
        assert second.recv(100) == b"two"
        second.close()
        stop(process)


# --- sockets that were passed --------------------------------------------------------------------


# Stands where systemd does: puts the sockets at 3 and what follows, and becomes the command.
PASS = """
import os, sys
pid, count, fds = sys.argv[1], sys.argv[2], [int(fd) for fd in sys.argv[3].split(",") if fd]
high = [os.dup2(fd, 200 + n, inheritable=False) for n, fd in enumerate(fds)]
os.closerange(3, 200)
for n, fd in enumerate(high):
    os.dup2(fd, 3 + n, inheritable=True)
os.environ["LISTEN_PID"] = pid.replace("own", str(os.getpid()))
os.environ["LISTEN_FDS"] = count
os.environ["LISTEN_FDNAMES"] = "unknown"
os.execv(sys.executable, [sys.executable, *sys.argv[4:]])
"""


@pytest.fixture
def passing(
    anypoll_command: list[str],
) -> Callable[..., list[str]]:
    """The command, with sockets passed to it."""

    def command(
        *options: str, fds: Sequence[int], count: str | None = None, pid: str = "own"
    ) -> list[str]:
        passed = ",".join(map(str, fds))
        executable, *rest = anypoll_command
        count = str(len(fds)) if count is None else count
        return [executable, "-c", PASS, pid, count, passed, *rest, "serve", *options]

    return command


Passing = Callable[..., "list[str]"]


@contextlib.contextmanager
def sockets(directory: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP and a UNIX socket, listening, that a child inherits."""
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(directory / "passed"))
        unix.listen()
        yield tcp, unix


def test_sockets_that_were_passed(passing: Passing, directory: Path) -> None:
    """Several at once. What had been connected before the command was started is served too."""
    with sockets(directory) as (tcp, unix), socket.socket(socket.AF_UNIX) as other:
        fds = [tcp.fileno(), unix.fileno()]
        with socket.create_connection(tcp.getsockname(), timeout=30) as early:
            early.sendall(b"early")
            with running(passing("targets:echo", fds=fds), directory, fds) as (process, address):
                assert address == _cli._show(tcp.getsockname())
                assert process.stdout is not None
                assert process.stdout.readline() == f"listening on {directory / 'passed'}\n"
                assert early.recv(100) == b"early"
                other.settimeout(30)
                other.connect(unix.getsockname())
                other.sendall(b"hello")
                assert other.recv(100) == b"hello"
                early.close()
                stop(process)
                assert (directory / "passed").exists()  # it is systemd's


def test_children_of_the_command_are_not_passed_them(passing: Passing, directory: Path) -> None:
    with sockets(directory) as (tcp, unix):
        fds = [tcp.fileno(), unix.fileno()]
        command = passing("targets:environment", fds=fds)
        with running(command, directory, fds) as (process, address), connect(address) as client:
            assert client.recv(100) == b"([], [])"
            assert process.stdout is not None
            process.stdout.readline()
            stop(process)


@pytest.mark.parametrize(("pid", "count"), [("1", "1"), ("own", "0"), ("", "1")])
def test_sockets_that_are_for_somebody_else(
    passing: Passing, directory: Path, pid: str, count: str
) -> None:
    """Such variables mean nothing; the address is the usual one."""
    with sockets(directory) as (tcp, _):
        command = passing("targets:echo", fds=[tcp.fileno()], count=count, pid=pid)
        with running(command, directory, [tcp.fileno()]) as (process, address):
            assert address != _cli._show(tcp.getsockname())
            connect(address).close()
            stop(process)


ALL = "--host, --port and --path"
BESIDE = ["--port 0", "--host=", "--path x"]


@pytest.mark.parametrize("count", ["3", "9" * 30])
def test_sockets_that_are_not_there(passing: Passing, directory: Path, count: str) -> None:
    with sockets(directory) as (tcp, unix):
        fds = [tcp.fileno(), unix.fileno()]
        done = refused(passing("targets:echo", fds=fds, count=count), directory, fds)
    message = f"anypoll: LISTEN_FDS is {count}, but descriptor 5 is not open\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        *((n, "", f"LISTEN_FDS must be a number of sockets, not {n!r}") for n in ("x", "-1", "")),
        *(("1", options, f"{ALL} exclude the sockets of LISTEN_FDS") for options in BESIDE),
    ],
)
def test_sockets_that_cannot_be_served(
    called: Run, monkeypatch: pytest.MonkeyPatch, count: str, options: str, message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        monkeypatch.setattr(_cli, "_FIRST_PASSED", passed.fileno())
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", count)
        done = called("serve", "targets:echo", *options.split())
    assert done == (2, "", f"anypoll: {message}\n")


def test_descriptors_that_are_no_listening_sockets(passing: Passing, directory: Path) -> None:
    with open(directory / "targets.py") as file:
        done = refused(passing("targets:echo", fds=[file.fileno()]), directory, [file.fileno()])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "anypoll: LISTEN_FDS is 1, but descriptor 3 is not a socket\n"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        done = refused(passing("targets:echo", fds=[udp.fileno()]), directory, [udp.fileno()])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("anypoll: cannot listen on the sockets of LISTEN_FDS: ")
    assert done.stderr.count("\n") == 1


def refused(
    command: Sequence[str], directory: Path, fds: Sequence[int]
) -> subprocess.CompletedProcess[str]:
    return run_to_end(command, cwd=directory, pass_fds=fds)


# --- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_closes_idle_connections(
    serving: Callable[..., Any], backend: str, signum: signal.Signals
) -> None:
    options = ["--backend", backend]
    with serving("targets:echo", *options) as (process, address), connect(address) as client:
        asks(client)
        stop(process, signum)
        assert client.recv(100) == b""


def test_a_busy_handler_is_cancelled(serving: Callable[..., Any], backend: str) -> None:
    options = ["--backend", backend]
    with serving("targets:busy", *options) as (process, address), connect(address) as client:
        assert client.recv(100) == b"busy"
        stop(process)


def test_a_second_signal_ends_the_grace(directory: Path, backend: str) -> None:
    arguments = ["serve", "targets:busy", "--backend", backend]
    program = (
        "from anypoll import __main__ as command; command._GRACE = 1000;"
        f"raise SystemExit(command.main({arguments}))"
    )
    with (
        running([sys.executable, "-c", program], directory) as (process, address),
        connect(address) as client,
    ):
        assert client.recv(100) == b"busy"
        process.send_signal(signal.SIGINT)
        knock_until_refused(address)  # the grace has begun
        assert process.poll() is None
        stop(process, signal.SIGTERM)


def test_a_failing_handler_is_logged_and_others_are_served(serving: Callable[..., Any]) -> None:
    with serving("targets:failing") as (process, address):
        for _ in range(2):
            with connect(address) as client, contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
        process.terminate()
        output, errors = output_at_end(process)
    assert (process.returncode, output) == (0, "")
    assert errors.count("RuntimeError: as told\n") == 2
    assert errors.count("ERROR anypoll.server: ") == 2
