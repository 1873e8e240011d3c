"""Nonsense for every argument of every public call: what is raised, with which text, and that
nothing has changed; by itself, and in the middle of calls that are right. A call that is in neither
the table nor the list of exceptions fails the last test.
"""

from __future__ import annotations

import inspect
import math
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.abc
import pytest
from anyio import WouldBlock
from hypothesis import HealthCheck, given, settings, strategies as st
from peers import arrive, read_all, within

import anypoll
import anypoll.integrations.httpcore
import anypoll.integrations.trio
import anypoll.mux
import anypoll.nocopy
import anypoll.streams
from anypoll import MessageTooLarge
from anypoll._loop import runtime as _runtime
from anypoll.mux import ShardQueue
from anypoll.nocopy import LinkBuffer

pytestmark = pytest.mark.anyio

#: Stands for the connection of the test where another argument is tried.
OPEN = object()
NAN, INF = float("nan"), float("inf")
HUGE = [2**31, 2**63, 2**70, 2**20_000]  # the last one has more digits than Python prints
TOO_SMALL = [-1, -(2**31) - 1, -(2**63) - 1, -(2**70), -(2**20_000)]
THINGS: list[Any] = ["1", b"1", [1], {1: 1}, 1j, object(), int]
NO_INTEGERS = [*THINGS, None, 1.5, 1.0, NAN, INF]
NO_BYTES = ["text", None, 5, 1.5, [1], object(), bytes]

Nonsense = dict[type[Exception], list[Any]]


#: What is raised may also be one of these subclasses.
SUBCLASSES = (UnicodeEncodeError,)


class Argument(NamedTuple):
    """What one argument must not be, and what the text must say."""

    wrong: Nonsense
    text: str = r"{name}.* must "
    #: the other arguments, if they are not those of OTHERS
    others: dict[str, Any] | None = None


def count(least: int = 0, most: int | None = None) -> Argument:
    small = [*TOO_SMALL, *([0] if least else [])]
    large = [] if most is None else [n for n in (most + 1, *HUGE) if n > most]
    return Argument(
        {ValueError: small + large, TypeError: NO_INTEGERS},
        rf"{{name}} must be (an integer|at least {least}|between {least} and {most})",
    )


def seconds(*, none: bool = True) -> Argument:
    wrong = [-1, -0.5, NAN, -INF, -(2**70), 2**20_000, -(2**20_000)]
    return Argument(
        {ValueError: wrong, TypeError: THINGS if none else [*THINGS, None]},
        "{name} must (be a number of seconds|not be negative)",
    )


def typed(*wrong: Any, text: str = r"{name}.* must ") -> Argument:
    return Argument({TypeError: list(wrong)}, text)


def of_a_reader(small: type[Exception] = ValueError) -> Argument:
    """A count of bytes that are to be read."""
    return Argument(
        {small: TOO_SMALL, MessageTooLarge: HUGE, TypeError: NO_INTEGERS},
        "n must be (an integer|at least 0)|read_limit is|the limit is",
    )


def of_a_buffer() -> Argument:
    return Argument(
        {ValueError: TOO_SMALL, WouldBlock: HUGE, TypeError: NO_INTEGERS},
        "^$|n must be (an integer|at least 0)",
    )


