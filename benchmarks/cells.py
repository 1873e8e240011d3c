"""One benchmark cell: a freshly started server process, and a load generator against it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import procfs

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "benchmarks"
LOAD = BUILD / "load"

START_LIMIT = 20.0  # seconds a server may take until it listens
STALL_LIMIT = 10.0  # seconds without progress after which the load generator gives up
NO_LOOP = "-"


@dataclass(frozen=True)
class Workload:
    name: str
    kind: str
    connections: int
    size: int
    outstanding: int = 1
    requests: int = 0
    """Per connection; 0 = as many as the time allows."""
    reconnect: bool = False
    idle: float = 0.0
    """Seconds of silence after the requests, in which memory and wake-ups are taken."""

    def describe(self) -> str:
        text = f"{self.kind}, {self.connections} connections, {self.size} B"
        if self.requests:
            text += f", {self.requests} request each, then "
            return text + ("a new connection" if self.reconnect else "silence")
        return f"{text}, {self.outstanding} outstanding"


@dataclass(frozen=True)
class Server:
    name: str
    command: tuple[str, ...]
    loops: tuple[str, ...]

    def start_command(self, loop: str, workload: Workload, lifetime: int) -> list[str]:
        options = ["--loop", loop, "--workload", workload.kind, "--lifetime", str(lifetime)]
        return [*self.command, *options]


def _python(script: str) -> tuple[str, ...]:
    return sys.executable, str(HERE / "servers" / script)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("rpc1", "rpc", 1, 64),
        Workload("rpc100", "rpc", 100, 64),
        Workload("pipe", "rpc", 100, 64, outstanding=16),
        Workload("echo100", "echo", 100, 64),
        Workload("rpc1000", "rpc", 1000, 64),
        Workload("rpc100_16k", "rpc", 100, 16 << 10),
        Workload("bulk", "echo", 4, 256 << 10),
        Workload("connect", "rpc", 50, 64, requests=1, reconnect=True),
        Workload("idle", "rpc", 5000, 64, requests=1, idle=1.5),
    )
}

SERVERS = {
    server.name: server
    for server in (
        Server("anypoll", _python("anypoll_server.py"), ("asyncio", "uvloop", "trio")),
        Server("requests", _python("requests_server.py"), ("asyncio", "uvloop", "trio")),
        Server("anyio", _python("anyio_server.py"), ("asyncio", "uvloop", "trio")),
        Server("protocol", _python("protocol_server.py"), ("asyncio", "uvloop")),
        Server("epoll", (str(BUILD / "epoll_server"),), (NO_LOOP,)),
    )
}


@dataclass(frozen=True)
class IdleUse:
    kib_per_connection: float
    wakeups_per_second: float
    cpu_percent: float


@dataclass(frozen=True)
class Result:
    rps: float
    p50_us: float
    p99_us: float
    max_us: float
    cpu_us: float
    """Of the whole server, per request."""
    load_percent: float
    """Of one core, used by the load generator: near 100 it is the limit, not the server."""
    threads: dict[str, tuple[float, float]]
    """µs per request in (user, system) mode by thread of the server."""
    idle: IdleUse | None
    server_output: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class CellError(Exception):
    """The server did not start or did not survive, or the load generator found a fault."""


def build() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC", "cc").split()
    for source in (HERE / "load.c", HERE / "servers" / "epoll_server.c"):
        options = ["-std=c11", "-O2", "-Wall", "-Wextra"]
        target = BUILD / source.stem
        subprocess.run([*compiler, *options, "-o", str(target), str(source)], check=True)


def measure(
    server: Server, loop: str, workload: Workload, *, seconds: float, warmup: float
) -> Result:
    limit = seconds + warmup + workload.idle + STALL_LIMIT + 10
    command = server.start_command(loop, workload, lifetime=int(limit + START_LIMIT) + 1)
    with tempfile.TemporaryFile("w+") as output, _process(command, output) as process:
        try:
            port = _read_port(process)
            load_command = _load_command(port, workload, seconds, warmup)
            with _process(load_command, output) as load, _time_limit(load, limit):
                return _watch(process, load, workload, output)
        except CellError as error:
            raise CellError(f"{error}\n{_text(output)}".rstrip()) from None


def _load_command(port: int, workload: Workload, seconds: float, warmup: float) -> list[str]:
    if workload.requests and not workload.reconnect:
        warmup = 0.0  # the first request is already one of those that count
    options = {
        "port": port,
        "workload": workload.kind,
        "connections": workload.connections,
        "size": workload.size,
        "outstanding": workload.outstanding,
        "seconds": seconds,
        "warmup": warmup,
        "idle": workload.idle,
        "stall": STALL_LIMIT,
    }
    if workload.requests:
        options["requests"] = workload.requests
    command = [str(LOAD), *(f"--{name}={value}" for name, value in options.items())]
    return [*command, "--reconnect"] if workload.reconnect else command


def _watch(
    server: subprocess.Popen[str], load: subprocess.Popen[str], workload: Workload, log: IO[str]
) -> Result:
    """Take the server's use of everything between now and the load generator's end."""
    pid = server.pid
    cpu, threads, memory = procfs.cpu(pid), procfs.thread_cpu(pid), procfs.resident_kib(pid)
    assert load.stdout is not None
    line = load.stdout.readline()
    if server.poll() is not None:
        raise CellError(f"the server has ended with status {server.returncode}")
    cpu, after = procfs.cpu(pid) - cpu, procfs.thread_cpu(pid)
    idle = _watch_idle(pid, workload, memory) if line and workload.idle else None
    if load.wait() != 0 or not line:
        raise CellError(f"the load generator has ended with status {load.returncode}")
    report = json.loads(line)
    if not report["requests"]:
        raise CellError("no request was answered while measuring")
    microseconds = 1e6 / report["total_requests"]
    used = {name: total - threads.get(name, procfs.NO_CPU) for name, total in after.items()}
    return Result(
        rps=report["rps"],
        p50_us=report["p50_us"],
        p99_us=report["p99_us"],
        max_us=report["max_us"],
        cpu_us=cpu.total * microseconds,
        load_percent=100 * report["cpu_seconds"] / report["seconds"],
        threads={
            name: (cpu.user * microseconds, cpu.system * microseconds) for name, cpu in used.items()
        },
        idle=idle,
        server_output=_text(log),
    )


def _watch_idle(pid: int, workload: Workload, memory_before: float) -> IdleUse:
    time.sleep(workload.idle * 0.2)  # the work of the requests may have an aftermath
    memory = procfs.resident_kib(pid) - memory_before
    wakeups, cpu, start = procfs.wakeups(pid), procfs.cpu(pid), time.perf_counter()
    time.sleep(workload.idle * 0.6)
    elapsed = time.perf_counter() - start
    return IdleUse(
        kib_per_connection=memory / workload.connections,
        wakeups_per_second=(procfs.wakeups(pid) - wakeups) / elapsed,
        cpu_percent=100 * (procfs.cpu(pid) - cpu).total / elapsed,
    )


@contextlib.contextmanager
def _process(command: list[str], errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def _time_limit(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Kill the process when the time is up, which ends every read from it."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read_port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    with _time_limit(process, START_LIMIT):
        word, _, port = process.stdout.readline().partition(" ")
    if word != "PORT":
        raise CellError("the server has not started")
    return int(port)


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read().strip()
