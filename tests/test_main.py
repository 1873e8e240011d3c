"""The command: what it serves, what it says, how it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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

BACKENDS = ["asyncio", "uvloop", "trio"]

Anypoll = Callable[..., "subprocess.CompletedProcess[str]"]


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=30)


def knock_until_refused(address: str) -> None:
    with contextlib.suppress(ConnectionError):  # refused; or reset, by a listener that closes
        while True:
            connect(address).close()


def needs(backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is missing")


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
def anypoll(anypoll_command: list[str], directory: Path) -> Anypoll:
    """Runs the command in that directory to its end."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_to_end([*anypoll_command, *arguments], cwd=directory)

    return run


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("targets", "'targets' is not of the form MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE"),
        ("targets.py", "'targets.py' is not of the form MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE"),
        (":echo", "':echo' is not of the form MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE"),
        ("targets:", "'targets:' is not of the form MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE"),
        ("nosuch:echo", "cannot import 'nosuch': ModuleNotFoundError: No module named 'nosuch'"),
        ("no/such.py:echo", "there is no file 'no/such.py'"),
        ("targets.py:nosuch", "'targets.py' has no attribute 'nosuch'"),
        ("targets:nosuch", "'targets' has no attribute 'nosuch'"),
        ("targets:instance.nosuch", "'targets' has no attribute 'instance.nosuch'"),
        ("targets:plain", "'plain' in 'targets' is not a coroutine function"),
        ("targets:Server", "'Server' in 'targets' is not a coroutine function"),
        ("targets:__name__", "'__name__' in 'targets' is not a coroutine function"),
        (
            "needy:echo",
            "cannot import 'needy': ModuleNotFoundError: No module named 'no_such_module'",
        ),
    ],
)
def test_a_wrong_target_gives_one_line(anypoll: Anypoll, target: str, message: str) -> None:
    done = anypoll("serve", target)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"anypoll: {message}\n")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "KeyError: 'told\\nso' ({}:3)"),
        ("syntax", "SyntaxError: invalid syntax (syntax.py, line 2)"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".py"])
def test_a_target_that_fails_gives_one_line_that_says_where(
    anypoll: Anypoll, directory: Path, name: str, suffix: str, reason: str
) -> None:
    done = anypoll("serve", f"{name}{suffix}:handler")
    assert (done.returncode, done.stdout) == (2, "")
    reason = reason.format(directory / f"{name}.py")
    assert done.stderr == f"anypoll: cannot import '{name}{suffix}': {reason}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--path", "s", "--port", "1"], "--path excludes --host and --port"),
        (["--path", "s", "--host", "localhost"], "--path excludes --host and --port"),
        (["--port", "65536"], "--port must be between 0 and 65535, not 65536"),
        (["--port", "-1"], "--port must be between 0 and 65535, not -1"),
        (["--max-connections", "0"], "--max-connections must be at least 1, not 0"),
        (["--max-connections", "-3"], "--max-connections must be at least 1, not -3"),
    ],
)
def test_options_that_make_no_sense(anypoll: Anypoll, options: list[str], message: str) -> None:
    done = anypoll("serve", "targets:echo", *options)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"anypoll: {message}\n")