POSITIVE = Argument(
    {ValueError: [*TOO_SMALL, 0], TypeError: NO_INTEGERS}, "^{name} must be a positive integer"
)
BYTES = typed(*NO_BYTES, text="{name} must be bytes-like")
STRIDED = memoryview(b"abcdef")[::2]
CONTIGUOUS = Argument(
    {TypeError: NO_BYTES, ValueError: [STRIDED]},
    "{name} must be bytes-like|the bytes of {name} must lie side by side",
)
DELIMITER = Argument(
    {TypeError: ["\n", None, 10, 1.5, [10]], ValueError: [b"", bytearray(), memoryview(b"")]},
    "delimiter must (be bytes|not be empty)",
)
MAX_BYTES = count(most=2**31)
ENCODING = Argument(
    {TypeError: [5, None, b"utf-8"], ValueError: ["", "nonsense", "hex", "a\0b", "\ud800"]},
    "encoding must be (a str|the name of a text encoding)",
)
INTO = Argument(
    {
        TypeError: [*NO_BYTES, b"constant", memoryview(b"constant")],
        ValueError: [memoryview(bytearray(6))[::2]],
    },
    "buffer must be bytes-like|the bytes of buffer must|needs a writable buffer",
)
HOST = typed(5, 1.5, b"127.0.0.1", ["h"], object())
HOST_NEEDED = typed(None, 5, 1.5, b"127.0.0.1", ["h"], object())
PORT = count(most=65535)
PORT_OR_NONE = Argument(
    {ValueError: [-1, 65536, *HUGE], TypeError: THINGS},
    "{name} must be (an integer|between 0 and 65535)",
)
PATH = Argument(
    {TypeError: [5, None, 1.5, ["p"], object()], ValueError: ["", b"", "a\0b", b"a\0b"]},
    r"path must (be str, bytes or|not be empty|not contain a NUL)|a path must not contain a NUL",
)
MODE = Argument({ValueError: [*TOO_SMALL, *HUGE, 0o10000], TypeError: THINGS}, "mode must be ")
BACKLOG = Argument(
    {ValueError: TOO_SMALL, TypeError: NO_INTEGERS}, "backlog must be (an integer|at least )"
)
KIND = Argument(
    {ValueError: [0, -1, 2**70, None, "x", [], socket.SOCK_DGRAM, NAN]},
    "kind must be SOCK_STREAM or SOCK_SEQPACKET",
)
SOCKET = Argument(
    {TypeError: [None, "1", b"1", 1.5, [1], object()], ValueError: [*TOO_SMALL, *HUGE]},
    "^expected an int or socket|^the socket must be|^negative file descriptor$",
)
KEEPALIVE = typed(None, 5, 0, 1.5, "yes", [True], text="keepalive must be a bool or a Keepalive")
CONTEXT = typed("x", 5, True, object(), text="ssl_context must be an ssl.SSLContext")
NO_MAKER = typed(None, 5, "x", object(), text=r"a \w+ is (made by|a connection's)")
TRANSPORT = typed(None, 5, "x", object(), text="transport_stream must be an anypoll Connection")
FLAG = typed(None, 0, 1, "x", NAN)
CALLBACK = typed(
    *(None, 5, "x", lambda _a, _b: None, lambda *, must: must), text="a close callback must"
)

READ_COUNTED = ["peek", "next", "skip", "next_parts", "slice", "read_bytes", "read_str"]
NOWAIT = ["peek_nowait", "next_nowait", "skip_nowait"]


def reading(owner: str, n: Argument) -> dict[str, dict[str, Argument]]:
    """The rows of a reader, or of a buffer."""
    rows = {name: {"n": n} for name in READ_COUNTED + NOWAIT}
    rows["read_str"]["encoding"] = ENCODING
    rows["readinto"] = {"buffer": INTO}
    for name in ("until", "until_nowait"):
        rows[name] = {"delimiter": DELIMITER, "max_bytes": MAX_BYTES}
    return {f"{owner}.{name}": row for name, row in rows.items()}


READER = reading("Reader", of_a_reader())
BUFFER = reading("LinkBuffer", of_a_buffer())
WRITER = {
    "Writer.write": {"data": BYTES},
    "Writer.write_str": {
        "data": typed(b"x", None, 5, ["x"], text="a str is required"),
        "encoding": ENCODING,
    },
    "Writer.write_byte": {"value": count(most=255)},
    "Writer.append": {"buffer": typed(*NO_BYTES, b"x", text="a LinkBuffer is required")},
    "Writer.malloc": {"n": count(most=2**31)},
    "Writer.malloc_ack": {"n": count(most=4)},
    "Writer.write_direct": {"data": CONTIGUOUS, "remain": count(most=4)},
}
BUFFER |= {name.replace("Writer", "LinkBuffer"): row for name, row in WRITER.items()}

CONNECTION = {
    "Connection": {"core": NO_MAKER},
    "UNIXConnection": {"core": NO_MAKER},
    "Connection.from_socket": {"sock_or_fd": SOCKET},
    **{f"Connection.{name}": READER[f"Reader.{name}"] for name in ("peek", "next", "skip")},
    "Connection.until": READER["Reader.until"],
    "Connection.receive": {"max_bytes": POSITIVE},
    "Connection.send": {"item": CONTIGUOUS},
    **{
        f"Connection.{name}": {"value": seconds()._replace(text=f"^{name} must ")}
        for name in ("read_timeout", "write_timeout", "idle_timeout")
    },
    "Connection.set_nodelay": {"on": FLAG},
    "Connection.set_on_request": {"function": typed(None, 5, "x", [])},
    "Connection.set_keepalive": {"keepalive": KEEPALIVE},
    "Connection.add_close_callback": {"callback": CALLBACK},
    "UNIXConnection.send_fds": {
        "message": Argument(
            {TypeError: NO_BYTES, ValueError: [b"", STRIDED]},
            "message must (be bytes-like|not be empty|lie side by side)",
        ),
        "fds": Argument(
            {
                TypeError: [5, ["x"], [1.5], [None], "12", [object()]],
                ValueError: [[], (), [-1], [2**31], [2**63], [2**70], [0] * 254],
            },
            "fds must|at most 253 fds",
        ),
    },
    "UNIXConnection.receive_fds": {
        "msglen": Argument(
            {ValueError: [-1, -(2**70), 1.5, "1", None, NAN]},
            "^msglen must be a non-negative integer$",
        ),
        "maxfds": Argument(
            {ValueError: [0, -1, -(2**70), 1.5, "1", None, NAN]},
            "^maxfds must be a positive integer$",
        ),
    },
}

