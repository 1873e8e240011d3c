"""The benchmark command: measures anypoll and its peers, interleaved, and prints a report.

    python benchmarks/run.py
    python benchmarks/run.py --workloads rpc100,pipe --servers anypoll,anyio --loops trio --threads
    python benchmarks/run.py --servers anypoll,anypoll/pollers=2 --against ../before

See README.md in this folder for what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from catalog import LOOPS, PEERS, VARIANTS, WORKLOADS, Cell, Peer, find_cells, find_peer
from cells import build
from goals import evaluate
from machine import commit, describe, format_machine, probe
from report import format_tables, format_threads
from results import Results
from runner import Outcome, Plan, announce, drop_unavailable, prepare_process, run

DEFAULT_WORKLOADS = "rpc1,rpc100,pipe,echo100"
DEFAULT_SERVERS = "anypoll,anyio,protocol,epoll"
ALL = "all"


def main() -> int:
    options = parse_arguments()
    prepare_process()
    try:
        build()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks: a C compiler is needed (cc, or $CC): {error}", file=sys.stderr)
        return 1
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
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=f"workloads: {', '.join(WORKLOADS)}. servers: {', '.join(PEERS)}; one of anypoll "
        "may have settings: anypoll/pollers=2+block_size=4096. Each of these may be 'all'.",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="measured, per cell")
    parser.add_argument("--warmup", type=float, default=0.3)
    parser.add_argument("--workloads", type=names(WORKLOADS), default=DEFAULT_WORKLOADS)
    parser.add_argument("--servers", type=peers, default=DEFAULT_SERVERS)
    parser.add_argument("--loops", type=names(LOOPS), default=LOOPS)
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="another checkout with its own .venv, whose anypoll is measured in the same run",
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--threads", action="store_true", help="CPU time per thread of the server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single result")
    parser.add_argument("--check", action="store_true", help="a missed goal is an error")
    options = parser.parse_args()
    options.before = ""
    if options.against:
        options.before = commit(options.against)
        try:
            probe(interpreter(options.against))
        except (OSError, subprocess.CalledProcessError) as error:
            parser.error(f"--against: {error}")
    return options


def choose_cells(options: argparse.Namespace) -> list[Cell]:
    chosen: list[Peer] = []
    for peer in options.servers:
        chosen.append(peer)
        if options.against and peer.is_ours:
            name = f"{peer.name}@{options.before}"
            chosen.append(replace(peer, name=name, python=interpreter(options.against)))
    return list(find_cells(options.workloads, chosen, options.loops))


def interpreter(checkout: Path) -> str:
    return str(checkout.resolve() / ".venv" / "bin" / "python")


def names(known: dict[str, Any] | tuple[str, ...]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        given = tuple(known) if text == ALL else tuple(text.split(","))
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return given

    return parse


def peers(text: str) -> list[Peer]:
    given = [*PEERS, *VARIANTS] if text == ALL else text.split(",")
    try:
        return [find_peer(name) for name in given]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
