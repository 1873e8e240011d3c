"""What the benchmark clients share: one connection, one request at a time, each answer verified.

They connect to the C server, and print one line of JSON with what the client itself has used: the
CPU clocks of its process and of its loop's thread, and the time of each round trip.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

from _launch import HEADER_SIZE, loop_parser

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Meter:
    """Makes the requests, verifies the answers and takes the times.

    Use: ``while meter.is_running: meter.end(answer to meter.begin())``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.is_running = True
        self.frame_size = HEADER_SIZE + options.size
        self._options = options
        self._header = options.size.to_bytes(HEADER_SIZE, "big")
        self._sequence = 0
        self._request = b""
        self._started = 0
        self._measure_at = time.perf_counter_ns() + int(options.warmup * 1e9)
        self._latencies: list[int] | None = None

    def begin(self) -> bytes:
        """The next request."""
        self._sequence += 1
        stamp = self._sequence.to_bytes(8, "big")
        self._request = (self._header + stamp * (self._options.size // 8 + 1))[: self.frame_size]
        self._started = time.perf_counter_ns()
        return self._request

    def end(self, answer: bytes | memoryview) -> None:
        now = time.perf_counter_ns()
        if answer != self._request:
            raise RuntimeError(f"request {self._sequence}: the answer differs")
        if self._latencies is None:
            if now >= self._measure_at:
                self._begin_measuring()
        else:
            self._latencies.append(now - self._started)
            self.is_running = now < self._end_at

    def _begin_measuring(self) -> None:
        self._latencies = []
        self._end_at = time.perf_counter_ns() + int(self._options.seconds * 1e9)
        self._clocks = time.perf_counter_ns(), time.process_time_ns(), time.thread_time_ns()

    def report(self) -> str:
        """Call it as soon as the last answer is there, in the thread of the loop."""
        clocks = time.perf_counter_ns(), time.process_time_ns(), time.thread_time_ns()
        elapsed, cpu, of_loop = (now - then for now, then in zip(clocks, self._clocks, strict=True))
        assert self._latencies is not None
        latencies, count = sorted(self._latencies), len(self._latencies)
        figures = {
            "rps": count * 1e9 / elapsed,
            "p50_us": latencies[count // 2] / 1e3,
            "p99_us": latencies[count * 99 // 100] / 1e3,
            "max_us": latencies[-1] / 1e3,
            "cpu_us": cpu / 1e3 / count,
            "loop_us": of_loop / 1e3 / count,
        }
        return json.dumps(figures)


async def measure(
    options: argparse.Namespace, call: Callable[[bytes], Awaitable[bytes | memoryview]]
) -> None:
    """Print what a client is like whose request is ``await call(frame)``."""
    meter = Meter(options)
    while meter.is_running:
        meter.end(await call(meter.begin()))
    print(meter.report(), flush=True)


def client_parser() -> argparse.ArgumentParser:
    parser = loop_parser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--size", type=int, default=64, help="bytes after the header")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--warmup", type=float, default=0.3)
    return parser
