"""One benchmark cell: a freshly started server process, and a load generator against it.

Or, for a client, a freshly started client against the C server.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

import procfs
from catalog import (
    BUILD,
    CERTIFICATE,
    EPOLL_SERVER,
    GO_SERVER,
    HERE,
    LOAD,
    LOAD_TLS,
    WORKLOADS,
    Cell,
    Workload,
)
from processes import (
    CellError,
    ask,
    check_alive,
    read_line,
    read_port,
    running,
    text_of,
    time_limit,
)
from procfs import BUSY_THREAD, LOOP_THREAD
from rounds import NO_LOOP, Measurement

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

COMPILE = [*os.environ.get("CC", "cc").split(), "-std=c11", "-O2", "-Wall", "-Wextra"]

START_LIMIT = 20.0  # seconds a server may take until it listens
STALL_LIMIT = 10.0  # seconds without progress after which the load generator gives up
_FIRST = 20  # connections before those that may stall the loop


@dataclass(frozen=True)
class Result:
    figures: Measurement
    threads: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """µs per request in (user, system) mode by the name of the server's thread."""
    output: str = ""
    """What the programs wrote to their standard error."""


def build(workloads: Iterable[str]) -> None:
    """Compile what is not Python, or end the program. Go's server only where there is a Go; what
    TLS needs only if one of the workloads is of that kind, and OpenSSL is there.
    """
    try:
        _build()
        if any(WORKLOADS[name].is_tls for name in workloads):
            _build_tls()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks: a C compiler is needed (cc, or $CC): {error}")


def _build() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    for program, source in ((LOAD, "load.c"), (EPOLL_SERVER, "peers/epoll_server.c")):
        subprocess.run([*COMPILE, "-o", program, HERE / source], check=True)
    if shutil.which("go"):
        environment = os.environ | {"GO111MODULE": "off", "GOCACHE": str(BUILD / "go-cache")}
        source = HERE / "peers" / "go_server.go"
        subprocess.run(["go", "build", "-o", GO_SERVER, source], check=True, env=environment)


def _build_tls() -> None:
    """Where something is missing its file is, too: see machine.reason_to_skip."""
    for file in (LOAD_TLS, CERTIFICATE):
        file.unlink(missing_ok=True)
    source = ["-DLOAD_TLS", HERE / "load.c", "-lssl", "-lcrypto"]
    subprocess.run([*COMPILE, "-o", LOAD_TLS, *source], check=False)
    try:
        import trustme  # noqa: PLC0415 - needed for these workloads only
    except ModuleNotFoundError:
        return
    # Its ECDSA is of the curve P-256.
    issued = trustme.CA().issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    issued.private_key_and_cert_chain_pem.write_to_path(CERTIFICATE)


def measure(cell: Cell, *, seconds: float, warmup: float) -> Result:
    workload = cell.workload
    seconds, warmup = max(seconds, workload.at_least), max(warmup, workload.settle)
    limit = seconds + warmup + workload.idle + STALL_LIMIT + 10
    take = _measure_client if workload.kind == "client" else _measure_server
    with tempfile.TemporaryFile("w+") as log:
        try:
            result = take(cell, seconds, warmup, limit, log)
        except CellError as error:
            raise CellError(f"{error}\n{text_of(log)}".rstrip()) from None
        return Result(result.figures, result.threads, text_of(log))


# ---- a server ----


def _measure_server(
    cell: Cell, seconds: float, warmup: float, limit: float, log: IO[str]
) -> Result:
    workload = cell.workload
    command = cell.peer.command(workload, cell.key.loop, lifetime=int(limit + START_LIMIT) + 1)
    with running(command, log) as server:
        port = read_port(server, START_LIMIT)
        if workload.stalls:
            _begin_stalls(server, port, workload, limit, log)
        memory = procfs.resident_kib(server.pid)
        # With a number of requests, the first is already one of those that count.
        warmup = 0.0 if workload.requests and not workload.reconnect else warmup
        limits = {"seconds": seconds, "warmup": warmup, "stall": STALL_LIMIT}
        with (
            running(load_command(port, workload, limits), log) as load,
            time_limit(load, limit),
        ):
            return _watch(cell, server, load, memory)


