"""The benchmark report: the medians and ratios of many measurements as tables of text."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from statistics import median

from catalog import WORKLOADS
from cells import Result
from goals import AIOFASTNET, ANYIO, PROTOCOL, reference_of
from rounds import Key, Rounds, format_figure

Column = tuple[str, Callable[[Key], str]]


def format_tables(rounds: Rounds, *, before: str = "") -> str:
    """``before`` is the suffix of the servers of another checkout, which ours are compared with."""
    blocks = []
    for workload in rounds.workloads():
        keys = rounds.keys(workload)
        blocks.append(f"{workload}: {WORKLOADS[workload].describe()}")
        blocks.append(_format(keys, _request_columns(rounds, keys, before)))
        if WORKLOADS[workload].idle:
            blocks.append(_format(keys, _idle_columns(rounds)))
    return "\n\n".join(blocks)


def format_threads(results: Mapping[Key, Sequence[Result | None]]) -> str:
    rows = [["workload", "server", "loop", "thread", "us/req", "user", "system"]]
    for key, rounds in results.items():
        found = [result.threads for result in rounds if result]
        for name in dict.fromkeys(name for threads in found for name in threads):
            used = [threads.get(name, (0.0, 0.0)) for threads in found]
            user, system = median(u for u, _ in used), median(s for _, s in used)
            times = [f"{value:.2f}" for value in (user + system, user, system)]
            if times[0] != "0.00":
                rows.append([*key, name, *times])
    return align(rows, words=4)


def earlier(known: Container[Key], key: Key, before: str) -> Key:
    """The same of the other checkout; without settings, if it does not know these."""
    same = key._replace(server=f"{key.server}@{before}")
    return same if same in known else key._replace(server=f"{key.base}@{before}")


def _request_columns(rounds: Rounds, keys: Sequence[Key], before: str) -> list[Column]:
    columns: list[Column] = [
        ("req/s", _median(rounds, "rps")),
        ("spread", _spread(rounds, "rps")),
        ("p50 us", _median(rounds, "p50_us")),
        ("p99 us", _median(rounds, "p99_us")),
        ("max us", _median(rounds, "max_us")),
        ("cpu us/req", _median(rounds, "cpu_us")),
        ("spread", _spread(rounds, "cpu_us")),
        ("of loop", _median(rounds, "loop_us")),
        ("load cpu", _median(rounds, "load_percent")),
        ("stall ms", _median(rounds, "stall_ms")),
        *_ratios(rounds, "Protocol", lambda key: reference_of(key, PROTOCOL)),
        *_ratios(rounds, "AnyIO", lambda key: reference_of(key, ANYIO)),
    ]
    if all(WORKLOADS[key.workload].is_tls for key in keys):
        columns += _ratios(rounds, "aiofastnet", lambda key: reference_of(key, AIOFASTNET))
    if before:
        columns += _ratios(rounds, before, lambda key: earlier(rounds.cells, key, before))
    return [column for column in columns if any(column[1](key) for key in keys)]


def _idle_columns(rounds: Rounds) -> list[Column]:
    return [
        ("KiB/connection", _median(rounds, "kib")),
        ("wake-ups/s", _median(rounds, "wakeups")),
        ("idle cpu %", _median(rounds, "idle_percent")),
    ]


def _median(rounds: Rounds, figure: str) -> Callable[[Key], str]:
    return lambda key: format_figure(figure, rounds.median(key, figure))


def _spread(rounds: Rounds, figure: str) -> Callable[[Key], str]:
    def text(key: Key) -> str:
        value = rounds.spread(key, figure)
        return "" if value is None else f"{100 * value:.0f}%"

    return text


def _ratios(rounds: Rounds, name: str, reference: Callable[[Key], Key]) -> list[Column]:
    def ratio_of(figure: str) -> Callable[[Key], str]:
        def text(key: Key) -> str:
            value = rounds.ratio(key, reference(key), figure)
            return "" if value is None else f"{value:.2f}"

        return text

    return [(f"req/s x {name}", ratio_of("rps")), (f"cpu x {name}", ratio_of("cpu_us"))]


def _format(keys: Sequence[Key], columns: Sequence[Column]) -> str:
    rows = [["server", "loop", *(title for title, _ in columns)]]
    rows += [[key.server, key.loop, *(text(key) for _, text in columns)] for key in keys]
    return align(rows, words=2)


def align(rows: Sequence[Sequence[str]], words: int) -> str:
    """The first ``words`` columns to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if column < words else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