MEMBERS = "peek next skip until receive send read_timeout write_timeout idle_timeout"
TLS_CONNECTION = {
    "TLSConnection": {"transport_stream": TRANSPORT},
    "TLSConnection.wrap": {
        "transport_stream": TRANSPORT,
        "hostname": typed(5, 1.5, ["h"], object()),
        "ssl_context": CONTEXT,
    },
    "TLSConnection.add_close_callback": {"callback": CALLBACK},
    **{f"TLSConnection.{name}": CONNECTION[f"Connection.{name}"] for name in MEMBERS.split()},
}

OPTIONS = {
    "read_timeout": seconds(),
    "write_timeout": seconds(),
    "keepalive": KEEPALIVE,
}
DIALER = {
    "connect_tcp": {
        "remote_host": HOST_NEEDED,
        "remote_port": PORT,
        "local_host": HOST,
        "local_port": PORT_OR_NONE,
        "ssl_context": CONTEXT,
        "tls_hostname": typed(5, 1.5, ["h"], object()),
        "happy_eyeballs_delay": seconds(),
        "timeout": seconds(),
        **OPTIONS,
    },
    "connect_unix": {"path": PATH, "kind": KIND, "timeout": seconds(), **OPTIONS},
    "TCPConnectable": {
        "host": HOST_NEEDED,
        "port": Argument(
            {ValueError: [0, *TOO_SMALL, 65536, *HUGE], TypeError: NO_INTEGERS},
            "port must be an integer|^TCP port number out of range$",
        ),
    },
    "UNIXConnectable": {"path": PATH},
}
HOOK = Argument({ValueError: [5, "x", [], object()]}, "{name} must be a")
MOST = count(least=1)
MOST.wrong[TypeError] = [thing for thing in NO_INTEGERS if thing is not None]
NO_HANDLER = Argument(
    {ValueError: [None, 5, "x"]}, "needs exactly one of handler|handler must be a function"
)
SERVE = {
    "handler": NO_HANDLER,
    "on_request": NO_HANDLER._replace(text="on_request"),
    "host": HOST,
    "port": PORT_OR_NONE,
    "path": PATH._replace(
        wrong={TypeError: [5, 1.5, ["p"]], ValueError: ["", b"", "a\0b"]}, others={}
    ),
    "path_mode": MODE._replace(others={"path": b"\0anypoll-mode"}),
    "sock": Argument(
        {TypeError: ["1", 1.5, ["x"]], ValueError: [*TOO_SMALL, *HUGE, [], ()]},
        f"{SOCKET.text}|sock must be a socket",
        others={},
    ),
    "listeners": Argument(
        {ValueError: [5, "x", ["x"], [], ()]},
        "cannot use the listener|listeners must be ",
        others={},
    ),
    "backlog": count(least=1)._replace(text="backlog must be "),
    **dict.fromkeys(("on_prepare", "on_connect", "on_disconnect", "on_error"), HOOK),
    **dict.fromkeys(("cancel_on_disconnect", "reuse_port", "nodelay"), FLAG),
    "ssl_context": CONTEXT,
    "tls_handshake_timeout": seconds(none=False),
    "max_connections": MOST,
    "max_connections_per_peer": MOST,
    **OPTIONS,
    "idle_timeout": seconds(),
    "shutdown_timeout": seconds(none=False),
    "read_high_water": Argument(
        {ValueError: [0, *TOO_SMALL, 2**30 + 1, *HUGE], TypeError: [*THINGS, 1.5]}, "{name} must be"
    ),
    "write_high_water": Argument(
        {ValueError: [0, *TOO_SMALL], TypeError: [*THINGS, 1.5]}, "{name} must be"
    ),
    "read_limit": Argument(
        {ValueError: [0, *TOO_SMALL, 2**31 + 1, *HUGE[1:]], TypeError: [*THINGS, 1.5]},
        "{name} must be",
    ),
}
SERVER = {
    "SocketListener": {"sock": NO_MAKER},
    "SocketListener.from_socket": {"sock_or_fd": SOCKET},
    "Server": {"options": NO_MAKER},
    "Server.shutdown": {"timeout": seconds()},
    "create_tcp_listener": {
        "local_host": HOST,
        "local_port": PORT,
        "family": Argument(
            {ValueError: [-1, 1, 2**31, 2**70, None, "x", 1.5, []]}, "family must be AF_UNSPEC"
        ),
        "backlog": BACKLOG,
    },
    "create_unix_listener": {"path": PATH, "mode": MODE, "backlog": BACKLOG, "kind": KIND},
    "serve": SERVE,
    "serve_forever": {"handler": NO_HANDLER, "task_status": typed(5, None, "x")},
}
PROCESS = {
    "Keepalive": {
        "idle": count(least=1, most=32767),
        "interval": count(least=1, most=32767),
        "count": count(least=1, most=127),
    },
    "configure": {
        "pollers": Argument(
            {ValueError: [0, *TOO_SMALL, 257, *HUGE], TypeError: [*THINGS, 1.5, NAN]},
            "pollers must be (an integer|between 1 and 256)",
        ),
        "load_balance": Argument({ValueError: ["", "x", 5, b"random", [1]]}, "{name} must be one"),
        "block_size": Argument(
            {
                ValueError: [0, 2047, 2**20 + 1, *TOO_SMALL, *HUGE],
                TypeError: [*THINGS, 1.5, NAN],
            },
            "block_size must be (an integer|between 2048 and 1048576)",
        ),
        "checkpoint_budget": Argument(
            {ValueError: [0, *TOO_SMALL], TypeError: [*THINGS, 1.5, NAN]},
            "checkpoint_budget must be (an integer|at least 1)",
        ),
        "direct_resume": Argument(
            {TypeError: [1, 0, "yes", b"", []]}, "direct_resume must be a bool"
        ),
        "driver": Argument({ValueError: ["", "x", 5, b"auto"]}, "driver must be 'auto'"),
        "spin": Argument(
            {ValueError: [1001, *TOO_SMALL, *HUGE], TypeError: [*THINGS, 1.5, NAN]},
            "spin must be (an integer|between 0 and 1000)",
        ),
    },
}
NOCOPY = {
    "Reader": {"core": NO_MAKER},
    "Writer": {"core": NO_MAKER},
    "LinkBuffer": {"block_size": count(least=1, most=2**31)},
    "as_raw_io": {"buffer": typed(None, 5, b"x", text="a LinkBuffer is required")},
    "as_receive_stream": {"reader": typed(None, 5, b"x", text="a Reader is required")},
    "as_send_stream": {"writer": typed(None, 5, b"x", text="a Writer is required")},
    "wrap_reader": {"stream": typed(None, 5, b"x", text="a ByteReceiveStream is required")},
    "wrap_writer": {"stream": typed(None, 5, b"x", text="a ByteSendStream is required")},
    # what those give, which has no public class
    "as_receive_stream().receive": {"max_bytes": POSITIVE},
    "as_send_stream().send": {"item": CONTIGUOUS},
    "as_raw_io().write": {"data": BYTES},
    "as_raw_io().readinto": {"into": INTO},
}
NO_BUFFERS = ["text", None, 5, 1.5, [1], object(), object, lambda: None]
MUX = {
    "mux.ShardQueue": {
        "conn": typed(None, 5, b"x", object(), text="a nocopy writer is required"),
        "shards": count(least=1),
    },
    "mux.ShardQueue.add": {"buffers": typed(*NO_BUFFERS, text="must be bytes-like")},
}
CONNECTION_NEEDED = typed(None, 5, object(), text=r"expected an anypoll\.Connection")
LISTENER_NEEDED = typed(None, 5, object(), text=r"expected an anypoll\.SocketListener")
LOCAL_ADDRESS = HOST._replace(text="local_host must be")
LISTENING_HOST = typed(5, 1.5, ["h"], text="host must be")
TRIO = {
    "trio.TrioStream": {"connection": CONNECTION_NEEDED},
    "trio.TrioStream.send_all": {"data": CONTIGUOUS._replace(text="must (be bytes-like|lie)")},
    "trio.TrioStream.receive_some": {
        "max_bytes": POSITIVE._replace(
            wrong={ValueError: [*TOO_SMALL, 0], TypeError: [*THINGS, 1.5, NAN]}
        )
    },
    "trio.TrioListener": {"listener": LISTENER_NEEDED},
    "trio.open_tcp_stream": {
        "host": Argument({ValueError: [None, 5, ["h"]]}, "host must be"),
        "port": PORT,
        "happy_eyeballs_delay": seconds(),
        "local_address": LOCAL_ADDRESS,
    },
    "trio.open_unix_socket": {"filename": PATH},
    "trio.open_tcp_listeners": {
        "port": PORT,
        "host": LISTENING_HOST,
        "backlog": BACKLOG._replace(wrong={ValueError: TOO_SMALL, TypeError: [*THINGS, 1.5]}),
    },
    "trio.serve_tcp": {
        "port": PORT,
        "host": LISTENING_HOST,
        "backlog": BACKLOG._replace(wrong={ValueError: TOO_SMALL}),
    },
}
SOCKET_OPTIONS = Argument(
    {
        TypeError: [["x"], [(1, "x", 2)], [(1,)], [5], 5],
        ValueError: [[(1, 2**40, 1)], [(1, 2, 2**70)]],
    },
    "socket_options must be",
)
HTTPCORE = {
    "httpcore.AnypollBackend.connect_tcp": {
        "host": HOST_NEEDED,
        "port": PORT,
        "timeout": seconds(),
        "local_address": LOCAL_ADDRESS,
        "socket_options": SOCKET_OPTIONS,
    },
    "httpcore.AnypollBackend.connect_unix_socket": {
        "path": PATH,
        "timeout": seconds(),
        "socket_options": SOCKET_OPTIONS,
    },
    "httpcore.AnypollBackend.sleep": {"seconds": seconds()},
    "httpcore.AnypollStream": {"connection": CONNECTION_NEEDED},
    "httpcore.AnypollTLSStream": {
        "connection": CONNECTION_NEEDED,
        "tls": typed(None, 5, text="expected an anyio TLSStream"),
    },
    "httpcore.AnypollStream.read": {"max_bytes": POSITIVE, "timeout": seconds()},
    "httpcore.AnypollStream.write": {"buffer": typed(*NO_BYTES), "timeout": seconds()},
    "httpcore.AnypollStream.start_tls": {
        "ssl_context": typed(None, "x", 5, text="ssl_context must be an ssl.SSLContext"),
        "server_hostname": typed(5, b"h"),
        "timeout": seconds(),
    },
}