def test_options_that_anypoll_refuses(anypoll: Anypoll) -> None:
    done = anypoll("serve", "targets:echo", "--pollers", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("anypoll: --pollers 0: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nosuch"],
        ["serve"],
        ["serve", "targets:echo", "--port", "x"],
        ["serve", "targets:echo", "--backend", "curio"],
        ["serve", "targets:echo", "--max-connections", "many"],
        ["serve", "targets:echo", "--request-mode", "yes"],
    ],
)
def test_what_cannot_be_parsed(anypoll: Anypoll, arguments: list[str]) -> None:
    done = anypoll(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: anypoll")


@pytest.mark.parametrize("backend", ["uvloop", "trio"])
def test_a_backend_that_is_not_installed(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _cli.main(["serve", "asyncio:sleep", "--backend", backend]) == 2
    assert capsys.readouterr() == (
        "",
        f"anypoll: --backend {backend}: {backend} is not installed\n",
    )


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]])
def test_help(anypoll: Anypoll, arguments: list[str]) -> None:
    done = anypoll(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: anypoll")


# --- listening -----------------------------------------------------------------------------------


def test_a_port_in_use_gives_one_line(anypoll: Anypoll) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = anypoll("serve", "targets:echo", "--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    why = f"127.0.0.1:{port}: Address already in use"
    assert done.stderr == f"anypoll: cannot listen on {why}\n"


def test_a_path_that_is_a_file_stays_one(anypoll: Anypoll, directory: Path) -> None:
    done = anypoll("serve", "targets:echo", "--path", "targets.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("anypoll: cannot listen on targets.py: ")
    assert done.stderr.count("\n") == 1
    assert (directory / "targets.py").read_text() == TARGETS


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
def test_targets(anypoll_command: list[str], directory: Path, target: str) -> None:
    with running([*anypoll_command, "serve", target], directory) as (process, address):
        with connect(address) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        stop(process)


def test_a_file_in_another_directory_finds_its_siblings(
    anypoll_command: list[str], directory: Path
) -> None:
    target = f"{directory / 'targets.py'}:echo"
    with running([*anypoll_command, "serve", target], Path("/")) as (process, address):
        connect(address).close()
        stop(process)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_unix_socket(anypoll_command: list[str], directory: Path, backend: str) -> None:
    needs(backend)
    command = [*anypoll_command, "serve", "targets:echo", "--path", "s", "--backend", backend]
    with running(command, directory) as (process, address):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(directory / address))
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        stop(process)


def test_two_pollers_and_all_interfaces(anypoll_command: list[str], directory: Path) -> None:
    options = ["--host", "", "--pollers", "2"]
    with running([*anypoll_command, "serve", "targets:echo", *options], directory) as (
        process,
        address,
    ):
        port = address.rpartition(":")[2]
        for _ in range(4):
            with connect(f"127.0.0.1:{port}") as client:
                client.sendall(b"hello")
                assert client.recv(100) == b"hello"
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_request_mode(anypoll_command: list[str], directory: Path, backend: str) -> None:
    """The function is called for each request, not for each connection."""
    needs(backend)
    command = [*anypoll_command, "serve", "targets:request", "--request-mode"]
    with running([*command, "--backend", backend], directory) as (process, address):
        with connect(address) as client:
            for sent, got in ((b"one", b"first"), (b"two", b"one"), (b"three", b"two")):
                client.sendall(sent)
                assert client.recv(100) == got
        stop(process)


def test_a_limit_of_connections(anypoll_command: list[str], directory: Path) -> None:
    """The others wait until one has ended."""
    options = ["--max-connections", "1"]
    with running([*anypoll_command, "serve", "targets:echo", *options], directory) as (
        process,
        address,
    ):
        with connect(address) as first:
            first.sendall(b"one")
            assert first.recv(100) == b"one"
            second = connect(address)
            second.sendall(b"two")
            first.sendall(b"one again")  # answered behind what the second has sent
            assert first.recv(100) == b"one again"
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


@pytest.mark.parametrize(
    ("count", "options", "status", "message"),
    [
        ("x", [], 2, "LISTEN_FDS must be a number of sockets, not 'x'"),
        ("-1", [], 2, "LISTEN_FDS must be a number of sockets, not '-1'"),
        ("", [], 2, "LISTEN_FDS must be a number of sockets, not ''"),
        ("3", [], 2, "LISTEN_FDS is 3, but descriptor 5 is not open"),
        ("9" * 30, [], 2, f"LISTEN_FDS is {'9' * 30}, but descriptor 5 is not open"),
        ("1", ["--port", "0"], 2, "--host, --port and --path exclude the sockets of LISTEN_FDS"),
        ("1", ["--host", ""], 2, "--host, --port and --path exclude the sockets of LISTEN_FDS"),
        ("2", ["--path", "x"], 2, "--host, --port and --path exclude the sockets of LISTEN_FDS"),
    ],
)
def test_sockets_that_cannot_be_served(
    passing: Passing, directory: Path, count: str, options: list[str], status: int, message: str
) -> None:
    with sockets(directory) as (tcp, unix):
        fds = [tcp.fileno(), unix.fileno()]
        done = refused(passing("targets:echo", *options, fds=fds, count=count), directory, fds)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"anypoll: {message}\n")


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
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_signal_closes_idle_connections(
    anypoll_command: list[str], directory: Path, backend: str, signum: signal.Signals
) -> None:
    needs(backend)
    command = [*anypoll_command, "serve", "targets:echo", "--backend", backend]
    with running(command, directory) as (process, address), connect(address) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        stop(process, signum)
        assert client.recv(100) == b""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_busy_handler_is_cancelled(
    anypoll_command: list[str], directory: Path, backend: str
) -> None:
    needs(backend)
    command = [*anypoll_command, "serve", "targets:busy", "--backend", backend]
    with running(command, directory) as (process, address), connect(address) as client:
        assert client.recv(100) == b"busy"
        stop(process)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_signal_ends_the_grace(directory: Path, backend: str) -> None:
    needs(backend)
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


def test_a_failing_handler_is_logged_and_others_are_served(
    anypoll_command: list[str], directory: Path
) -> None:
    command = [*anypoll_command, "serve", "targets:failing"]
    with running(command, directory) as (process, address):
        for _ in range(2):
            with connect(address) as client, contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
        process.terminate()
        output, errors = output_at_end(process)
    assert (process.returncode, output) == (0, "")
    assert errors.count("RuntimeError: as told\n") == 2
    assert errors.count("ERROR anypoll.server: ") == 2
