"""The processes of a benchmark cell: none outlives its block, and none keeps anybody waiting."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class CellError(Exception):
    """The server did not start or did not survive, or the load generator found a fault."""


@contextlib.contextmanager
def running(command: list[str], errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def time_limit(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Kill the process when the time is up, which ends every read from it."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_line(process: subprocess.Popen[str]) -> str:
    """Empty if the process has ended."""
    assert process.stdout is not None
    return process.stdout.readline()


def ask(process: subprocess.Popen[str]) -> str:
    """What a process says that waits for a line; empty if it has ended."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        # Not by write(): what that cannot send, closing would try again.
        os.write(process.stdin.fileno(), b"\n")
    return read_line(process)


def hang_up(process: subprocess.Popen[str]) -> None:
    """To a process that waits for a line: there are no more."""
    assert process.stdin is not None
    process.stdin.close()


def read_port(server: subprocess.Popen[str], seconds: float) -> int:
    """Where a server listens that has so long to start."""
    with time_limit(server, seconds):
        word, _, port = read_line(server).partition(" ")
    if word != "PORT":
        raise CellError("the server has not started")
    return int(port)


def check_alive(server: subprocess.Popen[str]) -> None:
    if server.poll() is not None:
        raise CellError(f"the server has ended with status {server.returncode}")


def text_of(log: IO[str]) -> str:
    log.seek(0)
    return log.read().strip()