#: Arguments that are right, for the calls that need more than the one that is tried.
OTHERS: dict[str, dict[str, Any]] = {
    "read_str": {"n": 1},
    "until": {"delimiter": b"\n"},
    "until_nowait": {"delimiter": b"\n"},
    "write_str": {"data": "x"},
    "write_direct": {"data": b"x", "remain": 0},
    "send_fds": {"message": b"x", "fds": [0]},
    "receive_fds": {"msglen": 1, "maxfds": 1},
    "TLSConnection": dict.fromkeys(
        ["standard_compatible", "_ssl_object", "_read_bio", "_write_bio"]
    ),
    "wrap": {"transport_stream": OPEN, "hostname": "h"},
    "connect_tcp": {"remote_host": "127.0.0.1", "remote_port": 1},
    "connect_unix": {"path": b"\0anypoll-nobody"},
    "TCPConnectable": {"host": "h", "port": 1},
    "serve": {"host": "127.0.0.1", "port": 0},
    "serve_forever": {"handler": print, "host": "127.0.0.1", "port": 0},
    "create_unix_listener": {"path": "listener"},
    "configure": {
        "pollers": 2,
        "load_balance": "random",
        "block_size": 4096,
        "checkpoint_budget": 3,
        "direct_resume": False,
        "driver": "thread",
        "spin": 0,
    },
    "ShardQueue": {"conn": OPEN},
    "open_tcp_stream": {"host": "127.0.0.1", "port": 1},
    "open_tcp_listeners": {"port": 0},
    "serve_tcp": {"handler": print, "port": 0},
    "httpcore.AnypollBackend.connect_tcp": {"host": "127.0.0.1", "port": 1},
    "connect_unix_socket": {"path": b"\0anypoll-nobody"},
    "AnypollTLSStream": {"connection": OPEN, "tls": None},
    "read": {"max_bytes": 1},
    "httpcore.AnypollStream.write": {"buffer": b"x"},
    "start_tls": {"ssl_context": ssl.create_default_context(), "server_hostname": "h"},
}


