"""Sessions and processes: children of a fork, and programs that end in the middle of handshakes."""

from __future__ import annotations

from pathlib import Path

import programs
import pytest

HERE = Path(__file__).resolve().parent.parent

#: What all these programs begin with; the first argument is the loop.
BEGINNING = f"""
sys.path.insert(0, {str(HERE)!r})
import os, signal, socket, ssl, threading
import anypoll
from anypoll._tls import openssl
from certificates import client_context, server_context

SERVER, CLIENT = server_context(), client_context()

async def echo(conn):
    while True:
        conn.writer.write(bytes(await conn.until(b"\\n")))

def serve(handler=echo):
    return anypoll.serve(handler, host="127.0.0.1", port=0, ssl_context=SERVER)

async def talk(server):
    async with await anypoll.connect_tcp(
        "127.0.0.1", server.port, ssl_context=CLIENT, tls_hostname="anypoll.test"
    ) as conn:
        await conn.send(b"hello\\n")
        assert await conn.until(b"\\n") == b"hello\\n"

async def storm(server, tasks):
    async def keep_talking():
        while True:
            await talk(server)

    for _ in range(8):
        tasks.start_soon(keep_talking)
    while server.statistics().tls_handshakes < 20:
        await anyio.sleep(0.001)
"""

FORKS = """
def child():
    async def main():
        async with serve() as server:
            for _ in range(3):
                await talk(server)

    run(main)

def fork():  # in a thread that has no loop
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)  # the parent's, about which Trio would complain
        try:
            child()
            os._exit(0)
        finally:
            os._exit(1)
    statuses.append(os.waitpid(pid, 0)[1])

async def main():
    async with serve() as server, anyio.create_task_group() as tasks:
        await storm(server, tasks)
        for _ in range(5):
            before = server.statistics().tls_handshakes
            thread = threading.Thread(target=fork)
            thread.start()
            while thread.is_alive():
                await anyio.sleep(0.001)
            while server.statistics().tls_handshakes < before + 3:
                await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()
    assert statuses == [0] * 5

statuses = []
import warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
run(main)
"""

ENDS = {
    "cancelled": """
async def main():
    async with serve() as server, anyio.create_task_group() as tasks:
        await storm(server, tasks)
        tasks.cancel_scope.cancel()

run(main)
""",
    "with clients that have not answered": """
async def main():
    global kept
    async with serve() as server:
        kept = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        for sock in kept:
            out = ssl.MemoryBIO()
            session = CLIENT.wrap_bio(ssl.MemoryBIO(), out, server_hostname="anypoll.test")
            try:
                session.do_handshake()
            except ssl.SSLWantReadError:
                sock.sendall(out.read())
        while len(server.connections) < len(kept):
            await anyio.sleep(0.001)
    for sock in kept:
        sock.close()

run(main)
""",
    "with servers that do not answer": """
async def main():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(
                    lambda: anypoll.connect_tcp(*listening.getsockname(), ssl_context=CLIENT)
                )
            accepted = [await anyio.to_thread.run_sync(listening.accept) for _ in range(8)]
            tasks.cancel_scope.cancel()
    for sock, _ in accepted:
        sock.close()

run(main)
""",
    "in another thread": """
started = threading.Event()

async def main():
    async with serve() as server, anyio.create_task_group() as tasks:
        await storm(server, tasks)
        started.set()
        await anyio.sleep_forever()

threading.Thread(target=run, args=(main,), daemon=True).start()
started.wait()
""",
    "by sys.exit": """
async def main():
    async with serve() as server:
        async with anyio.create_task_group() as tasks:
            await storm(server, tasks)
            tasks.cancel_scope.cancel()
        sock = socket.create_connection(("127.0.0.1", server.port))
        while not server.connections:
            await anyio.sleep(0.001)
        sock.close()
        sys.exit(0)

try:
    run(main)
except BaseExceptionGroup as group:
    group.subgroup(lambda exc: isinstance(exc, SystemExit)) or sys.exit(1)
""",
}


@pytest.mark.parametrize("driver", ["auto", "thread"])
@pytest.mark.parametrize("loop", programs.LOOPS)
def test_a_child_of_a_fork_has_sessions_of_its_own(loop: str, driver: str, tls_way: str) -> None:
    programs.python(_start(driver, tls_way) + FORKS, loop)


@pytest.mark.any_loop
@pytest.mark.parametrize("end", list(ENDS))
@pytest.mark.parametrize("driver", ["auto", "thread"])
@pytest.mark.parametrize("loop", programs.LOOPS)
def test_a_program_ends(loop: str, driver: str, end: str, tls_way: str) -> None:
    programs.python(_start(driver, tls_way) + ENDS[end], loop)


def _start(driver: str, tls_way: str) -> str:
    start = f"{BEGINNING}\nanypoll.configure(driver={driver!r})\n"
    if tls_way == "memory":
        start += 'openssl.why_not = lambda _: "the test wants it so"\n'
    return start
