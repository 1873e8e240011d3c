"""The benchmark runner: measures anypoll and its peers, interleaved, and prints a report.

    python benchmarks/run.py
    python benchmarks/run.py --workloads rpc100 --servers anypoll,anyio --loops trio --threads

See README.md in this folder for what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cells import SERVERS, WORKLOADS, CellError, Result, build, measure
from report import Key, format_goals, format_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_WORKLOADS = ("rpc1", "rpc100", "pipe", "echo100")
LOOPS = ("asyncio", "uvloop", "trio")


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, _terminate)
    _raise_file_limit()
    try:
        build()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks: a C compiler is needed (cc, or $CC): {error}", file=sys.stderr)
        return 1
    rounds, failures = run_rounds(options)
    goals, goals_met = format_goals(rounds)
    print(f"\n{describe_machine()}\n\n{format_tables(rounds, threads=options.threads)}")
    print(f"\n{goals}" if goals else "")
    if options.json:
        write_json(options, rounds)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures or (options.check and not goals_met) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="measured, per cell")
    parser.add_argument("--warmup", type=float, default=0.3)
    parser.add_argument("--workloads", type=_names(WORKLOADS), default=DEFAULT_WORKLOADS)
    parser.add_argument("--servers", type=_names(SERVERS), default=tuple(SERVERS))
    parser.add_argument("--loops", type=_names(LOOPS), default=LOOPS)
    parser.add_argument("--threads", action="store_true", help="CPU time per thread of the server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single result")
    parser.add_argument("--check", action="store_true", help="a missed goal is an error")
    return parser.parse_args()


def run_rounds(options: argparse.Namespace) -> tuple[dict[Key, list[Result | None]], list[str]]:
    keys = list(_keys(options))
    rounds: dict[Key, list[Result | None]] = {key: [] for key in keys}
    failures = []
    for number in range(1, options.rounds + 1):
        for position, key in enumerate(keys, start=1):
            label = f"round {number}/{options.rounds}, {position}/{len(keys)}: {'/'.join(key)}"
            print(label, end=" ", file=sys.stderr, flush=True)
            try:
                result = _measure(key, options)
            except CellError as error:
                rounds[key].append(None)
                failures.append(f"{label}: {error}")
                print("FAILED", file=sys.stderr)
            else:
                rounds[key].append(result)
                print(f"{result.rps:,.0f}", file=sys.stderr)
                if result.server_output:
                    print(result.server_output, file=sys.stderr)
    return rounds, failures


def describe_machine() -> str:
    packages = " ".join(f"{name} {_version(name)}" for name in ("anyio", "trio", "uvloop"))
    load = os.getloadavg()[0]
    return (
        f"{platform.python_implementation()} {platform.python_version()}, {packages}, "
        f"Linux {platform.release()}, {os.cpu_count()} CPUs, load average {load:.1f}"
    )


def write_json(options: argparse.Namespace, rounds: dict[Key, list[Result | None]]) -> None:
    cells = [
        {
            "workload": workload,
            "server": server,
            "loop": loop,
            "rounds": [result and result.to_json() for result in results],
        }
        for (workload, server, loop), results in rounds.items()
    ]
    document: dict[str, Any] = {
        "machine": describe_machine(),
        "seconds": options.seconds,
        "warmup": options.warmup,
        "cells": cells,
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n")


def _measure(key: Key, options: argparse.Namespace) -> Result:
    workload, server, loop = key
    return measure(
        SERVERS[server],
        loop,
        WORKLOADS[workload],
        seconds=options.seconds,
        warmup=options.warmup,
    )


def _keys(options: argparse.Namespace) -> Iterator[Key]:
    """In the order of measuring: what is compared with each other stands side by side."""
    for workload in options.workloads:
        for loop in ("-", *options.loops):
            for server in options.servers:
                if loop in SERVERS[server].loops:
                    yield workload, server, loop


def _names(known: dict[str, Any] | tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(missing)"


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _terminate(*_: object) -> NoReturn:
    # As an exception, so that the processes under measurement are killed on the way out.
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
