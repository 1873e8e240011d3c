"""The benchmark check: whether the committed ratios still hold, in one short run.

    python benchmarks/check.py

It runs only the cells that ratios.json names. Those of a ratio that is missed are measured again,
and all their rounds count.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from dataclasses import replace

from catalog import LOOPS, Cell, find_cells, find_peer
from cells import build
from machine import describe, format_machine
from ratios import FILE, Ratio, load, missed, needed, table
from report import align
from rounds import Key
from runner import Outcome, Plan, announce, drop_unavailable, prepare_process, run


def main() -> int:
    options = parse_arguments()
    prepare_process()
    ratios = load(FILE.read_text("utf-8"))
    keys = needed(ratios)
    build(key.workload for key in keys)
    cells = drop_unavailable(find(keys))
    plan = Plan(cells, options.rounds, options.seconds, warmup=0.3, seed=options.seed)
    print(format_machine(describe()), file=sys.stderr)
    announce(plan)
    outcome = run(plan)
    doubtful = needed(missed(ratios, outcome.rounds()))
    if doubtful and not outcome.interrupted:
        fewer = [cell for cell in cells if cell.key in doubtful]
        again = replace(plan, cells=fewer, seed=plan.seed + 1)
        print("\nonce more, for the ratios that are missed", file=sys.stderr)
        announce(again)
        outcome.extend(run(again))
    return report(ratios, outcome)


def report(ratios: list[Ratio], outcome: Outcome) -> int:
    rounds = outcome.rounds()
    print(f"\n{align(table(ratios, rounds), words=5)}")
    for failure in outcome.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if outcome.interrupted:
        return 128 + signal.SIGINT
    not_held = missed(ratios, rounds)
    print(f"\n{len(ratios) - len(not_held)} of {len(ratios)} ratios held or not measured")
    return 1 if outcome.failures or not_held else 0


def find(keys: set[Key]) -> list[Cell]:
    peers = [find_peer(name) for name in sorted({key.server for key in keys})]
    workloads = sorted({key.workload for key in keys})
    return [cell for cell in find_cells(workloads, peers, LOOPS) if cell.key in keys]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.8, help="measured, per cell")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
