"""What a failure says of a program that does not end."""

from __future__ import annotations

import shutil
import subprocess
import sys

import programs
import pytest

HANGS = """
import os, threading
import anyio, anypoll

def stuck_in_a_child():
    os.write(1, b"child %d\\n" % os.getpid())
    threading.Event().wait()

def stuck_in_a_thread():
    os.write(2, b"said before\\n")
    os.write(1, b"thread\\n")
    threading.Event().wait()

async def main():
    anypoll.socketpair()

anyio.run(main)  # for the poller
if os.fork() == 0:
    stuck_in_a_child()
threading.Thread(target=stuck_in_a_thread).start()
os.wait()
"""


@pytest.mark.unsanitized
@pytest.mark.parametrize("tool", ["gdb", "kernel"])
def test_a_program_that_hangs_shows_its_stacks(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if tool == "kernel":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif not shutil.which("gdb"):
        pytest.skip("gdb is missing")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HANGS],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    lines = sorted(process.stdout.readline() for _ in range(2))
    with pytest.raises(pytest.fail.Exception) as caught:
        programs.output_at_end(process, patience=0)
    said = str(caught.value)
    child = int(lines[0].split()[1])
    for word in [f"process {process.pid}\n", f"process {child}\n", "said before"]:
        assert word in said
    for function in ["stuck_in_a_thread", "stuck_in_a_child"]:
        assert f"in {function}\n" in said
    assert process.returncode < 0
    if tool == "gdb" and "\nThread " not in said:
        pytest.skip("gdb may not attach here")
    assert said.count("\nThread" if tool == "gdb" else "\nthread") >= 4
    assert tool == "kernel" or "in epoll_wait (" in said
