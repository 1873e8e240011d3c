"""Measurements and what is computed from them: medians, spreads, ratios; and their JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

NO_LOOP = "-"


class Key(NamedTuple):
    """One cell of the comparison."""

    workload: str
    server: str
    loop: str

    @property
    def base(self) -> str:
        """The server without its settings."""
        return self.server.partition("/")[0]

    def __str__(self) -> str:
        loop = "" if self.loop == NO_LOOP else f" on {self.loop}"
        return f"{self.workload} {self.server}{loop}"


@dataclass(frozen=True)
class Figure:
    label: str
    unit: str
    digits: int
    more_is_better: bool = False


FIGURES = {
    "rps": Figure("requests/s", "/s", 0, more_is_better=True),
    "p50_us": Figure("p50", "µs", 0),
    "p99_us": Figure("p99", "µs", 0),
    "max_us": Figure("max", "µs", 0),
    "cpu_us": Figure("CPU per request", "µs", 2),
    "loop_us": Figure("CPU per request, loop's thread", "µs", 2),
    "load_percent": Figure("load generator's CPU", "%", 0),
    "stall_ms": Figure("longest stall of the loop", "ms", 1),
    "kib": Figure("memory per connection", "KiB", 1),
    "wakeups": Figure("wake-ups while idle", "/s", 1),
    "idle_percent": Figure("CPU while idle", "%", 1),
}


def format_figure(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:,.{FIGURES[name].digits}f}"


Measurement = Mapping[str, float]
"""By the names of FIGURES; those that a cell does not have are missing."""


@dataclass(frozen=True)
class Rounds:
    """The measurements of each cell in the order of the rounds; None for one that failed."""

    cells: Mapping[Key, Sequence[Measurement | None]]

    def values(self, key: Key, figure: str) -> list[float]:
        return [m[figure] for m in self.cells.get(key, ()) if m is not None and figure in m]

    def median(self, key: Key, figure: str) -> float | None:
        values = self.values(key, figure)
        return median(values) if values else None

    def spread(self, key: Key, figure: str) -> float | None:
        """(highest - lowest) / median."""
        return spread(self.values(key, figure))

    def ratio(self, key: Key, reference: Key, figure: str) -> float | None:
        """The median of each round's ratio: what disturbs the machine disturbs a whole round."""
        pairs = zip(self.cells.get(key, ()), self.cells.get(reference, ()), strict=False)
        ratios = [
            ours[figure] / theirs[figure]
            for ours, theirs in pairs
            if ours and theirs and figure in ours and theirs.get(figure)
        ]
        return median(ratios) if ratios else None

    def workloads(self) -> list[str]:
        return list(dict.fromkeys(key.workload for key in self.cells))

    def keys(self, workload: str) -> list[Key]:
        """Of the cells with a result."""
        return [key for key, found in self.cells.items() if key.workload == workload and any(found)]

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {**key._asdict(), "figures": _columns(measurements)}
            for key, measurements in self.cells.items()
        ]

    @classmethod
    def from_json(cls, cells: Iterable[Mapping[str, Any]]) -> Rounds:
        return cls(
            {
                Key(cell["workload"], cell["server"], cell["loop"]): _rows(cell["figures"])
                for cell in cells
            }
        )


def spread(values: Sequence[float]) -> float | None:
    if not values:
        return None
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def _columns(measurements: Sequence[Measurement | None]) -> dict[str, list[float | None]]:
    """A list for each figure, which takes a third of the room of a dict for each round."""
    names = [name for name in FIGURES if any(m and name in m for m in measurements)]
    return {
        name: [_round(m.get(name) if m else None, FIGURES[name].digits) for m in measurements]
        for name in names
    }


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits + 1)


def _rows(columns: Mapping[str, Sequence[float | None]]) -> list[Measurement | None]:
    rows: list[Measurement | None] = []
    for values in zip(*columns.values(), strict=True):
        row = {name: v for name, v in zip(columns, values, strict=True) if v is not None}
        rows.append(row or None)
    return rows
