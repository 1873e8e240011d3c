"""The goals: figures to reach, as bounds on a cell's figure or on its ratio to another cell's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rounds import FIGURES, Key, Rounds

LOOPS = ("asyncio", "uvloop", "trio")

PROTOCOL = ("protocol", "uvloop")
AIOFASTNET = ("aiofastnet", "uvloop")
ANYIO = ("anyio", "")
READER = ("anypoll", "")
"""The server and the loop of a reference; no loop: the same as that of the cell."""


def reference_of(key: Key, reference: tuple[str, str]) -> Key:
    server, loop = reference
    return Key(key.workload, server, loop or key.loop)


@dataclass(frozen=True)
class Goal:
    workload: str
    server: str
    figure: str
    bound: float
    reference: tuple[str, str] | None = None
    """What the bound is a multiple of; None: it is absolute."""
    loops: tuple[str, ...] = LOOPS

    def evaluate(self, rounds: Rounds) -> Iterator[Verdict]:
        """For each loop on which all that it needs was measured."""
        for loop in self.loops:
            key = Key(self.workload, self.server, loop)
            if self.reference is None:
                reached = rounds.median(key, self.figure)
            else:
                reached = rounds.ratio(key, reference_of(key, self.reference), self.figure)
            if reached is not None:
                yield Verdict(self, key, reached)

    def format_bound(self) -> str:
        figure = FIGURES[self.figure]
        sign = ">=" if figure.more_is_better else "<="
        if self.reference is None:
            return f"{figure.label} {sign} {self.bound:g} {figure.unit}"
        server, loop = self.reference
        return f"{figure.label} {sign} {self.bound:g}x {server}{f' on {loop}' if loop else ''}"


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    key: Key
    reached: float

    @property
    def is_met(self) -> bool:
        if FIGURES[self.goal.figure].more_is_better:
            return self.reached >= self.goal.bound
        return self.reached <= self.goal.bound

    def format_reached(self) -> str:
        return f"{self.reached:.2f}" + ("" if self.goal.reference is None else "x")

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        return f"goal: {self.key}: {self.goal.format_bound()}: {self.format_reached()} {verdict}"


GOALS = (
    Goal("rpc100", "anypoll", "cpu_us", 0.95, PROTOCOL),
    Goal("rpc100", "anypoll", "rps", 1.05, PROTOCOL),
    Goal("rpc100", "anypoll", "rps", 3.2, ANYIO),
    Goal("rpc100", "anypoll/pollers=2", "loop_us", 2.5),
    Goal("rpc1", "anypoll", "p50_us", 1.0, PROTOCOL),
    Goal("rpc1", "anypoll", "cpu_us", 1.1, PROTOCOL),
    Goal("rpc1", "anypoll-buffered", "p50_us", 1.0, ANYIO),
    Goal("rpc1", "anypoll-buffered", "cpu_us", 1.0, ANYIO),
    Goal("echo100", "anypoll", "cpu_us", 1.3, PROTOCOL),
    Goal("echo100", "anypoll", "rps", 2.5, ANYIO, ("asyncio", "uvloop")),
    Goal("echo100", "anypoll", "rps", 2.2, ANYIO, ("trio",)),
    Goal("pipe", "anypoll", "rps", 0.95, PROTOCOL),
    Goal("pipe", "anypoll", "rps", 20, ANYIO),
    Goal("rpc100_16k", "anypoll", "cpu_us", 1.1, PROTOCOL),
    Goal("bulk", "anypoll", "cpu_us", 1.4, PROTOCOL),
    Goal("bulk", "anypoll", "cpu_us", 0.9, ANYIO, ("trio",)),
    Goal("rpc1000", "anypoll", "p99_us", 1.2, PROTOCOL),
    Goal("idle", "anypoll", "kib", 5.0),
    Goal("idle", "anypoll-request", "kib", 1.5),
    Goal("connect", "anypoll", "cpu_us", 0.45, ANYIO),
    Goal("connect", "anypoll", "cpu_us", 1.9, PROTOCOL),
    Goal("trickle", "anypoll", "cpu_us", 1.2, PROTOCOL),
    Goal("busy100", "anypoll", "rps", 2.0, ANYIO),
    Goal("tls1", "anypoll", "cpu_us", 1.2, AIOFASTNET),
    Goal("tls1", "anypoll", "p50_us", 1.0, ANYIO),
    Goal("tls50", "anypoll", "cpu_us", 1.1, AIOFASTNET),
    Goal("tls50", "anypoll", "cpu_us", 0.6, ANYIO),
    Goal("tls50_16k", "anypoll", "cpu_us", 1.1, AIOFASTNET),
    Goal("tls1", "anypoll-streams", "cpu_us", 1.25, READER),
    Goal("tls1", "anypoll-streams", "cpu_us", 1.0, ANYIO),
    Goal("tls50", "anypoll-streams", "cpu_us", 1.25, READER),
    Goal("tls50", "anypoll-streams", "cpu_us", 1.0, ANYIO),
    Goal("tls50_16k", "anypoll-streams", "cpu_us", 1.25, READER),
    Goal("tls50_16k", "anypoll-streams", "cpu_us", 1.0, ANYIO),
    Goal("handshake", "anypoll", "cpu_us", 1.0, PROTOCOL),
    Goal("handshake", "anypoll/pollers=2", "loop_us", 30),
    Goal("handshake_resumed", "anypoll", "cpu_us", 1.0, PROTOCOL),
    Goal("handshake_resumed", "anypoll/pollers=2", "loop_us", 30),
    Goal("tls_stall", "anypoll", "stall_ms", 10),
    Goal("tls_stall", "anypoll/driver=thread", "stall_ms", 5),
    Goal("tls_idle", "anypoll", "kib", 0.7, ANYIO),
)


def evaluate(rounds: Rounds) -> list[Verdict]:
    return [verdict for goal in GOALS for verdict in goal.evaluate(rounds)]
