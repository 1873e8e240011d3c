"""A key-value server for any Redis client: an example of a pipelining request/reply protocol.

Start it with `anypoll serve examples/kv.py:handler --port 6380`, and talk to it with
`redis-cli -p 6380`. It speaks RESP2 and, after `HELLO 3`, RESP3; what it knows of Redis 7.0's
commands, it answers as Redis does. From the bottom up:

- *Replies* are plain Python values: `encode` makes RESP of a status (`str`), a bulk string
  (`bytes`), a null (`None`), a map (`dict`) and so on. An exception, `Error`, is an error line.
- *Requests* are read by `read_request`. What it keeps is a copy, for a view holds on to the whole
  block it points into. A length is checked before it is believed, and a long string is read in
  pieces: memory follows what has arrived, never what was announced.
- *Commands* are functions in a table; their parameters are the arity. None awaits: each is atomic.
- `handler` joins these. It never flushes: replies pile up in the writer while there are requests
  at hand, and go out in one system call when the reader has to wait for more, or at the end.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
import sys
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set as AbstractSet
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import anyio

import anypoll

INT64: Final = 2**63
MAX_LINE: Final = 64 * 1024
MAX_BULK: Final = 512 * 1024 * 1024
PIECE: Final = 1024 * 1024  # a longer string is read this much at a time
BY_REFERENCE: Final = 16 * 1024  # a string of this size is sent without being copied

NOT_AN_INTEGER: Final = "ERR value is not an integer or out of range"
SYNTAX_ERROR: Final = "ERR syntax error"
WRONG_ARITY: Final = "ERR wrong number of arguments for '{}' command"
PROTOCOL: Final = "ERR Protocol error: "

# --- Replies ---


class Verbatim(bytes):
    """Text for people; RESP3 marks it as such."""


class Pairs(list[tuple[bytes, float]]):
    """Members with scores; in RESP2 they all follow one another."""


Many: TypeAlias = "Sequence[Reply] | AbstractSet[Reply] | Mapping[bytes, Reply]"
Reply: TypeAlias = "int | float | str | bytes | Many | None"  # () is RESP2's null for an array


class Error(Exception):
    """An error line. What it quotes of a request is Latin-1, so that any byte will do."""

    def encode(self) -> bytes:
        return b"-%b\r\n" % str(self).replace("\r", " ").replace("\n", " ").encode("latin-1")


def encode(reply: Reply, resp3: bool) -> bytes:
    if isinstance(reply, bytes):
        if resp3 and isinstance(reply, Verbatim):
            return b"=%d\r\ntxt:%b\r\n" % (len(reply) + 4, reply)
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, float):
        return b",%.17g\r\n" % reply if resp3 else encode(b"%.17g" % reply, resp3)
    if isinstance(reply, str):
        return b"+%b\r\n" % reply.encode()
    if reply is None or reply == ():
        return b"_\r\n" if resp3 else b"$-1\r\n" if reply is None else b"*-1\r\n"
    mark, size, items = b"*", len(reply), iter(reply)
    if isinstance(reply, Mapping):
        items = itertools.chain.from_iterable(reply.items())
        mark, size = (b"%", size) if resp3 else (b"*", 2 * size)
    elif isinstance(reply, AbstractSet) and resp3:
        mark = b"~"
    elif isinstance(reply, Pairs) and not resp3:
        size, items = 2 * size, itertools.chain.from_iterable(reply)
    return b"%b%d\r\n%b" % (mark, size, b"".join([encode(item, resp3) for item in items]))


# --- Requests ---


async def read_request(conn: anypoll.Connection) -> list[bytes]:
    """Read an array of bulk strings, or a line as people type it; it may be empty."""
    try:
        line = bytes(await conn.until(b"\n", max_bytes=MAX_LINE))
    except anyio.DelimiterNotFound:
        is_array = bytes(conn.reader.peek_nowait(1)) == b"*"
        what = "mbulk count string" if is_array else "inline request"
        raise Error(f"{PROTOCOL}too big {what}") from None
    if not line.startswith(b"*"):
        return split(line.strip())
    return [await read_bulk(conn) for _ in range(parse_length(line))]


async def read_bulk(conn: anypoll.Connection) -> bytes:
    try:
        line = bytes(await conn.until(b"\r\n", max_bytes=MAX_LINE))
    except anyio.DelimiterNotFound:
        raise Error(f"{PROTOCOL}too big bulk count string") from None
    if not line.startswith(b"$"):
        raise Error(f"{PROTOCOL}expected '$', got '{chr(line[0])}'")
    length = parse_length(line)
    if length <= PIECE:
        return bytes((await conn.next(length + 2))[:-2])
    sizes = [PIECE] * (length // PIECE) + [length % PIECE]
    value = b"".join([await conn.reader.read_bytes(size) for size in sizes])
    await conn.skip(2)
    return value


@functools.lru_cache(1024)  # most requests have the same few; what is refused is not kept
def parse_length(line: bytes) -> int:
    """Return the number in a line such as `*3` or `$12`."""
    if line.startswith(b"$"):
        return integer(line[1:-2], f"{PROTOCOL}invalid bulk length", 0, MAX_BULK)
    digits = line[1:-2] if line.endswith(b"\r\n") else b""
    return integer(digits, f"{PROTOCOL}invalid multibulk length", most=999_999)


WORD: Final = re.compile(  # spaces, then anything, then perhaps a string in quotes of either kind
    rb"""(?s)\s*(?!\s)([^\s"']*)(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\'|\\(?!'))*)')?(?=\s|$)"""
)
ESCAPE: Final = re.compile(rb"(?s)\\(?:x([0-9a-fA-F]{2})|(.))")
ESCAPES: Final = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}


