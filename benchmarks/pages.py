"""The tables of docs/performance.md, made from committed results.

In the page a table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; the text around it
is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from catalog import LOOPS
from goals import GOALS
from machine import format_machine
from results import Results
from rounds import NO_LOOP, Key, Rounds, format_figure

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"

LABELS = {
    "anypoll": "anypoll",
    "anypoll-streams": "anypoll, frames split by hand",
    "anypoll-buffered": "anypoll, `BufferedByteStream`",
    "anypoll-request": "anypoll, request mode",
    "anypoll/pollers=2": "anypoll, two pollers",
    "anypoll/driver=thread": 'anypoll, `driver="thread"`',
    "anyio": "AnyIO's streams",
    "trio": "Trio's `SocketStream`",
    "asyncio-streams": "asyncio's streams",
    "protocol": "`Protocol` (callbacks)",
    "aiofastnet": "aiofastnet, `Protocol`",
    "epoll": "C, bare epoll",
    "go": "Go's net",
}


@dataclass(frozen=True)
class Table:
    """Rows are servers, columns are loops; a cell has one figure, and others in parentheses."""

    workload: str
    figures: tuple[str, ...]

    def render(self, rounds: Rounds) -> str:
        keys = rounds.keys(self.workload)
        columns = [*LOOPS, NO_LOOP]
        if not any(key.loop == NO_LOOP for key in keys):
            columns.remove(NO_LOOP)
        servers = [name for name in LABELS if any(key.server == name for key in keys)]
        rows = [["", *("no loop" if loop == NO_LOOP else loop for loop in columns)]]
        for server in servers:
            cells = [self._cell(rounds, Key(self.workload, server, loop)) for loop in columns]
            rows.append([LABELS[server], *cells])
        return markdown(rows)

    def _cell(self, rounds: Rounds, key: Key) -> str:
        texts = [format_figure(name, rounds.median(key, name)) for name in self.figures]
        if not texts[0]:
            return ""
        return f"{texts[0]} ({', '.join(texts[1:])})" if texts[1:] else texts[0]


TABLES = {
    "rpc100": Table("rpc100", ("cpu_us", "rps")),
    "rpc1000": Table("rpc1000", ("cpu_us", "rps", "p99_us")),
    "rpc100_16k": Table("rpc100_16k", ("cpu_us", "rps")),
    "pipe": Table("pipe", ("cpu_us", "rps")),
    "echo100": Table("echo100", ("cpu_us", "rps")),
    "bulk": Table("bulk", ("cpu_us", "rps")),
    "rpc1": Table("rpc1", ("p50_us", "cpu_us")),
    "echo1": Table("echo1", ("p50_us", "cpu_us")),
    "trickle": Table("trickle", ("cpu_us", "p50_us")),
    "client": Table("client", ("p50_us", "cpu_us")),
    "connect": Table("connect", ("cpu_us", "rps")),
    "idle": Table("idle", ("kib",)),
    "busy100": Table("busy100", ("rps", "p50_us")),
    "tls1": Table("tls1", ("cpu_us", "p50_us")),
    "tls50": Table("tls50", ("cpu_us", "rps")),
    "tls50_16k": Table("tls50_16k", ("cpu_us", "rps")),
    "handshake": Table("handshake", ("cpu_us", "loop_us", "rps")),
    "handshake_resumed": Table("handshake_resumed", ("cpu_us", "loop_us", "rps")),
    "tls_stall": Table("tls_stall", ("stall_ms",)),
    "tls_idle": Table("tls_idle", ("kib",)),
}


def render_machine(results: Results) -> str:
    count = max(len(measured) for measured in results.rounds.cells.values())
    rounds = "one round" if count == 1 else f"{count} rounds"
    return f"{format_machine(results.machine)}; {rounds} of {results.seconds:g} s per cell."


def render_goals(results: Results) -> str:
    rows = [["goal", *LOOPS]]
    for goal in GOALS:
        reached = {verdict.key.loop: verdict for verdict in goal.evaluate(results.rounds)}
        if not reached:
            continue
        texts = []
        for loop in LOOPS:
            verdict = reached.get(loop)
            text = verdict.format_reached() if verdict else ""
            texts.append(f"**{text}**" if verdict and verdict.is_met else text)
        rows.append([f"{goal.workload} `{goal.server}`: {goal.format_bound()}", *texts])
    return markdown(rows)


RENDERERS: dict[str, Callable[[Results], str]] = {
    "machine": render_machine,
    "goals": render_goals,
}


def update(page: str, results: Results) -> str:
    """The page with its tables made anew."""

    def make(match: re.Match[str]) -> str:
        name = match[1]
        if name in RENDERERS:
            table = RENDERERS[name](results)
        else:
            table = TABLES[name].render(results.rounds)
        return f"<!-- table {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", make, page, flags=re.DOTALL)


def markdown(rows: list[list[str]]) -> str:
    header, *others = [
        "|" + "|".join(f" {text} " if text else " " for text in row) + "|" for row in rows
    ]
    rule = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    return "\n".join([header, rule, *others])
