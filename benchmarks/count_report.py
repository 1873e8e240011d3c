"""The report of counted instructions: tables of text, and the file that --json writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from catalog import LOOPS, WORKLOADS
from counting import Count
from report import align, earlier
from rounds import NO_LOOP, Key

Counts = Mapping[Key, Count]


def format_counts(counts: Counts, *, before: str = "") -> str:
    """Instructions per request, for each workload a table of servers and loops.

    :param before: the suffix of the servers of another checkout, which ours are compared with
    """
    blocks = []
    for workload in dict.fromkeys(key.workload for key in counts):
        blocks.append(f"{workload}: {WORKLOADS[workload].describe()}")
        blocks.append(_table(counts, workload, before))
    return "\n\n".join(blocks)


def _table(counts: Counts, workload: str, before: str) -> str:
    keys = [key for key in counts if key.workload == workload]
    loops = [loop for loop in (*LOOPS, NO_LOOP) if any(key.loop == loop for key in keys)]
    ratios = {key: ratio for key in keys if (ratio := _ratio(counts, key, before)) is not None}
    compared = [loop for loop in loops if any(key.loop == loop for key in ratios)]
    rows = [["server", *loops, *(f"{loop} x {before}" for loop in compared)]]
    for server in dict.fromkeys(key.server for key in keys):
        row = {key.loop: key for key in keys if key.server == server}
        figures = [_figure(counts[row[loop]]) if loop in row else "" for loop in loops]
        found = [ratios.get(row[loop]) if loop in row else None for loop in compared]
        figures += ["" if ratio is None else f"{ratio:.3f}" for ratio in found]
        rows.append([server, *figures])
    return align(rows, words=1)


def _figure(count: Count) -> str:
    return f"{'' if count.is_certain else '~'}{count.per_request:,.0f}"


def _ratio(counts: Counts, key: Key, before: str) -> float | None:
    if not before or key.server.endswith(f"@{before}"):
        return None
    reference = counts.get(earlier(counts, key, before))
    return counts[key].per_request / reference.per_request if reference else None


def format_functions(counts: Counts, number: int) -> str:
    """The hottest functions of each cell, by instructions per request that are their own."""
    blocks = []
    for key, count in counts.items():
        blocks.append(f"{key}: {count.per_request:,.0f} instructions a request")
        rows = [["function", "of", "instructions", "share"]]
        for function, own in count.hottest()[:number]:
            share = f"{100 * own / count.per_request:.1f}%"
            rows.append([function.name, function.file, f"{own:,.0f}", share])
        blocks.append(align(rows, words=2))
    return "\n\n".join(blocks)


def dump(machine: Mapping[str, Any], counts: Counts) -> str:
    """A line for each cell, with each function that takes at least one instruction a request."""
    head = json.dumps({"machine": machine}, indent=1)
    cells = ",\n".join(f"  {json.dumps(_cell(key, count))}" for key, count in counts.items())
    return f'{head[:-2]},\n "cells": [\n{cells}\n ]\n}}\n'


def _cell(key: Key, count: Count) -> dict[str, Any]:
    return {
        **key._asdict(),
        "requests": count.requests,
        "instructions": round(count.per_request, 1),
        "parts": [part.instructions for part in count.parts],
        "functions": [
            {**function._asdict(), "instructions": round(own, 1)}
            for function, own in count.hottest()
            if own >= 1
        ],
    }
