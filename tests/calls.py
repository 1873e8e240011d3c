"""Every call of a connection by its name, for what all of them have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from peers import within

from anypoll.nocopy import LinkBuffer

Call = Callable[[Any], Any]

#: Each takes what is there of the bytes "ab"; the peek leaves them.
READS: dict[str, Call] = {
    "receive": lambda conn: conn.receive(2),
    "iteration": lambda conn: conn.__anext__(),
    "peek": lambda conn: conn.peek(2),
    "next": lambda conn: conn.next(2),
    "skip": lambda conn: conn.skip(2),
    "until": lambda conn: conn.until(b"b"),
    "next_parts": lambda conn: conn.reader.next_parts(2),
    "slice": lambda conn: conn.reader.slice(2),
    "read_bytes": lambda conn: conn.reader.read_bytes(2),
    "read_str": lambda conn: conn.reader.read_str(2),
    "read_byte": lambda conn: conn.reader.read_byte(),
    "readinto": lambda conn: conn.reader.readinto(bytearray(2)),
}
#: Those of them that wait for all that they ask for.
EXACT = {
    name: call
    for name, call in READS.items()
    if name not in ("receive", "iteration", "read_byte", "readinto")
}
NOWAIT: dict[str, Call] = {
    "peek_nowait": lambda conn: conn.reader.peek_nowait(2),
    "next_nowait": lambda conn: conn.reader.next_nowait(2),
    "skip_nowait": lambda conn: conn.reader.skip_nowait(2),
    "until_nowait": lambda conn: conn.reader.until_nowait(b"b"),
}
#: Those that send something.
SENDS: dict[str, Call] = {
    "send": lambda conn: conn.send(b"x"),
    "send nothing": lambda conn: conn.send(b""),
    "write": lambda conn: conn.writer.write(b"x"),
    "write, by reference": lambda conn: conn.writer.write(bytes(10_000)),
    "write_str": lambda conn: conn.writer.write_str("x"),
    "write_byte": lambda conn: conn.writer.write_byte(1),
    "malloc": lambda conn: conn.writer.malloc(1),
    "malloc_ack": lambda conn: conn.writer.malloc_ack(0),
    "write_direct": lambda conn: conn.writer.write_direct(b"x", 0),
    "append": lambda conn: conn.writer.append(LinkBuffer()),
}
#: Those that wait for what was written, or for room.
FLUSHES: dict[str, Call] = {
    "flush": lambda conn: conn.writer.flush(),
    "send_eof": lambda conn: conn.send_eof(),
    "wait_writable": lambda conn: conn.wait_writable(),
}
WRITES = SENDS | FLUSHES


class Index:
    """What is no ``int``, but will do as one."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


async def called(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What it returns, whether that is to be awaited or not."""
    result = call(*args, **options)
    return await within(result) if inspect.isawaitable(result) else result


async def all_raise(
    calls: Mapping[str, Callable[..., Any]],
    error: type[BaseException] | tuple[type[BaseException], ...],
    *args: Any,
    match: str | None = None,
    cause: type[BaseException] | None = None,
) -> None:
    """Each of them raises the error, from the cause."""
    for name, call in calls.items():
        try:
            with pytest.raises(error, match=match) as caught:
                await called(call, *args)
            assert cause is None or isinstance(caught.value.__cause__, cause)
        except BaseException as exc:
            exc.add_note(f"The call was {name}.")
            raise
