"""A leak detector: a snapshot before each test, and what has grown since. Nothing may remain."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from dataclasses import dataclass

import anypoll
from anypoll._loop import runtime as _runtime

#: Gauges of a poller that go back to what they were.
_GAUGES = ("connections", "slots", "blocks_in_use", "bytes_in_use", "bytes_pinned")
#: What one poller has for as long as the process lives.
_FDS_OF_A_POLLER = 3
_ANONYMOUS = "anon_inode:"
#: Seconds after which what was frozen is looked through as well. A poller gives blocks and slots
#: back within a few milliseconds; a collection of all that pytest holds takes ten times as long.
_THAW_AFTER = 0.25
#: Worker threads that libraries keep for a while, or for ever.
_OTHERS_THREADS = ("Trio thread", "libuv-worker")
#: A poller's own, from its first TLS handshake on.
_JOBS = "anypoll-jobs"


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def _native_names() -> dict[int, str]:
    """Names of the threads that Python does not know of."""
    python = {thread.native_id for thread in threading.enumerate()}
    found = {}
    for number in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{number}/comm") as comm:
                name = comm.read()
        except OSError:  # it has ended
            continue
        if int(number) not in python and not name.startswith(_OTHERS_THREADS):
            found[int(number)] = name
    return found


def native_threads() -> set[int]:
    """Those threads: the pollers', without those for handshakes, and those of libraries."""
    return {n for n, name in _native_names().items() if not name.startswith(_JOBS)}


def _jobs_threads() -> int:
    return sum(name.startswith(_JOBS) for name in _native_names().values())


def _python_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if not t.name.startswith(_OTHERS_THREADS)}


@dataclass(frozen=True)
class Snapshot:
    pollers: int
    gauges: dict[str, int]
    hubs: int
    descriptors: dict[int, str]
    native_threads: int
    python_threads: set[threading.Thread]

    @classmethod
    def take(cls) -> Snapshot:
        statistics = anypoll.statistics().pollers
        return cls(
            pollers=len(statistics),
            gauges={name: sum(getattr(s, name) for s in statistics) for name in _GAUGES},
            hubs=len(_runtime._hubs),
            descriptors=_descriptors(),
            native_threads=len(native_threads()),
            python_threads=_python_threads(),
        )

    @property
    def anonymous(self) -> int:
        return sum(target.startswith(_ANONYMOUS) for target in self.descriptors.values())

    def grown(self) -> list[str]:
        """What there is now and was not then, in words."""
        now = self.take()
        # one that had ended may have been counted then, without a thread, and be gone now
        new_pollers = max(now.pollers - self.pollers, 0)
        words = [
            f"{name}: {self.gauges[name]} before, {now.gauges[name]} now"
            for name in _GAUGES
            if now.gauges[name] > self.gauges[name]
        ]
        if now.hubs > self.hubs:
            words.append(f"hubs: {self.hubs} before, {now.hubs} now")
        new = {
            fd: target
            for fd, target in now.descriptors.items()
            if self.descriptors.get(fd) != target
        }
        # those of the kernel's anonymous files look alike, and pollers come and go: only how many
        # there are tells
        more = now.anonymous - self.anonymous - new_pollers * _FDS_OF_A_POLLER
        for fd in [fd for fd, target in new.items() if target.startswith(_ANONYMOUS)]:
            if more <= 0:
                del new[fd]
        words += [f"descriptor {fd}: {target}" for fd, target in new.items()]
        if now.native_threads > self.native_threads + new_pollers:
            words.append(f"native threads: {self.native_threads} before, {now.native_threads} now")
        if (jobs := _jobs_threads()) > now.pollers:
            words.append(f"threads for handshakes: {jobs}, of {now.pollers} pollers")
        words += [f"thread: {thread}" for thread in now.python_threads - self.python_threads]
        return words


def _warm_up_uvloop() -> None:
    """Its first loop makes a pipe for signals, and its first name resolution worker threads."""
    try:
        import uvloop
    except ImportError:
        return
    with contextlib.closing(uvloop.new_event_loop()) as loop:
        loop.run_until_complete(loop.getaddrinfo("127.0.0.1", 0))


def start() -> None:
    """Starts once what then stays for the life of the process, so that it is in every snapshot."""
    if not anypoll.statistics().pollers:
        _runtime.pick_poller()
        _warm_up_uvloop()
        gc.collect()
    gc.freeze()  # or each collection would look again at pytest, all libraries and all reports


def leaks_since(before: Snapshot, *, within: float = 20) -> list[str]:
    """What the test has left behind. Returns at once when that is nothing; what only takes its
    time to go, such as blocks that a poller will recycle, gets it.
    """
    begin = time.monotonic()
    thawed = False
    while True:
        gc.collect()
        _runtime.nudge()
        words = before.grown()
        patience = time.monotonic() - begin
        if not words or patience > within:
            return words
        if patience > _THAW_AFTER and not thawed:
            gc.unfreeze()  # it may hang on a cycle that was frozen before it became garbage
            thawed = True
        time.sleep(0.001)
