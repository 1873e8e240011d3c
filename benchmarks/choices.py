"""What a command line chooses of the catalogue, and another checkout to compare with."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from catalog import GROUPS, LOOPS, PEERS, VARIANTS, WORKLOADS, Cell, Peer, find_cells, find_peer
from machine import commit, probe

DEFAULT_WORKLOADS = "rpc1,rpc100,pipe,echo100"
ALL = "all"


def choice_parser(
    description: str, servers: str, workloads: Collection[str] = tuple(WORKLOADS)
) -> argparse.ArgumentParser:
    """:param servers: what is measured if nothing is said, and the workload does not say it either
    :param workloads: those that there are
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"workloads: {', '.join(workloads)}; {', '.join(GROUPS)} for all of that kind. "
        f"servers: {', '.join(PEERS)}; one of anypoll may have settings: "
        "anypoll/pollers=2+block_size=4096. Each of these may be 'all'.",
    )
    parser.add_argument("--workloads", type=_names(workloads), default=DEFAULT_WORKLOADS)
    parser.add_argument("--servers", type=_peers)
    parser.set_defaults(default_servers=_peers(servers))
    parser.add_argument("--loops", type=_names(LOOPS), default=LOOPS)
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="another checkout with its own .venv, whose anypoll is measured in the same run",
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """``before`` is the name of the other checkout, or empty."""
    options = parser.parse_args()
    options.before = ""
    if options.against:
        options.before = commit(options.against)
        try:
            probe(_interpreter(options.against))
        except (OSError, subprocess.CalledProcessError) as error:
            parser.error(f"--against: {error}")
    return options


def choose_cells(options: argparse.Namespace) -> list[Cell]:
    cells: list[Cell] = []
    for name in options.workloads:
        own = [find_peer(server) for server in WORKLOADS[name].servers]
        chosen: list[Peer] = []
        for peer in options.servers or own or options.default_servers:
            chosen.append(peer)
            if options.against and peer.is_ours:
                other = f"{peer.name}@{options.before}"
                chosen.append(replace(peer, name=other, python=_interpreter(options.against)))
        cells += find_cells([name], chosen, options.loops)
    return cells


def _interpreter(checkout: Path) -> str:
    return str(checkout.resolve() / ".venv" / "bin" / "python")


def _names(known: Collection[str]) -> Any:
    def parse_names(text: str) -> tuple[str, ...]:
        if text == ALL:
            return tuple(known)
        names: list[str] = []
        for given in text.split(","):
            meant = [name for name in GROUPS.get(given, (given,)) if name in known]
            if not meant:
                raise argparse.ArgumentTypeError(f"{given!r} is none of {', '.join(known)}")
            names += meant
        return tuple(dict.fromkeys(names))

    return parse_names


def _peers(text: str) -> list[Peer]:
    given = [*PEERS, *VARIANTS] if text == ALL else text.split(",")
    try:
        return [find_peer(name) for name in given]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
