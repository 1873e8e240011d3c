"""A /proc reader: another process's CPU time (also per thread), memory and wake-ups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") / 1024
LOOP_THREAD = "loop"


@dataclass(frozen=True)
class CPU:
    user: float
    system: float

    @property
    def total(self) -> float:
        return self.user + self.system

    def __add__(self, other: CPU) -> CPU:
        return CPU(self.user + other.user, self.system + other.system)

    def __sub__(self, other: CPU) -> CPU:
        return CPU(self.user - other.user, self.system - other.system)


NO_CPU = CPU(0.0, 0.0)


def cpu(pid: int) -> CPU:
    """Seconds of the whole process, ended threads included."""
    return _parse_stat(Path(f"/proc/{pid}/stat"))[1]


def thread_cpu(pid: int) -> dict[str, CPU]:
    """Seconds by thread name; threads of one name are added up.

    The main thread, in which every server here runs its event loop, is called "loop".
    """
    threads: dict[str, CPU] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name, used = _parse_stat(task / "stat")
        if int(task.name) == pid:
            name = LOOP_THREAD
        threads[name] = threads.get(name, NO_CPU) + used
    return threads


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


def _parse_stat(path: Path) -> tuple[str, CPU]:
    # The name is in parentheses and may itself contain some: the last one ends it.
    head, _, tail = path.read_text().rpartition(")")
    fields = tail.split()
    return head.partition("(")[2], CPU(int(fields[11]) * _TICK, int(fields[12]) * _TICK)