def _begin_stalls(
    server: subprocess.Popen[str], port: int, workload: Workload, limit: float, log: IO[str]
) -> None:
    """What happens only with the first connections of a process is over."""
    few = load_command(port, replace(workload, connections=_FIRST), {"stall": STALL_LIMIT})
    with running(few, log) as load, time_limit(load, limit):
        while read_line(load):
            pass
        if load.wait() != 0:
            raise CellError(f"the load generator has ended with status {load.returncode}")
    _longest_stall(server)


def _longest_stall(server: subprocess.Popen[str]) -> float:
    """In ms, since it was last asked."""
    with time_limit(server, STALL_LIMIT):
        answer = ask(server)
    if not answer:
        raise CellError("the server does not say how long its loop has stalled")
    return float(answer)


def load_command(port: int, workload: Workload, limits: Mapping[str, float]) -> list[str]:
    """``limits`` are those options that say how long it takes."""
    options = {
        "port": port,
        "workload": "rpc" if workload.is_tls else workload.kind,
        "connections": workload.connections,
        "size": workload.size,
        "outstanding": workload.outstanding,
        "idle": workload.idle,
        **limits,
    }
    if workload.requests:
        options["requests"] = workload.requests
    if workload.rate:
        options["rate"] = workload.rate
    program = str(LOAD_TLS if workload.is_tls else LOAD)
    command = [program, *(f"--{name}={value}" for name, value in options.items())]
    if workload.reconnect:
        command.append("--reconnect")
    if workload.resume:
        command.append("--resume")
    return command


def _watch(
    cell: Cell, server: subprocess.Popen[str], load: subprocess.Popen[str], memory: float
) -> Result:
    """Take what the server uses from the end of the warm-up until the last answer."""
    started = read_line(load)
    before = _times(server)
    line = read_line(load)
    after = _times(server)
    stalls = {"stall_ms": _longest_stall(server)} if line and cell.workload.stalls else {}
    idle = _watch_idle(server.pid, cell.workload, memory) if line and cell.workload.idle else {}
    if load.wait() != 0 or not started or not line:
        raise CellError(f"the load generator has ended with status {load.returncode}")
    report = json.loads(line)
    if not report["requests"]:
        raise CellError("no request was answered while measuring")
    uses = procfs.used_by_name(before, after)
    microseconds = {name: use.nanoseconds / 1e3 / report["answered"] for name, use in uses.items()}
    figures = {name: report[name] for name in ("rps", "p50_us", "p99_us", "max_us")}
    figures["cpu_us"] = sum(used for name, used in microseconds.items() if name != BUSY_THREAD)
    if cell.key.loop != NO_LOOP:
        figures["loop_us"] = microseconds[LOOP_THREAD]
    figures["load_percent"] = 100 * report["cpu_seconds"] / report["seconds"]
    threads = {
        name: (used * uses[name].user_share, used * (1 - uses[name].user_share))
        for name, used in microseconds.items()
    }
    return Result(figures | idle | stalls, threads)


def _times(server: subprocess.Popen[str]) -> procfs.ProcessTimes:
    check_alive(server)
    return procfs.times(server.pid)


def _watch_idle(pid: int, workload: Workload, memory_before: float) -> dict[str, float]:
    time.sleep(workload.idle * 0.5)  # what the requests have left behind is cleared away
    memory = procfs.resident_kib(pid) - memory_before
    wakeups, cpu = procfs.wakeups(pid), procfs.process_nanoseconds(pid)
    start = time.perf_counter()
    time.sleep(workload.idle * 0.4)
    elapsed = time.perf_counter() - start
    return {
        "kib": memory / workload.connections,
        "wakeups": (procfs.wakeups(pid) - wakeups) / elapsed,
        "idle_percent": (procfs.process_nanoseconds(pid) - cpu) / 1e7 / elapsed,
    }


# ---- a client ----


def _measure_client(
    cell: Cell, seconds: float, warmup: float, limit: float, log: IO[str]
) -> Result:
    lifetime = int(limit + START_LIMIT) + 1
    command = cell.peer.command(cell.workload, cell.key.loop, lifetime)
    with running([EPOLL_SERVER, "--lifetime", str(lifetime)], log) as server:
        command += [f"--port={read_port(server, START_LIMIT)}", f"--size={cell.workload.size}"]
        command += [f"--seconds={seconds}", f"--warmup={warmup}"]
        with running(command, log) as client, time_limit(client, START_LIMIT + limit):
            line = read_line(client)
            if client.wait() != 0 or not line:
                raise CellError(f"the client has ended with status {client.returncode}")
            figures: dict[str, Any] = json.loads(line)
            return Result(figures)