def split(line: bytes) -> list[bytes]:
    """Split a line into words, each of which may be, or end in, a quoted string."""
    words: list[bytes] = []
    position = 0
    while position < len(line):
        match = WORD.match(line, position)
        if match is None:
            raise Error(f"{PROTOCOL}unbalanced quotes in request")
        plain, double, single = match.groups(b"")
        words.append(plain + ESCAPE.sub(unescape, double) + single.replace(rb"\'", b"'"))
        position = match.end()
    return words


def unescape(match: re.Match[bytes]) -> bytes:
    return bytes.fromhex(match[1].decode()) if match[1] else ESCAPES.get(match[2], match[2])


# --- Arguments ---


def latin(text: bytes) -> str:
    return text.decode("latin-1")


def integer(
    text: bytes, error: str = NOT_AN_INTEGER, least: int = -INT64, most: int = INT64 - 1
) -> int:
    """Return an integer's value; it must be written in the one way that Redis accepts."""
    if re.fullmatch(rb"0|-?[1-9][0-9]{0,18}", text) and least <= int(text) <= most:
        return int(text)
    raise Error(error)


def real(text: bytes) -> float:
    """Return a score's value: no NaN, and infinity only by its name."""
    named = re.fullmatch(rb"(?i)[+-]?inf(?:inity)?", text)
    if named or re.fullmatch(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", text):
        value = float(text)
        if named or math.isfinite(value):
            return value + 0.0  # never -0
    raise Error("ERR value is not a valid float")


def pops(count: bytes | None) -> int:
    return 1 if count is None else integer(count, "ERR value is out of range, must be positive", 0)


def clip(start: bytes, stop: bytes, size: int) -> tuple[int, int]:
    """Turn a range with its end included, negative from the end, into one as slices have it."""
    first, last = integer(start), integer(stop)
    first = min(max(first + size if first < 0 else first, 0), size)
    last = min(last + size if last < 0 else last, size - 1)
    return first, max(first, last + 1)


def deadline(command: str, text: bytes, unit: int, least: int) -> int:
    """Return the time that it will be so many units from now."""
    amount, now = integer(text), milliseconds()
    if amount < least or not -INT64 <= amount * unit < INT64 - now:
        raise Error(f"ERR invalid expire time in '{command}' command")
    return now + amount * unit


def milliseconds() -> int:
    return time.monotonic_ns() // 1_000_000


def options(
    words: Iterable[bytes], error: str = SYNTAX_ERROR, **arguments: int
) -> dict[str, bytes]:
    """Return the options given, each with its first argument, if it has any."""
    given: dict[str, bytes] = {}
    rest = iter(words)
    for word in rest:
        name = latin(word).upper()
        values = [*itertools.islice(rest, arguments.get(name, 0))]
        if len(values) != arguments.get(name):
            raise Error(error.format(latin(word)))
        given[name] = values[0] if values else b""
    return given


GLOB: Final = re.compile(rb"(?s)(\*+)|(\?)|\[(\^?)((?:\\.|[^\]]-.|[^\]])*)\]?|\\?(.)")
GLOB_CLASS: Final = re.compile(rb"(?s)\\(.)|(.)-(.)|(.)")


@functools.lru_cache(64)
def compile_glob(pattern: bytes) -> Callable[[bytes], object]:
    """Return a function that tells whether a key matches.

    What stands between two stars is looked for once, from the left, and never again (an atomic
    group, as Python 3.10 can have it), so no pattern takes more time than length times length.
    """
    if len(pattern) > 4096:
        raise Error("ERR pattern is too long")
    first, *rest = GLOB.sub(translate, pattern).split(b"*")
    last = b".*" + rest.pop() if rest else b""
    found = [b"(?=(?P<p%d>.*?%b))(?P=p%d)" % (n, part, n) for n, part in enumerate(rest)]
    return re.compile(b"".join([b"(?s)", first, *found, last])).fullmatch


def translate(match: re.Match[bytes]) -> bytes:
    """Translate a part of a pattern into a regular expression, but leave it its stars."""
    star, single, negation, members, literal = match.groups()
    if star or single or literal:
        return b"*" if star else b"." if single else b"\\x%02x" % ord(literal)
    ranges = b""
    for escaped, low, high, plain in GLOB_CLASS.findall(members):
        ranges += b"\\x%02x-\\x%02x" % (*sorted(low + high or (escaped or plain) * 2),)
    return b"[%b%b]" % (negation, ranges) if ranges else b"." if negation else b"(?!)"


# --- The database ---


class SortedSet:
    """Members with their scores, and in their order."""

    def __init__(self) -> None:
        self.scores: dict[bytes, float] = {}
        self.order: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self.order)

    def put(self, member: bytes, score: float) -> bool:
        """Add a member, or move it; true if it was not there."""
        old = self.scores.get(member)
        if score != old:
            if old is not None:
                del self.order[bisect_left(self.order, (old, member))]
            self.scores[member] = score
            insort(self.order, (score, member))
        return old is None

    def page(self, start: int, stop: int) -> Pairs:
        return Pairs((member, score) for score, member in self.order[start:stop])


