"""The file of results: what --json writes, and what the charts and the tables are made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rounds import Rounds

FILE = Path(__file__).resolve().parent / "results.json"


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    """See machine.describe."""
    seconds: float
    warmup: float
    seed: int
    rounds: Rounds

    @classmethod
    def load(cls, text: str) -> Results:
        document = json.loads(text)
        rounds = Rounds.from_json(document.pop("cells"))
        return cls(**document, rounds=rounds)

    def dump(self) -> str:
        """A line for each cell: readable, and a difference shows which cells have changed."""
        head = json.dumps(
            {
                "machine": self.machine,
                "seconds": self.seconds,
                "warmup": self.warmup,
                "seed": self.seed,
            },
            indent=1,
        )
        cells = ",\n".join(f"  {json.dumps(cell)}" for cell in self.rounds.to_json())
        return f'{head[:-2]},\n "cells": [\n{cells}\n ]\n}}\n'
