"""The benchmark report: medians, ratios and goals of many measurements, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from cells import WORKLOADS, IdleUse, Result

# Where a measurement belongs: (workload, server, loop); its results in the order of the rounds.
Key = tuple[str, str, str]
Rounds = Mapping[Key, Sequence[Result | None]]

ANCHOR = ("protocol", "uvloop")


@dataclass(frozen=True)
class Goal:
    workload: str
    ratio: float


GOALS = (Goal("rpc100", 3.0), Goal("pipe", 10.0))


def ratio(rounds: Rounds, key: Key, baseline: Key) -> float | None:
    """The median of each round's ratio: neighbours in time share what disturbed the machine."""
    pairs = zip(rounds.get(key, ()), rounds.get(baseline, ()), strict=False)
    ratios = [ours.rps / theirs.rps for ours, theirs in pairs if ours and theirs]
    return median(ratios) if ratios else None


def format_tables(rounds: Rounds, *, threads: bool) -> str:
    blocks = []
    for workload in dict.fromkeys(key[0] for key in rounds):
        keys = [key for key in rounds if key[0] == workload and any(rounds[key])]
        blocks.append(f"{workload}: {WORKLOADS[workload].describe()}")
        blocks.append(_format_requests(rounds, keys))
        if WORKLOADS[workload].idle:
            blocks.append(_format_idle(rounds, keys))
        if threads:
            blocks.append(_format_threads(rounds, keys))
    return "\n\n".join(blocks)


def format_goals(rounds: Rounds) -> tuple[str, bool]:
    """One line per goal, and whether all that were measured are met."""
    lines, all_met = [], True
    for goal in GOALS:
        for workload, server, loop in rounds:
            if (workload, server) != (goal.workload, "anypoll"):
                continue
            reached = ratio(rounds, (workload, server, loop), (workload, "anyio", loop))
            met = reached is not None and reached >= goal.ratio
            all_met = all_met and (met or reached is None)
            verdict = "not measured" if reached is None else "met" if met else "MISSED"
            lines.append(
                f"goal: {goal.workload} on {loop} >= {goal.ratio:g}x AnyIO: "
                f"{_times(reached)} {verdict}"
            )
    return "\n".join(lines), all_met


def _format_requests(rounds: Rounds, keys: Sequence[Key]) -> str:
    times = ("p50 us", "p99 us", "max us", "cpu us/req", "load cpu")
    header = ("server", "loop", "req/s", "spread", *times, "x AnyIO", "x uvloop Protocol")
    rows = []
    for key in keys:
        workload, server, loop = key
        results = _present(rounds[key])
        middle = _median_of(results)
        rates = [result.rps for result in results]
        rows.append(
            (
                server,
                loop,
                f"{median(rates):,.0f}",
                f"{100 * (max(rates) - min(rates)) / median(rates):.0f}%",
                f"{middle(lambda result: result.p50_us):,.0f}",
                f"{middle(lambda result: result.p99_us):,.0f}",
                f"{middle(lambda result: result.max_us):,.0f}",
                f"{middle(lambda result: result.cpu_us):.2f}",
                f"{middle(lambda result: result.load_percent):.0f}%",
                _times(ratio(rounds, key, (workload, "anyio", loop))),
                _times(ratio(rounds, key, (workload, *ANCHOR))),
            )
        )
    return _format_table(header, rows)


def _format_idle(rounds: Rounds, keys: Sequence[Key]) -> str:
    rows = []
    for key in keys:
        uses = [result.idle for result in _present(rounds[key]) if result.idle]
        middle = _median_of(uses)
        rows.append(
            (
                *key[1:],
                f"{middle(lambda use: use.kib_per_connection):.1f}",
                f"{middle(lambda use: use.wakeups_per_second):.1f}",
                f"{middle(lambda use: use.cpu_percent):.1f}%",
            )
        )
    return _format_table(("server", "loop", "KiB/connection", "wake-ups/s", "idle cpu"), rows)


def _format_threads(rounds: Rounds, keys: Sequence[Key]) -> str:
    rows = []
    for key in keys:
        results = _present(rounds[key])
        for name in dict.fromkeys(name for result in results for name in result.threads):
            used = [result.threads.get(name, (0.0, 0.0)) for result in results]
            user, system = median(u for u, _ in used), median(s for _, s in used)
            times = [f"{value:.2f}" for value in (user + system, user, system)]
            if times[0] != "0.00":
                rows.append((*key[1:], name, *times))
    return _format_table(("server", "loop", "thread", "us/req", "user", "system"), rows)


def _median_of(items: Sequence[Result] | Sequence[IdleUse]) -> Callable[..., float]:
    return lambda field: median(field(item) for item in items)


def _present(results: Iterable[Result | None]) -> list[Result]:
    return [result for result in results if result]


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    words = sum(1 for name in header if name in ("server", "loop", "thread"))
    lines = []
    for row in (header, *rows):
        cells = [
            text.ljust(width) if column < words else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
