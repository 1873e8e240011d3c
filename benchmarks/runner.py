"""The runner: all cells of all rounds, interleaved in a random order, with a line for each."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from catalog import Cell
from cells import Result, measure
from machine import reason_to_skip
from processes import CellError
from rounds import Key, Rounds, format_figure

_OVERHEAD = 0.7  # seconds that it takes to start and end the programs of a cell
_LABEL = 48  # columns
_PROGRESS = {"rps": "req/s", "p50_us": "p50", "p99_us": "p99", "cpu_us": "cpu", "loop_us": "loop"}


@dataclass(frozen=True)
class Plan:
    cells: Sequence[Cell]
    rounds: int
    seconds: float
    warmup: float
    seed: int

    def duration(self) -> float:
        """About how many seconds it will take."""
        asked = self.seconds, self.warmup
        return self.rounds * sum(c.workload.duration(*asked) + _OVERHEAD for c in self.cells)


@dataclass
class Outcome:
    results: dict[Key, list[Result | None]]
    """By round; None for a cell that has failed."""
    failures: list[str] = field(default_factory=list)
    interrupted: bool = False

    def extend(self, other: Outcome) -> None:
        """More rounds of some of the cells."""
        for key, results in other.results.items():
            self.results[key] += results
        self.failures += other.failures
        self.interrupted = other.interrupted

    def rounds(self) -> Rounds:
        return Rounds(
            {
                key: [None if result is None else result.figures for result in results]
                for key, results in self.results.items()
            }
        )


def drop_unavailable(cells: Iterable[Cell]) -> list[Cell]:
    """Those that can be measured here; says why the others cannot."""
    kept, reasons = [], []
    for cell in cells:
        reason = reason_to_skip(cell)
        if reason is None:
            kept.append(cell)
        else:
            reasons.append(reason)
    for reason in dict.fromkeys(reasons):
        _print(f"skipped: {reason}")
    return kept


def announce(plan: Plan) -> None:
    _print(
        f"{len(plan.cells)} cells, {plan.rounds} rounds, seed {plan.seed}: about "
        f"{format_duration(plan.duration())}; load average {os.getloadavg()[0]:.1f}\n"
    )


def run(plan: Plan, after_round: Callable[[Outcome], None] = lambda _: None) -> Outcome:
    """Measure; progress goes to standard error. Ctrl-C ends it, with what has been measured."""
    outcome = Outcome({cell.key: [] for cell in plan.cells})
    order = random.Random(plan.seed)
    total, done, started = plan.rounds * len(plan.cells), 0, time.monotonic()
    _print(f"{'':<{_LABEL}}{_columns(_PROGRESS.values())}")
    try:
        for _ in range(plan.rounds):
            for cell in order.sample(plan.cells, len(plan.cells)):
                done += 1
                _print(f"{done:>{len(str(total))}}/{total} {cell.key}".ljust(_LABEL), end="")
                text = _take(cell, plan, outcome)
                remaining = (time.monotonic() - started) / done * (total - done)
                _print(f"{text}   {format_duration(remaining)} left" if remaining else text)
                _print_output(outcome, cell.key)
            after_round(outcome)
    except KeyboardInterrupt:
        outcome.interrupted = True
        _print("\ninterrupted")
    return outcome


def _take(cell: Cell, plan: Plan, outcome: Outcome) -> str:
    """Add the cell's next round; what to show of it."""
    result: Result | None = None
    try:
        result = measure(cell, seconds=plan.seconds, warmup=plan.warmup)
    except CellError as error:
        outcome.failures.append(f"{cell.key}: {error}")
    outcome.results[cell.key].append(result)
    if result is None:
        return _columns(["FAILED"])
    found = result.figures.get
    return _columns(format_figure(name, found(name)) for name in _PROGRESS)


def _print_output(outcome: Outcome, key: Key) -> None:
    result = outcome.results[key][-1]
    if result is not None and result.output:
        _print(result.output)


def _columns(texts: Iterable[str]) -> str:
    return "".join(text.rjust(10) for text in texts)


def _print(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def prepare_process() -> None:
    """Thousands of descriptors, and an end by SIGTERM that kills what is being measured."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)