def others_of(name: str) -> dict[str, Any]:
    return OTHERS.get(name) or OTHERS.get(name.rpartition(".")[2], {})


TABLE: dict[str, dict[str, Argument]] = {
    **READER,
    **WRITER,
    **BUFFER,
    **CONNECTION,
    **TLS_CONNECTION,
    **DIALER,
    **SERVER,
    **PROCESS,
    **NOCOPY,
    **MUX,
    **TRIO,
    **HTTPCORE,
}

# --- the table -----------------------------------------------------------------------------------

INPUT = b"abcdef\n"
OUTPUT = b"pend"
RESERVED = b"open"


class Live:
    """Objects at work: unread input, pending output, an open reservation, timeouts."""

    def __init__(self, conn: anypoll.UNIXConnection, peer: socket.socket) -> None:
        self.conn, self.peer = conn, peer
        self.closed: list[str] = []
        conn.read_timeout, conn.write_timeout, conn.idle_timeout = 50.0, 60.0, 70.0
        conn.add_close_callback(lambda: self.closed.append("once"))
        self.buffer = LinkBuffer(block_size=16)
        self.buffer.write(INPUT)
        self.buffer.flush()
        self.far, near = anyio.create_memory_object_stream[bytes](math.inf)
        self.wrapped = anypoll.nocopy.wrap_reader(_Bytes(near))
        out, self.received = anyio.create_memory_object_stream[bytes](math.inf)
        self.wrapping = anypoll.nocopy.wrap_writer(_Bytes(out))
        self.writers = conn.writer, self.wrapping, self.buffer
        #: What is to be read from the connection and the wrapped stream, and from the buffer; what
        #: was flushed, and what was written since.
        self.input, self.in_buffer = bytearray(), bytearray(INPUT)
        self.flushed, self.pending = bytearray(), bytearray()

    async def start(self) -> None:
        await self.feed(INPUT)
        await self.wrapped.peek(1)
        self.write(OUTPUT)
        self.reserve(RESERVED)

    # --- calls that are right --------------------------------------------------------------------

    async def feed(self, data: bytes) -> None:
        await arrive(self.conn, self.peer, data)
        self.far.send_nowait(data)
        self.input += data

    async def read(self, data: bytes) -> None:
        """As much, but for a last byte."""
        n = min(len(data), len(self.input) - 1)
        assert await self.conn.next(n) == await self.wrapped.next(n) == self.input[:n]
        del self.input[:n]
        n = min(len(data), len(self.in_buffer) - 1)
        assert self.buffer.next(n) == self.in_buffer[:n]
        del self.in_buffer[:n]

    def write(self, data: bytes) -> None:
        for writer in self.writers:
            writer.write(data)
        self.pending += data

    def reserve(self, data: bytes) -> None:
        """Four bytes at most."""
        if not self.buffer.malloc_len:
            for writer in self.writers:
                writer.malloc(len(data[:4]))[:] = data[:4]
            self.pending += data[:4]

    async def flush(self) -> None:
        await self.conn.writer.flush()
        await self.wrapping.flush()
        self.buffer.flush()
        self.flushed += self.pending
        self.in_buffer += self.pending
        self.pending.clear()

    async def call(self, verb: str, data: bytes) -> None:
        result = getattr(self, verb)(*([] if verb == "flush" else [data]))
        if inspect.isawaitable(result):
            await result

    # --- what nonsense leaves as it is -----------------------------------------------------------

    def state(self) -> list[object]:
        conn, statistics = self.conn, self.conn.statistics()
        return [
            *((len(writer), writer.malloc_len) for writer in self.writers),
            *(len(reader) for reader in (conn.reader, self.buffer, self.wrapped)),
            (conn.read_timeout, conn.write_timeout, conn.idle_timeout),
            (conn.is_active, conn.at_eof, conn.fileno(), self.closed[:]),
            (statistics.bytes_received, statistics.bytes_sent),
            (statistics.buffered_input, statistics.buffered_output),
            _runtime.settings(),
            len(anypoll.statistics().pollers),
        ]

    async def still_works(self) -> None:
        """What was buffered before comes out, whole and in order, at all ends."""
        size = len(self.input)
        assert await self.conn.reader.next(size) == await self.wrapped.next(size) == self.input
        await self.flush()
        assert self.buffer.to_bytes() == self.in_buffer
        assert await read_all(self.peer, len(self.flushed)) == self.flushed
        got = b""
        with suppress(WouldBlock):
            while True:
                got += self.received.receive_nowait()
        assert got == self.flushed
        await arrive(self.conn, self.peer, b"more")
        assert await self.conn.receive() == b"more"


