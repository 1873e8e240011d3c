"""benchmarks/procfs.py: CPU time that was used is found, whichever thread used it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import procfs
import pytest
from procfs import ENDED_THREADS, LOOP_THREAD, ProcessTimes, ThreadTimes, Use, used_by_name


def test_schedstat_begins_with_nanoseconds() -> None:
    assert procfs.parse_schedstat("91847358 31981653 570\n") == 91847358


@pytest.mark.parametrize("name", ["python", "a b", "x) R (y", "("])
def test_stat_with_any_name(name: str) -> None:
    text = f"12 ({name}) S 1 12 12 0 -1 4194304 81 0 0 0 17 4 0 0 20 0 1 0"
    assert procfs.parse_stat(text) == (name, 17, 4)
    assert procfs.parse_state(text) == "S"


def test_a_process_that_runs_is_not_waiting() -> None:
    assert not procfs.is_waiting(os.getpid())


def test_a_process_that_reads_is_waiting() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        while not procfs.is_waiting(process.pid):
            time.sleep(0.01)
        process.communicate()


def test_threads_of_one_name_are_added_up() -> None:
    before = ProcessTimes(100, {1: ThreadTimes("loop", 60), 2: ThreadTimes("poller", 40)})
    after = ProcessTimes(
        1100,
        {
            1: ThreadTimes("loop", 660, user_ticks=3, system_ticks=1),
            2: ThreadTimes("poller", 140, system_ticks=1),
            3: ThreadTimes("poller", 300, user_ticks=1),  # began in between: all of it counts
        },
    )
    assert used_by_name(before, after) == {
        "loop": Use(600, 0.75),
        "poller": Use(400, 0.5),
        ENDED_THREADS: Use(0, 0.0),
    }


def test_threads_that_have_ended_are_not_lost() -> None:
    before = ProcessTimes(100, {1: ThreadTimes("loop", 60), 2: ThreadTimes("poller", 40)})
    after = ProcessTimes(1100, {1: ThreadTimes("loop", 460)})
    uses = used_by_name(before, after)
    assert uses[ENDED_THREADS].nanoseconds == 600
    assert sum(use.nanoseconds for use in uses.values()) == 1000


def test_clocks_that_were_read_one_after_another() -> None:
    """The thread's was read first and is behind, or ahead, of that of the process."""
    before = ProcessTimes(100, {1: ThreadTimes("loop", 100)})
    after = ProcessTimes(190, {1: ThreadTimes("loop", 200)})
    assert used_by_name(before, after)[ENDED_THREADS].nanoseconds == 0


def test_a_process_with_a_thread_that_ends() -> None:
    pid = os.getpid()

    def spin() -> None:
        while time.thread_time() < 0.05:
            pass

    before = procfs.times(pid)
    thread = threading.Thread(target=spin)
    thread.start()
    thread.join()
    while Path(f"/proc/self/task/{thread.native_id}").exists():  # a little longer than join() waits
        time.sleep(0.001)
    after = procfs.times(pid)
    uses = used_by_name(before, after)
    assert set(after.threads) >= {pid}
    assert LOOP_THREAD in uses
    assert uses[ENDED_THREADS].nanoseconds >= 40_000_000
    assert sum(use.nanoseconds for use in uses.values()) >= 50_000_000
