"""Counting the instructions of one cell: its server under callgrind, and the load generator."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import procfs
from callgrind import Callgrind, Function, Profile
from catalog import Cell
from cells import load_command
from processes import (
    CellError,
    ask,
    check_alive,
    hang_up,
    read_line,
    read_port,
    running,
    text_of,
    time_limit,
)

# Seconds, for what is many times slower than by itself, on a machine that does other things too.
START_LIMIT = 120.0
STALL_LIMIT = 60.0
LOAD_LIMIT = 600.0
REST_LIMIT = 20.0
_REST = 0.05  # without CPU time, after which a server has nothing left to do

LEAST_PARTS, MOST_PARTS = 3, 12
AGREEMENT = 0.01  # how far the lowest two parts may be apart


@dataclass(frozen=True)
class Count:
    requests: int
    """In each part."""
    parts: Sequence[Profile]
    """Lowest first, at least two."""
    output: str = ""
    """What the programs wrote to their standard error."""

    @property
    def per_request(self) -> float:
        """In the lowest part: if something holds the load generator up, the server finds fewer
        requests at a time, and has to wait for the next ones more often.
        """
        return self.parts[0].instructions / self.requests

    @property
    def is_certain(self) -> bool:
        return agree(self.parts)

    def hottest(self) -> list[tuple[Function, float]]:
        """Instructions per request of each function itself, most first."""
        functions = sorted(self.parts[0].functions.items(), key=lambda item: -item[1])
        return [(function, own / self.requests) for function, own in functions]


def count(cell: Cell) -> Count:
    with (
        tempfile.TemporaryDirectory(prefix="callgrind-") as folder,
        tempfile.TemporaryFile("w+") as log,
    ):
        try:
            parts = _count(cell, Callgrind(Path(folder)), log)
        except CellError as error:
            raise CellError(f"{error}\n{text_of(log)}".rstrip()) from None
        return Count(cell.workload.counted, parts, text_of(log))


def _count(cell: Cell, callgrind: Callgrind, log: IO[str]) -> list[Profile]:
    workload = cell.workload
    command = cell.peer.command(workload, cell.key.loop, lifetime=int(START_LIMIT + LOAD_LIMIT) + 1)
    with running(callgrind.command(command), log) as server:
        port = read_port(server, START_LIMIT)
        command = load_command(port, workload, {"counted": workload.counted, "stall": STALL_LIMIT})
        with running(command, log) as load, time_limit(load, LOAD_LIMIT):
            return _watch(callgrind, server, load)


def _watch(
    callgrind: Callgrind, server: subprocess.Popen[str], load: subprocess.Popen[str]
) -> list[Profile]:
    """Each part begins and ends while the server waits, with all of its connections open."""
    parts: list[Profile] = []
    if read_line(load):  # the warm-up is over
        _wait_until_it_rests(server)
        callgrind.start(server.pid)
        while needs_more(parts) and ask(load):
            _wait_until_it_rests(server)
            parts.append(callgrind.take(server.pid))
            parts.sort(key=lambda part: part.instructions)
    hang_up(load)
    if load.wait() != 0:
        raise CellError(f"the load generator has ended with status {load.returncode}")
    return parts


def needs_more(parts: Sequence[Profile]) -> bool:
    """:param parts: lowest first"""
    if len(parts) < LEAST_PARTS:
        return True
    return len(parts) < MOST_PARTS and not agree(parts)


def agree(parts: Sequence[Profile]) -> bool:
    return parts[1].instructions <= parts[0].instructions * (1 + AGREEMENT)


def _wait_until_it_rests(server: subprocess.Popen[str]) -> None:
    """Until it has done what it still had to do behind its last answer."""
    deadline = time.monotonic() + REST_LIMIT
    before, now = -1, 0
    while before != now or not procfs.is_waiting(server.pid):
        if time.monotonic() > deadline:
            raise CellError("the server does not come to rest")
        time.sleep(_REST)
        check_alive(server)
        before, now = now, procfs.process_nanoseconds(server.pid)
