"""The committed ratios: what a figure was, as a multiple of another server's in the same run.

A ratio does not depend on the machine as a figure does, so it can be held elsewhere. It is held
while it is not worse than the committed one by more than a fifth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rounds import FIGURES, Key, Rounds

FILE = Path(__file__).resolve().parent / "ratios.json"
TOLERANCE = 0.8


@dataclass(frozen=True)
class Ratio:
    key: Key
    figure: str
    reference: Key
    committed: float

    @property
    def limit(self) -> float:
        """The worst that is still held."""
        if FIGURES[self.figure].more_is_better:
            return self.committed * TOLERANCE
        return self.committed / TOLERANCE

    def measured(self, rounds: Rounds) -> float | None:
        return rounds.ratio(self.key, self.reference, self.figure)

    def is_held(self, measured: float) -> bool:
        if FIGURES[self.figure].more_is_better:
            return measured >= self.limit
        return measured <= self.limit


def load(text: str) -> list[Ratio]:
    ratios = []
    for entry in json.loads(text):
        key = Key(*entry["cell"])
        server, loop = entry["to"]
        reference = Key(key.workload, server, loop)
        ratios.append(Ratio(key, entry["figure"], reference, entry["ratio"]))
    return ratios


def dump(ratios: Iterable[Ratio]) -> str:
    entries = [
        {
            "cell": list(ratio.key),
            "figure": ratio.figure,
            "to": list(ratio.reference[1:]),
            "ratio": round(ratio.committed, 3),
        }
        for ratio in ratios
    ]
    return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in entries) + "\n]\n"


def refresh(ratios: Iterable[Ratio], rounds: Rounds) -> list[Ratio]:
    """The same with what was measured; those that were not keep what they have."""
    fresh = []
    for ratio in ratios:
        measured = ratio.measured(rounds)
        fresh.append(ratio if measured is None else replace(ratio, committed=measured))
    return fresh


def needed(ratios: Iterable[Ratio]) -> set[Key]:
    return {key for ratio in ratios for key in (ratio.key, ratio.reference)}


def missed(ratios: Iterable[Ratio], rounds: Rounds) -> list[Ratio]:
    """Those that were measured and are not held."""
    found = []
    for ratio in ratios:
        measured = ratio.measured(rounds)
        if measured is not None and not ratio.is_held(measured):
            found.append(ratio)
    return found


def table(ratios: Iterable[Ratio], rounds: Rounds) -> list[tuple[str, ...]]:
    """What is held and what is not, below a header."""
    rows: list[tuple[str, ...]] = [
        ("workload", "server", "loop", "figure", "to", "committed", "limit", "now", "")
    ]
    for ratio in ratios:
        measured = ratio.measured(rounds)
        sign = ">=" if FIGURES[ratio.figure].more_is_better else "<="
        rows.append(
            (
                *ratio.key,
                FIGURES[ratio.figure].label,
                " ".join(ratio.reference[1:]),
                f"{ratio.committed:.2f}",
                f"{sign} {ratio.limit:.2f}",
                "" if measured is None else f"{measured:.2f}",
                "not measured"
                if measured is None
                else "held"
                if ratio.is_held(measured)
                else "MISSED",
            )
        )
    return rows
