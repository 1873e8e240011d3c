"""The soak test: minutes of churn on each event loop, with every byte verified.

Connects, half-closes, resets, cancellations, timeouts, shutdowns, forks and hostile peers; at the
end nothing is left behind.

    python tests/soak.py --seconds 180 --seed 1 [--loop trio] [--only echo,fork]

`make soak` runs it, and `make soak-asan` and `make soak-tsan` with sanitizers. The exit status is 0
only if all went well. All decisions come from the seed: worker w takes those of its n-th operation
from `seed:w:n`, however the operations interleave; `soak_scenarios.py` has what it may do.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import subprocess
import sys
import time
import traceback
import warnings
from typing import Any

import anyio
import anyio.lowlevel
import leaks
from peers import resident
from soak_scenarios import HOST, LIMIT, SCENARIOS, handler

import anypoll

LOOPS = ("asyncio", "uvloop", "trio")
PATIENCE = 120  # seconds for one operation


class Run:
    """One event loop's."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.loop: str = options.loop
        self.seed: int = options.seed
        self.seconds: float = options.seconds
        self.workers: int = options.workers
        self.idle: float = options.idle
        self.names = options.only or list(SCENARIOS)
        self.backend, self.options = backend_of(self.loop)
        self.port = 0
        self.done = 0
        self.failures: list[str] = []
        self.started = time.monotonic()

    def fail(self, what: str) -> None:
        """Says it at once, and ends the run: nobody begins another operation. Any thread."""
        self.failures.append(what)
        print(f"FAILED on {self.loop}, seed {self.seed}: {what}", flush=True)

    @property
    def over(self) -> bool:
        return bool(self.failures) or time.monotonic() - self.started >= self.seconds

    async def work(self, worker: int) -> None:
        number = 0
        while not self.over:
            rng = random.Random(f"{self.seed}:{worker}:{number}")
            weights = [SCENARIOS[name][1] for name in self.names]
            [name] = rng.choices(self.names, weights)
            try:
                with anyio.fail_after(PATIENCE):
                    await SCENARIOS[name][0](self, rng)
            except Exception:  # noqa: BLE001 -- whatever it is, it is a failure
                self.fail(f"{name}, worker {worker}, operation {number}\n{traceback.format_exc()}")
            await anyio.lowlevel.checkpoint()
            number += 1
            self.done += 1

    async def report(self, every: float) -> None:
        while True:
            await anyio.sleep(every)
            self.say()

    def say(self) -> None:
        pollers = anypoll.statistics().pollers
        print(
            f"{self.loop:8}{time.monotonic() - self.started:6.0f} s {self.done:8} operations "
            f"{len(self.failures)} errors {sum(p.connections for p in pollers):5} open "
            f"{sum(p.bytes_in_use for p in pollers) >> 10:7} KiB in blocks "
            f"{resident() >> 20:5} MiB resident",
            flush=True,
        )

    async def main(self) -> None:
        for end in anypoll.socketpair():  # makes the hub, which has a task on trio
            await end.aclose()
        tasks = len(anyio.get_running_tasks())
        async with anypoll.serve(
            handler,
            host=HOST,
            port=0,
            idle_timeout=self.idle,
            read_limit=LIMIT,
            shutdown_timeout=30,
        ) as server:
            self.port = server.port
            self.started = time.monotonic()
            async with anyio.create_task_group() as background:
                background.start_soon(self.report, min(5, max(1, self.seconds / 5)))
                async with anyio.create_task_group() as group:
                    for worker in range(self.workers):
                        group.start_soon(self.work, worker)
                background.cancel_scope.cancel()
        statistics = server.statistics()
        if statistics.active or sum(statistics.closed.values()) != statistics.accepted:
            self.fail(f"connections that have not ended: {statistics}")
        if statistics.handler_errors or set(statistics.closed) & {"error", "failed"}:
            self.fail(f"handlers that failed: {statistics}")
        if len(anyio.get_running_tasks()) > tasks:
            self.fail(f"tasks that have not ended: {anyio.get_running_tasks()}")

    def run(self) -> int:
        anypoll.configure(pollers=random.Random(self.seed).randint(1, 3))
        watch(self)
        leaks.start()
        before = leaks.Snapshot.take()
        anyio.run(self.main, backend=self.backend, backend_options=self.options)
        gc.collect()
        for left in leaks.leaks_since(before):
            self.fail(f"left behind: {left}")
        self.say()
        return bool(self.failures)


def watch(run: Run) -> None:
    """What is only logged, warned of, or lost in a finalizer is a failure too."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            run.fail(f"logged: {self.format(record)}")

    def unraisable(args: Any) -> None:
        text = "".join(traceback.format_exception(args.exc_value))
        run.fail(f"{args.err_msg or 'unraisable'}: {args.object!r}\n{text}")

    logging.getLogger().addHandler(Handler(logging.WARNING))
    sys.unraisablehook = unraisable
    warnings.simplefilter("error")


def backend_of(loop: str) -> tuple[str, dict[str, Any]]:
    if loop != "uvloop":
        return loop, {}
    import uvloop

    return "asyncio", {"loop_factory": uvloop.new_event_loop}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Churn that must leave nothing behind.")
    parser.add_argument("--seconds", type=float, default=180, help="for all loops together")
    parser.add_argument("--seed", type=int, help="reproduces the decisions of another run")
    parser.add_argument("--loop", choices=LOOPS, help="only this one")
    parser.add_argument("--workers", type=int, default=24, help="operations at the same time")
    parser.add_argument("--idle", type=float, default=5, help="the server's idle timeout")
    parser.add_argument("--only", type=lambda text: text.split(","), help="scenarios, by name")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(SCENARIOS):
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(10**6)
    return options


def main() -> int:
    options = parse()
    if options.loop:
        print(f"soak on {options.loop}: seed {options.seed}", flush=True)
        return Run(options).run()
    print(f"soak: seed {options.seed}", flush=True)
    status = 0
    for loop in LOOPS:  # each in a process of its own
        command = [sys.executable, __file__, "--loop", loop, "--seed", str(options.seed)]
        command += ["--seconds", str(options.seconds / len(LOOPS))]
        command += ["--workers", str(options.workers), "--idle", str(options.idle)]
        command += ["--only", ",".join(options.only)] if options.only else []
        status |= subprocess.run(command, check=False).returncode != 0
    print("soak: FAILED" if status else "soak: all went well, nothing is left", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
