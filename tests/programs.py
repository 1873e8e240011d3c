"""A runner for subprocesses: one that does not end dumps its stacks.

A hang that shows up once in a thousand runs must explain itself, for nobody will see it again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

#: How long a program may take to end, in seconds. For hangs, not for slow machines; less than what
#: pytest gives the test (pyproject.toml), so that there is time for the post-mortem.
PATIENCE = 240
_PATIENCE_WITH_TOOLS = 30

Process = subprocess.Popen[str]

LOOPS = ["asyncio", "uvloop", "trio"]
#: The beginning of a program that is given the name of one of these.
ON_LOOP = """
import sys
import anyio

def run(function, *args):
    options = {}
    if sys.argv[1] == "uvloop":
        import uvloop
        options["loop_factory"] = uvloop.new_event_loop
    backend = "trio" if sys.argv[1] == "trio" else "asyncio"
    return anyio.run(function, *args, backend=backend, backend_options=options)
"""


def run_to_end(
    command: Sequence[str | os.PathLike[str]], *, fed: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Like ``subprocess.run()``, with both outputs as text. The exit status is the caller's to look
    at.

    :param fed: what it reads from stdin
    """
    process = subprocess.Popen(
        command,
        stdin=None if fed is None else subprocess.PIPE,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )
    out, err = output_at_end(process, fed=fed)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def output_at_end(
    process: subprocess.Popen[str], *, fed: str | None = None, patience: float = PATIENCE
) -> tuple[str, str]:
    """Like ``communicate()``; fails the test if the program does not end, with the stacks of all
    its threads and of those of its children.
    """
    try:
        return process.communicate(fed, timeout=patience)
    except subprocess.TimeoutExpired:
        _fail(process, patience)
    except BaseException:
        process.kill()
        process.wait()
        raise


def python(code: str, loop: str = "") -> str:
    """What a program in Python prints; it must end well and say nothing else.

    :param loop: what its `run()` runs functions on
    """
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    code = ON_LOOP + code if loop else textwrap.dedent(code)
    done = run_to_end([sys.executable, "-W", "error", "-c", code, loop])
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


@contextlib.contextmanager
def running(
    command: Sequence[str], cwd: Path | None = None, fds: Sequence[int] = ()
) -> Iterator[tuple[Process, str]]:
    """The command and where it listens; it is killed at the end if it still runs."""
    with subprocess.Popen(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=fds
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on "), process.communicate()
            yield process, line.removeprefix("listening on ").rstrip("\n")
        finally:
            process.kill()


def stop(process: Process, signum: signal.Signals = signal.SIGTERM) -> None:
    """A stop that nobody complains about."""
    process.send_signal(signum)
    assert output_at_end(process) == ("", "")
    assert process.returncode == 0


def _fail(process: subprocess.Popen[str], patience: float) -> NoReturn:
    family = _family(process.pid)
    stacks = [f"--- process {pid}\n{_native_stacks(pid)}" for pid in family]
    # Python's stacks: conftest.py has faulthandler write them to stderr at this signal. One process
    # after another, children first, or what they write is mixed up.
    for pid in reversed(family):
        _kill(pid, signal.SIGABRT)
        _wait_for_end(pid)
    try:
        out, err = process.communicate(timeout=_PATIENCE_WITH_TOOLS)
    except subprocess.TimeoutExpired:
        for pid in family:
            _kill(pid, signal.SIGKILL)
        out, err = process.communicate()
    said = [f"--- stdout\n{out}", f"--- stderr\n{err or ''}"]
    pytest.fail(
        "\n".join([f"{process.args} has not ended in {patience} s", *stacks, *said]), pytrace=False
    )


def _family(pid: int) -> list[int]:
    """The process, its children, and theirs."""
    found = [pid]
    with contextlib.suppress(OSError):  # it has ended
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in file.read_text().split():
                found += _family(int(child))
    return found


def _kill(pid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def _wait_for_end(pid: int) -> None:
    """For a moment: it may write to a pipe that is full, and nobody reads yet."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                time.sleep(0.01)
                continue
        return


def _native_stacks(pid: int) -> str:
    return (_by_gdb(pid) if shutil.which("gdb") else "") or _by_kernel(pid)


def _by_gdb(pid: int) -> str:
    """Empty if it may not attach, or cannot."""
    command = ["gdb", "-nx", "-batch", "-iex", "set debuginfod enabled off", "-p", str(pid)]
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        done = subprocess.run(
            [*command, "-ex", "thread apply all bt 30"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=env,
            timeout=_PATIENCE_WITH_TOOLS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout[start:] if (start := done.stdout.find("\nThread ")) >= 0 else ""


def _by_kernel(pid: int) -> str:
    """What each thread waits for, as far as the kernel tells."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        told = [f"{name}: {_read(task / name)}" for name in ("comm", "wchan", "syscall", "stack")]
        states = [line for line in _read(task / "status").splitlines() if line.startswith("State")]
        lines.append(f"thread {task.name}: " + ", ".join([*told, *states]))
    return "\n".join(lines)


def _read(file: Path) -> str:
    try:
        return file.read_text().rstrip()
    except OSError as exc:
        return f"({exc.strerror})"
