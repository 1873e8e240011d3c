"""The native types and the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from typing import Any

import pytest

from anypoll import Connection


def test_a_forgotten_loop_is_collected_with_its_waiting_tasks() -> None:
    """The hub holds who waits, and these hold the loop: so the loop alone may hold the hub."""
    loop = asyncio.new_event_loop()
    gone: list[weakref.ref[Any]] = [weakref.ref(loop)]
    ours, peer = socket.socketpair()

    async def handler(conn: Connection) -> None:
        await conn.next(1)

    async def main() -> None:
        conn = await Connection.from_socket(ours.detach())
        hub = conn._core.hub
        for call in (conn.next(1), conn.send(bytes(8 << 20))):
            task = asyncio.ensure_future(call)
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            gone.append(weakref.ref(task))
        while not hub.waits(conn._core.number) or not hub.writers:
            await asyncio.sleep(0)
        gone.extend([weakref.ref(conn._core), weakref.ref(hub)])

    with peer:
        loop.run_until_complete(main())
        with pytest.warns(ResourceWarning):  # noqa: PT031 -- they go together
            del loop
            gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone)
        peer.settimeout(30)
        while peer.recv(1 << 20):
            pass
