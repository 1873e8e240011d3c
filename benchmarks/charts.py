"""The charts of docs/performance.md and of the README: SVG files, made from committed results.

The same results give the same files, byte for byte, so a chart changes only when a figure does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Results
from rounds import NO_LOOP, Key, Rounds, format_figure

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "charts"

OURS, PYTHON, NATIVE = "#1f6feb", "#8c959f", "#d0d7de"

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "anypoll",  # else the IDs of elements are random
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "xtick.bottom": False,
    "xtick.labelbottom": False,
    "ytick.left": False,
}

CAPTIONS = {
    "rpc100": "100 connections, 64 B",
    "echo100": "the same without frames",
    "pipe": "16 requests under way on each of 100",
    "rpc100_16k": "100 connections, 16 KiB",
    "rpc1000": "1000 connections, 64 B",
    "rpc1": "a server with one client",
    "client": "a client in Python",
    "idle": "5000 silent connections",
}

# From the fastest that there can be to what people use: server, loop, name and colour of its bar.
BARS = (
    ("epoll", NO_LOOP, "C, bare epoll", NATIVE),
    ("go", NO_LOOP, "Go net", NATIVE),
    ("protocol", "uvloop", "Protocol, uvloop", PYTHON),
    ("aiofastnet", "uvloop", "aiofastnet Protocol, uvloop", PYTHON),
    ("anypoll", "uvloop", "anypoll, uvloop", OURS),
    ("anypoll", "asyncio", "anypoll, asyncio", OURS),
    ("anypoll", "trio", "anypoll, trio", OURS),
    ("asyncio-streams", "uvloop", "asyncio streams, uvloop", PYTHON),
    ("trio", "trio", "Trio SocketStream", PYTHON),
    ("anyio", "uvloop", "AnyIO, uvloop", PYTHON),
    ("anyio", "asyncio", "AnyIO, asyncio", PYTHON),
    ("anyio", "trio", "AnyIO, trio", PYTHON),
)


@dataclass(frozen=True)
class Chart:
    """A panel of bars for each workload, side by side in rows of two."""

    name: str
    title: str
    figure: str
    workloads: Sequence[str]


CHARTS = (
    Chart(
        "cpu",
        "CPU time per request, all threads, µs (less is better)",
        "cpu_us",
        ("rpc100", "echo100", "pipe", "rpc100_16k"),
    ),
    Chart(
        "throughput",
        "Requests per second with two cores for server and load (more is better)",
        "rps",
        ("rpc100", "echo100", "pipe", "rpc1000"),
    ),
    Chart("latency", "Round trip, median, µs (less is better)", "p50_us", ("rpc1", "client")),
    Chart("memory", "Memory per idle connection, KiB (less is better)", "kib", ("idle",)),
)


def draw_all(results: Results, folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for chart in CHARTS:
            figure = draw(chart, results.rounds)
            # Without these two the file would name the day and the version of matplotlib.
            metadata = {"Date": None, "Creator": None}
            figure.savefig(folder / f"{chart.name}.svg", format="svg", metadata=metadata)


def draw(chart: Chart, rounds: Rounds) -> Figure:
    columns = min(2, len(chart.workloads))
    lines = -(-len(chart.workloads) // columns)
    figure = Figure(figsize=(4.4 * columns, 0.5 + 2.9 * lines), layout="constrained")
    figure.suptitle(chart.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, workload in zip(panels, chart.workloads, strict=True):
        draw_bars(panel, workload, chart.figure, rounds)
    return figure


def draw_bars(panel: Axes, workload: str, figure: str, rounds: Rounds) -> None:
    """A bar to the median, with a line from the lowest to the highest round."""
    panel.set_title(f"{workload}: {CAPTIONS[workload]}")
    bars = [
        (label, colour, sorted(values))
        for server, loop, label, colour in BARS
        if (values := rounds.values(Key(workload, server, loop), figure))
    ]
    for label, colour, values in bars:
        middle = median(values)
        panel.barh(label, middle, color=colour, height=0.72)
        panel.hlines(label, values[0], values[-1], color="#24292f", linewidth=1)
        panel.annotate(
            f" {format_figure(figure, middle)}",
            (values[-1], label),
            va="center",
            fontsize=8,
        )
    panel.invert_yaxis()
    if bars:
        panel.set_xlim(0, 1.15 * max(values[-1] for _, _, values in bars))
