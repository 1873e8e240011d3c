"""The benchmark command: measures anypoll and its peers, interleaved, and prints a report.

    python benchmarks/run.py
    python benchmarks/run.py --workloads rpc100,pipe --servers anypoll,anyio --loops trio --threads
    python benchmarks/run.py --servers anypoll,anypoll/pollers=2 --against ../before
    python benchmarks/run.py --workloads tls

See README.md in this folder for what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from pathlib import Path
from typing import Any

from cells import build
from choices import choice_parser, choose_cells, parse
from goals import evaluate
from machine import describe, format_machine
from report import format_tables, format_threads
from results import Results
from runner import Outcome, Plan, announce, drop_unavailable, prepare_process, run

DEFAULT_SERVERS = "anypoll,anyio,protocol,epoll"


def main() -> int:
    options = parse_arguments()
    prepare_process()
    build(options.workloads)
    cells = drop_unavailable(choose_cells(options))
    plan = Plan(cells, options.rounds, options.seconds, options.warmup, options.seed)
    machine = describe()
    print(format_machine(machine), file=sys.stderr)
    announce(plan)

    def save(outcome: Outcome) -> None:
        if options.json:
            done = Results(machine, plan.seconds, plan.warmup, plan.seed, outcome.rounds())
            options.json.write_text(done.dump(), "utf-8")

    outcome = run(plan, save)
    save(outcome)
    return report(options, machine, outcome)


def report(options: argparse.Namespace, machine: dict[str, Any], outcome: Outcome) -> int:
    rounds = outcome.rounds()
    print(f"\n{format_machine(machine)}\n\n{format_tables(rounds, before=options.before)}")
    if options.threads:
        print(f"\n{format_threads(outcome.results)}")
    verdicts = evaluate(rounds)
    print("", *verdicts, sep="\n")
    for failure in outcome.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if outcome.interrupted:
        return 128 + signal.SIGINT
    missed = options.check and not all(verdict.is_met for verdict in verdicts)
    return 1 if outcome.failures or missed else 0


def parse_arguments() -> argparse.Namespace:
    parser = choice_parser(__doc__.partition("\n")[0], DEFAULT_SERVERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="measured, per cell")
    parser.add_argument("--warmup", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--threads", action="store_true", help="CPU time per thread of the server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single result")
    parser.add_argument("--check", action="store_true", help="a missed goal is an error")
    return parse(parser)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
