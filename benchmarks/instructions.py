"""The benchmark command for instructions: how many a request takes, however busy the machine is.

    python benchmarks/instructions.py
    python benchmarks/instructions.py --workloads pipe --servers anypoll --loops trio --functions 20
    python benchmarks/instructions.py --servers anypoll --against ../before

See README.md in this folder for what is counted and how to read it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import callgrind
from catalog import WORKLOADS, Cell
from cells import build
from choices import choice_parser, choose_cells, parse
from count_report import dump, format_counts, format_functions
from counting import Count, count
from machine import describe, format_machine
from processes import CellError
from rounds import Key
from runner import drop_unavailable, format_duration, prepare_process

COUNTED = tuple(name for name, workload in WORKLOADS.items() if workload.counted)
DEFAULT_SERVERS = "anypoll,protocol"
_LABEL = 48  # columns


@dataclass
class Outcome:
    counts: dict[Key, Count] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    interrupted: bool = False


def main() -> int:
    options = parse_arguments()
    if not callgrind.is_installed():
        sys.exit("benchmarks: valgrind is needed (Debian: apt install valgrind)")
    prepare_process()
    build(options.workloads)
    # Which strings collide in a dict is a matter of chance otherwise, and costs instructions.
    os.environ.setdefault("PYTHONHASHSEED", "0")
    machine = describe() | {"valgrind": callgrind.version()}
    heading = f"{format_machine(machine)}; {machine['valgrind']}"
    _print(heading)
    cells = drop_unavailable(choose_cells(options))

    def save(outcome: Outcome) -> None:
        if options.json:
            options.json.write_text(dump(machine, outcome.counts), "utf-8")

    outcome = run(list(with_requests(cells, options.requests)), save)
    print(f"\n{heading}\n\n{format_counts(outcome.counts, before=options.before)}")
    if options.functions:
        print(f"\n{format_functions(outcome.counts, options.functions)}")
    for failure in outcome.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if outcome.interrupted:
        return 128 + signal.SIGINT
    return 1 if outcome.failures else 0


def run(cells: Sequence[Cell], after_cell: Callable[[Outcome], None]) -> Outcome:
    """Count; progress goes to standard error. Ctrl-C ends it, with what has been counted."""
    outcome, started = Outcome(), time.monotonic()
    try:
        for done, cell in enumerate(cells, 1):
            _print(f"{done:>{len(str(len(cells)))}}/{len(cells)} {cell.key}".ljust(_LABEL), end="")
            text = _take(cell, outcome)
            remaining = (time.monotonic() - started) / done * (len(cells) - done)
            _print(f"{text}   {format_duration(remaining)} left" if remaining else text)
            if (counted := outcome.counts.get(cell.key)) and counted.output:
                _print(counted.output)
            after_cell(outcome)
    except KeyboardInterrupt:
        outcome.interrupted = True
        _print("\ninterrupted")
    return outcome


def _take(cell: Cell, outcome: Outcome) -> str:
    """Add the cell; what to show of it."""
    try:
        counted = count(cell)
    except CellError as error:
        outcome.failures.append(f"{cell.key}: {error}")
        return "FAILED".rjust(10)
    outcome.counts[cell.key] = counted
    return f"{counted.per_request:10,.0f}"


def with_requests(cells: Iterable[Cell], requests: int | None) -> Iterable[Cell]:
    """The same cells with another number of requests, if one is given."""
    for cell in cells:
        workload = replace(cell.workload, counted=requests or cell.workload.counted)
        yield replace(cell, workload=workload)


def parse_arguments() -> argparse.Namespace:
    parser = choice_parser(__doc__.partition("\n")[0], DEFAULT_SERVERS, COUNTED)
    parser.add_argument(
        "--functions", type=int, default=0, metavar="N", help="the N hottest of each cell"
    )
    parser.add_argument(
        "--requests", type=int, metavar="N", help="counted in each cell, after as many to warm up"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was counted")
    return parse(parser)


def _print(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