class _Bytes(anyio.abc.ByteStream):
    """A stream of objects as one of bytes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def receive(self, max_bytes: int = 65536) -> bytes:
        result: bytes = await self.stream.receive()
        return result

    async def send(self, item: Any) -> None:
        await self.stream.send(item)

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        await self.stream.aclose()


@asynccontextmanager
async def alive() -> AsyncIterator[Live]:
    ours, peer = socket.socketpair()
    peer.setblocking(False)
    with peer:
        async with await anypoll.UNIXConnection.from_socket(ours) as conn:
            live = Live(conn, peer)
            with live.far, live.received:
                await live.start()
                yield live
                await live.wrapped._core.aclose()
                await live.wrapping._core.aclose()


def integration(name: str) -> Any:
    return getattr(anypoll.integrations, name)


async def entered(**kwargs: Any) -> None:
    if not {"handler", "on_request"} & set(kwargs):
        kwargs["handler"] = print
    async with anypoll.serve(**kwargs):
        pytest.fail("serve() has taken it")


async def shut_down(timeout: Any) -> None:
    async with anypoll.serve(print, host="127.0.0.1", port=0) as server:
        try:
            await server.shutdown(timeout)
        finally:
            assert not server.shutting_down


async def queued(buffers: Any) -> None:
    first, second = anyio.create_memory_object_stream[bytes](4)
    with first, second:
        async with ShardQueue(anypoll.nocopy.wrap_writer(_Bytes(first))) as queue:
            try:
                await queue.add(b"before", buffers)
            finally:
                assert queue.buffered == 0


def own(live: Live) -> dict[str, Any]:
    """What a name of the table stands for, if it is not an attribute of a public module."""
    nocopy = anypoll.nocopy
    receiving = nocopy.as_receive_stream(live.conn.reader)
    sending = nocopy.as_send_stream(live.conn.writer)
    raw = nocopy.as_raw_io(live.buffer)
    return {
        "serve": entered,
        "Server.shutdown": shut_down,
        "as_receive_stream().receive": receiving.receive,
        "as_send_stream().send": sending.send,
        "as_raw_io().write": raw.write,
        "as_raw_io().readinto": raw.readinto,
        "mux.ShardQueue": ShardQueue,
        "mux.ShardQueue.add": queued,
    }


def tls_over(conn: anypoll.Connection) -> anypoll.TLSConnection:
    """Before its handshake."""
    bios = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(*bios, server_hostname="h")
    return anypoll.TLSConnection(conn, True, session, *bios)


def instances(live: Live) -> dict[str, list[Any]]:
    """The objects whose methods are tried."""
    http = anypoll.integrations.httpcore
    made: dict[str, list[Any]] = {
        "Reader": [live.conn.reader, live.wrapped],
        "Writer": [live.conn.writer, live.wrapping],
        "LinkBuffer": [live.buffer],
        "Connection": [live.conn],
        "UNIXConnection": [live.conn],
        "TLSConnection": [tls_over(live.conn)],
        "httpcore.AnypollBackend": [http.AnypollBackend()],
        "httpcore.AnypollStream": [http.AnypollStream(live.conn)],
        "trio.TrioStream": [anypoll.integrations.trio.TrioStream(live.conn)],
    }
    return made


def targets(name: str, live: Live) -> Iterator[Callable[..., Any]]:
    special = own(live).get(name)
    if special is not None:
        yield special
        return
    owner, _, method = name.rpartition(".")
    if owner in ("", "trio", "httpcore"):
        for module in (anypoll, anypoll.nocopy) if not owner else (integration(owner),):
            if hasattr(module, method):
                yield getattr(module, method)
    elif owner == "SocketListener":
        yield getattr(anypoll.SocketListener, method)
    else:
        for thing in instances(live)[owner]:
            if isinstance(inspect.getattr_static(type(thing), method), property):
                yield lambda value, thing=thing: setattr(thing, method, value)
            else:
                yield getattr(thing, method)


def arguments(call: Callable[..., Any], named: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Those that can only be given by their place go there."""
    given = dict(named)
    placed = [
        given.pop(name)
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind is parameter.POSITIONAL_ONLY and name in given
    ]
    return placed, given