Value: TypeAlias = "bytes | deque[bytes] | set[bytes] | dict[bytes, bytes] | SortedSet"
TYPES: Final[dict[type, str]] = {
    bytes: "string", deque: "list", set: "set", dict: "hash", SortedSet: "zset", type(None): "none",
}  # fmt: skip
T = TypeVar("T", bound=Value)


class Database:
    """Keys with values and deadlines; a key that is due goes when it is looked at."""

    def __init__(self) -> None:
        self.values: dict[bytes, Value] = {}
        self.deadlines: dict[bytes, int] = {}
        self.numbers: dict[bytes, int] = {}  # of the keys, as they came: what SCAN's cursors are
        self.next_number = itertools.count(1)
        self.scanned: list[tuple[bytes, int]] = []
        self.sweep_at = 1000

    def find(self, key: bytes) -> Value | None:
        if key in self.deadlines and self.deadlines[key] <= milliseconds():
            self.delete(key)
        return self.values.get(key)

    def get(self, key: bytes, kind: type[T]) -> T | None:
        value = self.find(key)
        if value is None or isinstance(value, kind):
            return value
        raise Error("WRONGTYPE Operation against a key holding the wrong kind of value")

    def put(self, key: bytes, value: Value) -> None:
        """Set a value, and leave the deadline as it is."""
        if key not in self.values:
            self.numbers[key] = next(self.next_number)
        self.values[key] = value

    def delete(self, key: bytes) -> bool:
        """Remove a key; true if it was there, and not due."""
        due = self.deadlines.pop(key, math.inf) <= milliseconds()
        self.numbers.pop(key, None)
        return self.values.pop(key, None) is not None and not due

    def set_deadline(self, key: bytes, end: int) -> None:
        self.deadlines[key] = end
        if len(self.deadlines) > self.sweep_at:  # or keys that nobody looks at would stay
            self.sweep()
            self.sweep_at = 2 * len(self.deadlines) + 1000

    def sweep(self) -> None:
        """Remove all keys that are due."""
        now = milliseconds()
        for key in [key for key, end in self.deadlines.items() if end <= now]:
            self.delete(key)

    def scan(self, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """Return the cursor to go on from, 0 at the end, and some keys.

        Whatever comes and goes meanwhile: a key that stays is met. Every new scan takes a new list
        of the keys, and older scans can go on with it, since it has all that stayed.
        """
        self.sweep()
        if cursor == 0 or not self.scanned:
            self.scanned = [*self.numbers.items()]
        start = bisect_left(self.scanned, cursor, key=itemgetter(1))
        page = self.scanned[start : start + count]
        following = self.scanned[start + count : start + count + 1]
        if not following:
            self.scanned = []
        return following[0][1] if following else 0, [key for key, _ in page if key in self.values]


# --- Commands ---


class Client:
    """A connection's state."""

    ids = itertools.count(1)

    def __init__(self, db: Database) -> None:
        self.db = db
        self.number = next(self.ids)
        self.name = b""
        self.resp3 = False
        self.quitting = False


class Command(NamedTuple):
    owner: type
    call: Callable[..., Reply]
    first: tuple[object, ...]
    least: int
    most: int


COMMANDS: Final[dict[tuple[bytes, ...], Command]] = {}
CONTAINERS: Final = {b"client", b"command", b"config"}  # they have subcommands
F = TypeVar("F", bound=Callable[..., Reply])


def command(name: str, owner: type = Client, *first: object) -> Callable[[F], F]:
    """Make a function a command: on a client, or on the collection at the key that is given.

    Its parameters are those of the command, but for the owner and `first`, which it gets too.
    """

    def register(function: F) -> F:
        parameters = [*inspect.signature(function).parameters.values()][1 + len(first) :]
        is_open = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        words = tuple(name.lower().encode().split())
        size = len(words) + (owner is not Client)
        least = size + sum(p.default is p.empty for p in parameters) - is_open
        most = sys.maxsize if is_open else size + len(parameters)
        COMMANDS[words] = Command(owner, function, first, least, most)
        return function

    return register


def execute(client: Client, request: Sequence[bytes]) -> Reply:
    name = request[0].lower()
    words = (name, *(word.lower() for word in request[1:2])) if name in CONTAINERS else (name,)
    command = COMMANDS.get(words)
    if command is None and words not in {(container,) for container in CONTAINERS}:
        raise unknown(request)
    if command is None or not command.least <= len(request) <= command.most:
        raise Error(WRONG_ARITY.format(latin(b"|".join(words))))
    if command.owner is Client:
        return command.call(client, *command.first, *request[len(words) :])
    return call_on_collection(client.db, command, *request[1:])


def call_on_collection(db: Database, command: Command, key: bytes, *arguments: bytes) -> Reply:
    """Carry out a command on a collection; an empty one is the same as none at all."""
    value = db.find(key)
    is_right = isinstance(value, command.owner)
    collection = value if is_right else command.owner()
    reply = command.call(collection, *command.first, *arguments)
    if value is not None and not is_right:  # only now: Redis looks at the arguments first
        db.get(key, command.owner)
    if not collection:
        db.delete(key)
    elif value is None:
        db.put(key, collection)
    return reply


def unknown(request: Sequence[bytes]) -> Error:
    name = latin(request[0])
    if request[0].lower() in CONTAINERS:
        subcommand = latin(request[1][:128])
        return Error(f"ERR unknown subcommand '{subcommand}'. Try {name.upper()} HELP.")
    shown = ""
    for argument in request[1:]:
        if len(shown) < 128:
            shown += f"'{latin(argument[: 128 - len(shown)])}' "
    return Error(f"ERR unknown command '{name[:128]}', with args beginning with: {shown}")


# PLACEHOLDER
