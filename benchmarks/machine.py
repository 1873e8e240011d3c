"""The machine and what is installed on it: what a report must name, and what can be run at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catalog import CERTIFICATE, LOAD_TLS

if TYPE_CHECKING:
    from catalog import Cell, Peer

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("anypoll", "anyio", "trio", "uvloop", "aiofastnet")

_PROBE = """
import importlib.metadata, inspect, json, platform, sys
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
options = []
if "anypoll" in versions:
    import anypoll
    options = list(inspect.signature(anypoll.configure).parameters)
print(json.dumps({"python": platform.python_version(), "packages": versions, "options": options}))
"""


@dataclass(frozen=True)
class Interpreter:
    python: str
    packages: dict[str, str]
    options: list[str]
    """What this anypoll's ``configure`` takes."""


@cache
def probe(python: str) -> Interpreter:
    """:raises OSError, subprocess.CalledProcessError: if there is no such interpreter"""
    command = [python, "-c", _PROBE, *PACKAGES]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Interpreter(**json.loads(text))


def reason_to_skip(cell: Cell) -> str | None:
    """Why a cell cannot be measured here, or None."""
    if cell.workload.is_tls and not LOAD_TLS.exists():
        return "TLS: OpenSSL's headers are needed (Debian: apt install libssl-dev)"
    if cell.workload.is_tls and not CERTIFICATE.exists():
        return "TLS: the package trustme is not installed"
    peer = cell.peer
    if peer.python is None:
        program = peer.programs[cell.workload.kind][0]
        return None if Path(program).exists() else f"{peer.name}: there is no compiler for it"
    installed = probe(peer.python)
    needed = ["anyio", *peer.packages, *(["anypoll"] if peer.is_ours else [])]
    if cell.key.loop != "asyncio":
        needed.append(cell.key.loop)
    for package in needed:
        if package not in installed.packages:
            return f"{peer.name}: the package {package} is not installed"
    return _unknown_setting(peer, installed)


def _unknown_setting(peer: Peer, installed: Interpreter) -> str | None:
    for setting in peer.settings:
        name = setting.partition("=")[0]
        if name not in installed.options:
            return f"{peer.name}: this anypoll has no option {name!r}"
    return None


def describe() -> dict[str, Any]:
    installed = probe(sys.executable)
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": installed.python,
        "packages": installed.packages,
        "go": _first_line("go", "version"),
        "commit": commit(ROOT),
    }


def format_machine(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    go = f", {machine['go']}" if machine["go"] else ""
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}; "
        f"CPython {machine['python']}, {packages}{go}; commit {machine['commit']}"
    )


def commit(folder: Path) -> str:
    """The short name of what is checked out there, with a + if it was changed since."""
    git = ("git", "-C", str(folder))
    name = _first_line(*git, "rev-parse", "--short", "HEAD")
    changed = _first_line(*git, "status", "--porcelain", "--untracked-files=no")
    return f"{name}+" if changed else name or "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.partition("\n")[0] if done.returncode == 0 else ""