async def called(call: Callable[..., Any], named: dict[str, Any]) -> Any:
    placed, given = arguments(call, named)
    result = call(*placed, **given)
    return await within(result) if inspect.isawaitable(result) else result


class Wrong(NamedTuple):
    name: str
    argument: str
    error: type[Exception]
    value: Any


def rows(name: str) -> list[Wrong]:
    return [
        Wrong(name, argument, error, value)
        for argument, row in TABLE[name].items()
        for error, values in row.wrong.items()
        for value in values
    ]


async def refuses(live: Live, wrong: Wrong, *, text: bool = True) -> None:
    """The call raises what the table says, and has changed nothing.

    :param text: look at that, too
    """
    name, argument, error, value = wrong
    row = TABLE[name][argument]
    others = others_of(name) if row.others is None else row.others
    others = {k: live.conn if v is OPEN else v for k, v in others.items()}
    before = live.state()
    for target in targets(name, live):
        with pytest.raises(error) as caught:
            await called(target, {**others, argument: value})
        assert type(caught.value) in (error, *SUBCLASSES), caught.value
        if text:
            expected = row.text.format(name=argument)
            assert re.search(expected, str(caught.value)), (argument, str(caught.value))
        assert live.state() == before, (argument, value)


@pytest.mark.loops("trio")  # what looks at arguments does not know the loop
@pytest.mark.parametrize("name", TABLE)
async def test_nonsense_is_refused_and_changes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with alive() as live:
        for wrong in rows(name):
            await refuses(live, wrong)
        await live.still_works()
        assert list(tmp_path.iterdir()) == []
    assert live.closed == ["once"]


OWNERS = ("Reader.", "Writer.", "LinkBuffer.", "Connection.", "UNIXConnection.")
WRONG = [wrong for name in TABLE if name.startswith(OWNERS) for wrong in rows(name)]
VERBS = st.sampled_from(["feed", "read", "write", "reserve", "flush"])
RIGHT = st.tuples(VERBS, st.binary(max_size=200))


