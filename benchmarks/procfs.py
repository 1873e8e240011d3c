"""A /proc reader: another process's CPU time (also per thread), memory and wake-ups.

CPU times are the scheduler's own, in nanoseconds. Those of a process include its ended threads;
what its living threads (``task/*/schedstat``) do not account for was used by threads that have
ended meanwhile. Both are current for a thread that waits, and at most one scheduler tick (some
milliseconds) late for one that runs. Only how a time divides into user and system mode is counted
in clock ticks.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

LOOP_THREAD = "loop"
ENDED_THREADS = "(ended)"
BUSY_THREAD = "busy"

_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") / 1024


@dataclass(frozen=True)
class ThreadTimes:
    """What one thread has used since it began."""

    name: str
    nanoseconds: int
    user_ticks: int = 0
    system_ticks: int = 0


@dataclass(frozen=True)
class ProcessTimes:
    nanoseconds: int
    threads: Mapping[int, ThreadTimes]
    """By thread ID: those that live."""


@dataclass(frozen=True)
class Use:
    """What the threads of one name have used between two moments."""

    nanoseconds: int
    user_share: float
    """Of the time: 0 to 1."""


def times(pid: int) -> ProcessTimes:
    threads = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        tid = int(task.name)
        try:
            stat, schedstat = (task / "stat").read_text(), (task / "schedstat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since it was listed
        name, user, system = parse_stat(stat)
        # Every Python server here runs its event loop in the main thread.
        name = LOOP_THREAD if tid == pid else name
        threads[tid] = ThreadTimes(name, parse_schedstat(schedstat), user, system)
    return ProcessTimes(process_nanoseconds(pid), threads)


def used_by_name(before: ProcessTimes, after: ProcessTimes) -> dict[str, Use]:
    """The CPU time in between, by the name of the thread; its parts add up to all that was used."""
    sums: dict[str, tuple[int, int, int]] = {}
    for tid, now in after.threads.items():
        then = before.threads.get(tid, ThreadTimes(now.name, 0))
        nanoseconds, user, system = sums.get(now.name, (0, 0, 0))
        sums[now.name] = (
            nanoseconds + now.nanoseconds - then.nanoseconds,
            user + now.user_ticks - then.user_ticks,
            system + now.system_ticks - then.system_ticks,
        )
    ended = after.nanoseconds - before.nanoseconds - sum(used for used, _, _ in sums.values())
    uses = {
        name: Use(used, user / (user + system) if user + system else 0.0)
        for name, (used, user, system) in sums.items()
    }
    # The clock of the process and those of its threads are read one after another.
    return uses | {ENDED_THREADS: Use(max(0, ended), 0.0)}


def process_nanoseconds(pid: int) -> int:
    """CPU time of the whole process, its ended threads included."""
    # The ID of another process's CPU clock, as clock_getcpuclockid(3) makes it.
    return time.clock_gettime_ns((~pid << 3) | 2)


def resident_kib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_KIB


def wakeups(pid: int) -> int:
    """How often any thread has given up the CPU to wait, and so has been woken since."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                total += int(line.split()[1])
    return total


def is_waiting(pid: int) -> bool:
    """Whether no thread runs, or would if there were a CPU for it."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return False  # one has ended just now
    return all(parse_state(stat) == "S" for stat in stats)


def parse_state(stat: str) -> str:
    """A letter: R = runs or could, S = waits."""
    return stat.rpartition(")")[2].split(maxsplit=1)[0]


def parse_schedstat(text: str) -> int:
    """Nanoseconds on a CPU: the first of the three numbers."""
    return int(text.split(maxsplit=1)[0])


def parse_stat(text: str) -> tuple[str, int, int]:
    """The thread's name, and its clock ticks in user and system mode."""
    # The name is in parentheses and may itself contain some: the last one ends it.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return head.partition("(")[2], int(fields[11]), int(fields[12])