async def at_random(steps: list[Any]) -> None:
    async with alive() as live:
        for step in steps:
            if isinstance(step, int):
                await refuses(live, WRONG[step], text=False)
            else:
                await live.call(*step)
        await live.still_works()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(RIGHT | st.integers(0, len(WRONG) - 1), min_size=20, max_size=60))
def test_nonsense_at_random(anyio_backend: tuple[str, dict[str, Any]], steps: list[Any]) -> None:
    """Whatever is buffered, pending or reserved meanwhile."""
    backend, options = anyio_backend
    anyio.run(at_random, steps, backend=backend, backend_options=options)


# --- nothing is left out -------------------------------------------------------------------------

RECORDS = [
    "AnypollAttribute",
    "ConnectTimeout",
    "ConnectionStatistics",
    "IdleTimeout",
    "MemoryStatistics",
    "MessageTooLarge",
    "PeerCredentials",
    "PollerStatistics",
    "ReadTimeout",
    "ServerStatistics",
    "Statistics",
    "TLSHandshake",
    "WriteTimeout",
]
#: Arguments that are not in the table, and why not.
EXCEPTIONS = {
    **dict.fromkeys(
        RECORDS, "a record, an exception or a set of attributes: keeps what it is given"
    ),
    "SocketListener.account": "what anypoll gives it",
    "SocketListener.on_token.bits": "called by the hub, and not by users",
    "SocketListener.on_token.error": "likewise",
    **{
        f"TLSConnection.{name}": "what wrap() gives it"
        for name in ("standard_compatible", "_ssl_object", "_read_bio", "_write_bio")
    },
    "TLSConnection.wrap.server_side": "true or false, whatever it is, as in AnyIO",
    "TLSConnection.wrap.standard_compatible": "likewise",
    "TLSConnection.state.value": "any object of the user's",
    "serve_forever.options": "those of serve(), which it is given",
    "connect_tcp.tls": "true or false, whatever it is, as in AnyIO",
    "connect_tcp.tls_standard_compatible": "likewise",
    "create_tcp_listener.reuse_port": "likewise",
    "trio.serve_tcp.handler": "trio.serve_listeners() calls it, and does not look at it before",
    "trio.serve_tcp.handler_nursery": "trio.serve_listeners() is given it",
    "trio.serve_tcp.task_status": "trio.serve_listeners() is given it",
    "httpcore.AnypollStream.get_extra_info.info": "None for whatever it does not know",
    "httpcore.AnypollTLSStream.get_extra_info.info": "likewise",
}
PREFIXES = {
    anypoll: "",
    anypoll.streams: "",
    anypoll.nocopy: "",
    anypoll.mux: "mux.",
    anypoll.integrations.trio: "trio.",
    anypoll.integrations.httpcore: "httpcore.",
}


def parameters(function: Any) -> list[str]:
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:  # an exception's: *args
        return []
    return [name for name in names if name not in ("self", "cls")]


def methods(cls: type) -> Iterator[tuple[str, list[str]]]:
    """The public ones that anypoll's own classes define, and the properties that can be set."""
    for name in dir(cls):
        home = next((c for c in cls.__mro__ if name in vars(c)), cls)
        if name.startswith("_") or not home.__module__.startswith("anypoll"):
            continue
        thing = vars(home)[name]
        if isinstance(thing, property):
            if thing.fset is not None:
                yield name, ["value"]
        elif callable(getattr(cls, name)):
            yield name, parameters(getattr(cls, name))


def is_own(cls: Any, name: str, public: list[Any]) -> bool:
    """Not inherited from another public class, where it is listed."""
    thing = inspect.getattr_static(cls, name)
    above = [c for c in cls.__mro__[1:] if c in public]
    return all(inspect.getattr_static(c, name, None) is not thing for c in above)


def public_arguments() -> Iterator[str]:
    public = [getattr(module, name) for module in PREFIXES for name in module.__all__]
    for module, prefix in PREFIXES.items():
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.isclass(thing) and not inspect.isfunction(thing):
                continue  # an alias of types
            if name in RECORDS:
                yield name
                continue
            yield from (f"{prefix}{name}.{part}" for part in parameters(thing))
            for method, parts in methods(thing) if inspect.isclass(thing) else ():
                if is_own(thing, method, public):
                    yield from (f"{prefix}{name}.{method}.{part}" for part in parts)


def test_every_argument_of_every_public_call_is_tried() -> None:
    tried = {f"{name}.{argument}" for name, row in TABLE.items() for argument in row}
    named = {name for name in tried if "()." not in name}
    public = set(public_arguments())
    assert public - tried - set(EXCEPTIONS) == set()
    assert set(EXCEPTIONS) - public == set(), "exceptions that are none"
    assert named - public == set(), "rows of the table that are about nothing"
