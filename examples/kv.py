"""A key-value server for any Redis client: an example of a pipelining request/reply protocol.

Run it with `anypoll serve examples/kv.py:handler --port 6380`, or with `python examples/kv.py`, and
talk to it with `redis-cli -p 6380`. It speaks RESP2 and, after `HELLO 3`, RESP3; commands, options,
replies and error texts are those of Redis 7.0. From the bottom up:

- *Replies* are plain Python values, of which `encode` makes RESP: `str` is a status, `bytes` a bulk
  string, `None` a null, `dict` a map, and so on. An exception, `Error`, is an error line.
- *Requests* are taken off the connection by `read_request`. It holds a view no longer than until
  the next `await`: what is kept is copied, since a view keeps the whole block it points into.
  Lengths are checked before anything of that length is read, and long strings are read in pieces,
  so memory follows what has arrived, never what was announced.
- *Values* other than strings are objects, and their methods the commands on them; the methods of
  `Client` are all other commands. None of them awaits: a command is atomic.
- `handler` joins these. It never flushes: replies pile up in the writer while there are requests at
  hand, and go out in one system call when the reader has to wait for more.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import inspect
import itertools
import math
import re
import sys
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set as AbstractSet
from functools import partialmethod
from typing import Any, Final, NamedTuple, TypeAlias

import anyio

import anypoll

INT64: Final = 2**63
MAX_LINE: Final = 64 * 1024
MAX_BULK: Final = 512 * 1024 * 1024
PIECE: Final = 1024 * 1024  # of a longer string this much is read at a time
BY_REFERENCE: Final = 16 * 1024  # a string of this size is sent without being copied

NOT_AN_INTEGER: Final = "ERR value is not an integer or out of range"
SYNTAX_ERROR: Final = "ERR syntax error"
WRONG_TYPE: Final = "WRONGTYPE Operation against a key holding the wrong kind of value"

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
    """Put a reply into the client's version of RESP."""
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
        raise Error(f"ERR Protocol error: too big {what}") from None
    if not line.startswith(b"*"):
        return split(line.strip())
    return [await read_bulk(conn) for _ in range(parse_length(line))]


async def read_bulk(conn: anypoll.Connection) -> bytes:
    """Read one bulk string."""
    try:
        line = bytes(await conn.until(b"\r\n", max_bytes=MAX_LINE))
    except anyio.DelimiterNotFound:
        raise Error("ERR Protocol error: too big bulk count string") from None
    if not line.startswith(b"$"):
        raise Error(f"ERR Protocol error: expected '$', got '{chr(line[0])}'")
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
    if line.startswith(b"*"):
        error = "ERR Protocol error: invalid multibulk length"
        return integer(line[1:-2] if line.endswith(b"\r\n") else b"", error, most=999_999)
    return integer(line[1:-2], "ERR Protocol error: invalid bulk length", 0, MAX_BULK)


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
            raise Error("ERR Protocol error: unbalanced quotes in request")
        plain, double, single = match.groups(b"")
        words.append(plain + ESCAPE.sub(unescape, double) + single.replace(rb"\'", b"'"))
        position = match.end()
    return words


def unescape(match: re.Match[bytes]) -> bytes:
    """Return what an escape in double quotes stands for."""
    return bytes.fromhex(match[1].decode()) if match[1] else ESCAPES.get(match[2], match[2])


# --- Arguments ---


def latin(text: bytes) -> str:
    """Return bytes of the client's as text, whatever they are."""
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
    named = re.fullmatch(rb"[+-]?inf(?:inity)?", text, re.IGNORECASE)
    if named or re.fullmatch(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", text):
        value = float(text)
        if named or math.isfinite(value):
            return value + 0.0  # never -0
    raise Error("ERR value is not a valid float")


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
    """Return the time that deadlines are in; setting the clock does not change it."""
    return time.monotonic_ns() // 1_000_000


def options(words: Iterable[bytes], known: str, error: str = SYNTAX_ERROR) -> dict[str, bytes]:
    """Return the options given and their (first) arguments, for which `known` has stars."""
    names = {name.rstrip("*"): name.count("*") for name in known.split()} if words else {}
    given: dict[str, bytes] = {}
    rest = iter(words)
    for word in rest:
        name = latin(word).upper()
        arguments = [*itertools.islice(rest, names.get(name, 0))]
        if len(arguments) != names.get(name):
            raise Error(error.format(latin(word)))
        given[name] = arguments[0] if arguments else b""
    return given


# --- Patterns ---

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
    parts = [b""]
    for star, single, negation, members, literal in GLOB.findall(pattern):
        if star:
            parts.append(b"")
        elif literal:
            parts[-1] += re.escape(literal)
        else:
            parts[-1] += b"." if single else translate_class(negation, members)
    first, *rest = parts
    last = b".*" + rest.pop() if rest else b""
    found = [b"(?=(?P<p%d>.*?%b))(?P=p%d)" % (n, part, n) for n, part in enumerate(rest)]
    return re.compile(b"".join([b"(?s)", first, *found, last])).fullmatch


def translate_class(negation: bytes, members: bytes) -> bytes:
    """Translate what stands between brackets."""
    ranges = b""
    for escaped, low, high, single in GLOB_CLASS.findall(members):
        first, last = sorted(low + high or (escaped or single) * 2)
        ranges += b"\\x%02x-\\x%02x" % (first, last)
    return b"[%b%b]" % (negation, ranges) if ranges else b"." if negation else b"(?!)"


# --- The table of commands ---


class Command(NamedTuple):
    """A row. `least` and `most` count the words of a request."""

    owner: type
    call: Callable[..., Reply]
    least: int
    most: int
    keys: tuple[int, int, int]  # the first, the last, and the step from one to the next

    def describe(self, name: bytes) -> Reply:
        """Return the row as COMMAND does, without what is only known of the original."""
        arity = self.least if self.least == self.most else -self.least
        return [name, arity, set(), *self.keys, set(), [], [], []]


COMMANDS: Final[dict[tuple[bytes, ...], Command]] = {}
CONTAINERS: Final = {b"client", b"command", b"config"}  # they have subcommands
SPANS: Final = {"del_": (1, -1, 1), "exists": (1, -1, 1), "mget": (1, -1, 1), "mset": (1, -1, 2)}


def commands(owner: Any) -> Any:
    """Put a class's methods into the table, with their parameters as the arity.

    `del_` is DEL, and `client_id` is CLIENT ID; the commands on a value have its key in front.
    """
    for name in [name for name in vars(owner) if not name.startswith("_")]:
        method = getattr(owner, name)
        _, *parameters = inspect.signature(method).parameters.values()
        words = tuple(name.rstrip("_").encode().split(b"_"))
        size = len(words) + issubclass(owner, Value)
        is_open = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        least = size + sum(p.default is p.empty for p in parameters) - is_open
        most = sys.maxsize if is_open else size + len(parameters)
        key = int(issubclass(owner, Value) or any(p.name == "key" for p in parameters))
        COMMANDS[words] = Command(owner, method, least, most, SPANS.get(name, (key, key, key)))
        COMMANDS.setdefault(words[:1], Command(owner, method, 2, sys.maxsize, (0, 0, 0)))
    return owner


def arity_error(name: str) -> Error:
    return Error(f"ERR wrong number of arguments for '{name}' command")


def pops(count: bytes | None) -> int:
    return 1 if count is None else integer(count, "ERR value is out of range, must be positive", 0)


# --- Values ---


class Value:
    """A value that is not a string. An empty one is the same as none at all."""


@commands
class List(deque[bytes], Value):
    llen = deque.__len__

    def _push(self, extend: Callable[..., None], element: bytes, *more: bytes) -> Reply:
        extend(self, (element, *more))
        return len(self)

    lpush = partialmethod(_push, deque.extendleft)
    rpush = partialmethod(_push, deque.extend)

    def _pop(self, take: Callable[[List], bytes], count: bytes | None = None) -> Reply:
        size = min(pops(count), len(self))
        if not self:
            return None if count is None else ()
        return take(self) if count is None else [take(self) for _ in range(size)]

    lpop = partialmethod(_pop, deque.popleft)
    rpop = partialmethod(_pop, deque.pop)

    def lrange(self, start: bytes, stop: bytes) -> Reply:
        return [*itertools.islice(self, *clip(start, stop, len(self)))]


@commands
class Set(set[bytes], Value):
    scard = set.__len__

    def _change(self, change: Callable[..., None], member: bytes, *more: bytes) -> Reply:
        before = len(self)
        change(self, (member, *more))
        return abs(len(self) - before)

    sadd = partialmethod(_change, set.update)
    srem = partialmethod(_change, set.difference_update)

    def smembers(self) -> Reply:
        return self

    def sismember(self, member: bytes) -> Reply:
        return member in self

    def spop(self, count: bytes | None = None, *more: bytes) -> Reply:
        if more:
            raise Error(SYNTAX_ERROR)
        popped = {self.pop() for _ in range(min(pops(count), len(self)))}
        return next(iter(popped), None) if count is None else popped


@commands
class Hash(dict[bytes, bytes], Value):
    hlen = dict.__len__

    def hset(self, field: bytes, value: bytes, *more: bytes) -> Reply:
        if len(more) % 2:
            raise arity_error("hset")
        before = len(self)
        self[field] = value
        self.update(zip(more[::2], more[1::2], strict=True))
        return len(self) - before

    def hget(self, field: bytes) -> Reply:
        return self.get(field)

    def hdel(self, field: bytes, *more: bytes) -> Reply:
        return sum(self.pop(name, None) is not None for name in (field, *more))

    def hgetall(self) -> Reply:
        return self


@commands
class SortedSet(dict[bytes, float], Value):
    """A sorted set: the scores, and members in their order.

    It is popped at the front, and that must not move the rest: what is gone stays in the list,
    before `head`, until it is more than half of it.
    """

    def __init__(self) -> None:
        self.order: list[tuple[float, bytes]] = []
        self.head = 0

    def zadd(self, score: bytes, member: bytes, *more: bytes) -> Reply:
        if len(more) % 2:
            raise Error(SYNTAX_ERROR)
        scores = [*map(real, (score, *more[::2]))]
        return sum(map(self._put, (member, *more[1::2]), scores))

    def _put(self, member: bytes, score: float) -> bool:
        old = self.get(member)
        if score != old:
            if old is not None:
                del self.order[bisect_left(self.order, (old, member), self.head)]
            self[member] = score
            insort(self.order, (score, member), self.head)
        return old is None

    def _page(self, first: int, end: int) -> Pairs:
        page = self.order[self.head + first : self.head + end]
        return Pairs((member, score) for score, member in page)

    def zrange(self, start: bytes, stop: bytes, *words: bytes) -> Reply:
        with_scores = options(words, "WITHSCORES")
        page = self._page(*clip(start, stop, len(self)))
        return page if with_scores else [member for member, _ in page]

    def zpopmin(self, count: bytes | None = None, *more: bytes) -> Reply:
        if more:
            raise Error(SYNTAX_ERROR)
        popped = self._page(0, pops(count))
        for member, _ in popped:
            del self[member]
        self.head += len(popped)
        if self.head > len(self.order) // 2:
            del self.order[: self.head]
            self.head = 0
        return popped[0] if popped and count is None else popped


TYPES: Final[dict[type, str]] = {
    bytes: "string", List: "list", Set: "set", Hash: "hash", SortedSet: "zset", type(None): "none",
}  # fmt: skip


# --- The database ---


class Database:
    """Keys with values and deadlines; before each command, `expire` removes those that are due.

    SCAN promises every key that is there from its start to its end, whatever comes and goes
    meanwhile. So keys are numbered as they come, and a cursor is the number to go on from.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes | Value] = {}
        self.deadlines: dict[bytes, int] = {}
        self.due: list[tuple[int, bytes]] = []  # a heap of the deadlines, and of former ones
        self.births: dict[bytes, int] = {}
        self.numbers = itertools.count(1)
        self.scanned: list[tuple[int, bytes]] = []  # the births, and former ones, up to some scan

    def call(self, command: Command, key: bytes, *arguments: bytes) -> Reply:
        """Call a method of a value, or of a new one, which is kept if it is not left empty."""
        value = self.values.get(key)
        if isinstance(value, command.owner):
            reply = command.call(value, *arguments)
            if not value:
                self.delete(key)
            return reply
        reply = command.call(new := command.owner(), *arguments)
        if value is not None:  # only now: Redis looks at the arguments first
            raise Error(WRONG_TYPE)
        if new:
            self.put(key, new)
        return reply

    def string(self, key: bytes) -> bytes | None:
        """Return a string, if there is one."""
        value = self.values.get(key)
        if isinstance(value, Value):
            raise Error(WRONG_TYPE)
        return value

    def put(self, key: bytes, value: bytes | Value) -> None:
        """Set a value; a deadline stays."""
        if key not in self.values:
            self.births[key] = next(self.numbers)
        self.values[key] = value

    def delete(self, key: bytes) -> bool:
        """Remove a key; true if it was there."""
        self.deadlines.pop(key, None)
        self.births.pop(key, None)
        return self.values.pop(key, None) is not None

    def clear(self) -> None:
        """Remove all keys."""
        for store in (self.values, self.deadlines, self.due, self.births, self.scanned):
            store.clear()

    def set_deadline(self, key: bytes, end: int) -> None:
        """Let a key go at that time."""
        self.deadlines[key] = end
        heapq.heappush(self.due, (end, key))
        if len(self.due) > 2 * len(self.deadlines) + 100:
            self.due = sorted((end, key) for key, end in self.deadlines.items())

    def expire(self) -> None:
        """Remove the keys that are due."""
        while self.due and self.due[0][0] <= milliseconds():
            end, key = heapq.heappop(self.due)
            if self.deadlines.get(key) == end:
                self.delete(key)

    def scan(self, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """Return the cursor to go on from, 0 at the end, and some keys."""
        if len(self.scanned) > 2 * len(self.births):
            self.scanned.clear()
        latest = self.scanned[-1][0] if self.scanned else 0
        new = itertools.takewhile(lambda birth: birth[1] > latest, reversed(self.births.items()))
        self.scanned += reversed([(number, key) for key, number in new])
        start = bisect_left(self.scanned, (cursor, b""))
        page = self.scanned[start : start + count]
        following = self.scanned[start + count : start + count + 1]
        keys = [key for number, key in page if self.births.get(key) == number]
        return following[0][0] if following else 0, keys


# --- Connections, and the commands that are not on one value ---


@commands
class Client:
    """A connection's state, and the commands that need more than a value."""

    _ids = itertools.count(1)

    def __init__(self, db: Database) -> None:
        self.db = db
        self.number = next(self._ids)
        self.name = b""
        self.resp3 = False
        self.quitting = False

    def ping(self, message: bytes | None = None) -> Reply:
        return "PONG" if message is None else message

    def echo(self, message: bytes) -> Reply:
        return message

    def quit(self, *_: bytes) -> Reply:
        self.quitting = True
        return "OK"

    def select(self, index: bytes) -> Reply:
        if integer(index) != 0:
            raise Error("ERR DB index is out of range")
        return "OK"

    def hello(self, version: bytes | None = None, *words: bytes) -> Reply:
        error = "ERR Protocol version is not an integer or out of range"
        protocol = 2 + self.resp3 if version is None else integer(version, error)
        if protocol not in (2, 3):
            raise Error("NOPROTO unsupported protocol version")
        given = options(words, "AUTH** SETNAME*", "ERR Syntax error in HELLO option '{}'")
        if given.get("AUTH", b"default") != b"default":
            raise Error("WRONGPASS invalid username-password pair or user is disabled.")
        if "SETNAME" in given:
            self.client_setname(given["SETNAME"])
        self.resp3 = protocol == 3
        return {
            b"server": b"redis", b"version": b"7.0.15", b"proto": protocol, b"id": self.number,
            b"mode": b"standalone", b"role": b"master", b"modules": [],
        }  # fmt: skip

    def client_id(self) -> Reply:
        return self.number

    def client_getname(self) -> Reply:
        return self.name or None

    def client_setname(self, name: bytes) -> Reply:
        if not re.fullmatch(rb"[!-~]*", name):
            raise Error("ERR Client names cannot contain spaces, newlines or special characters.")
        self.name = name
        return "OK"

    def client_setinfo(self, attribute: bytes, value: bytes) -> Reply:
        if attribute.upper() not in (b"LIB-NAME", b"LIB-VER"):
            raise Error(f"ERR Unrecognized option '{latin(attribute)}'")
        return "OK"

    def config_get(self, pattern: bytes, *more: bytes) -> Reply:
        known = {b"appendonly": b"no", b"databases": b"1", b"maxmemory": b"0", b"save": b""}
        matches = [compile_glob(p.lower()) for p in (pattern, *more)]
        return {k: v for k, v in known.items() if any(match(k) for match in matches)}

    def command(self, *_: bytes) -> Reply:
        return [row.describe(words[0]) for words, row in COMMANDS.items() if len(words) == 1]

    def command_count(self) -> Reply:
        return sum(len(words) == 1 for words in COMMANDS)

    def command_docs(self, *names: bytes) -> Reply:
        return {}

    def info(self, *sections: bytes) -> Reply:
        counts = f"db0:keys={len(self.db.values)},expires={len(self.db.deadlines)},avg_ttl=0\r\n"
        facts = {
            "server": "# Server\r\nredis_version:7.0.15\r\nredis_mode:standalone\r\n",
            "replication": "# Replication\r\nrole:master\r\nconnected_slaves:0\r\n",
            "keyspace": "# Keyspace\r\n" + (counts if self.db.values else ""),
        }
        names = {latin(section).lower() for section in sections} - {"all", "default", "everything"}
        return Verbatim("\r\n".join(facts[n] for n in facts if n in names or not names).encode())

    def del_(self, key: bytes, *more: bytes) -> Reply:
        return sum(map(self.db.delete, (key, *more)))

    def exists(self, key: bytes, *more: bytes) -> Reply:
        return sum(name in self.db.values for name in (key, *more))

    def type(self, key: bytes) -> Reply:
        return TYPES[type(self.db.values.get(key))]

    def _expire(self, command: str, unit: int, key: bytes, amount: bytes, *words: bytes) -> Reply:
        flags = options(words, "NX XX GT LT", "ERR Unsupported option {}")
        clash = "GT and LT" if {"GT", "LT"} <= flags.keys() else "NX and XX, GT or LT"
        if clash == "GT and LT" or ("NX" in flags and len(flags) > 1):
            raise Error(f"ERR {clash} options at the same time are not compatible")
        new = deadline(command, amount, unit, -INT64)
        old = self.db.deadlines.get(key, math.inf)
        fails = {"NX": old < math.inf, "XX": old == math.inf, "GT": new <= old, "LT": new >= old}
        if key not in self.db.values or any(fails[flag] for flag in flags):
            return 0
        self.db.set_deadline(key, new)
        return 1

    expire = partialmethod(_expire, "expire", 1000)
    pexpire = partialmethod(_expire, "pexpire", 1)

    def pttl(self, key: bytes) -> int:
        if key not in self.db.values:
            return -2
        end = self.db.deadlines.get(key)
        return -1 if end is None else max(end - milliseconds(), 0)

    def ttl(self, key: bytes) -> Reply:
        left = self.pttl(key)
        return left if left < 0 else (left + 500) // 1000

    def persist(self, key: bytes) -> Reply:
        return self.db.deadlines.pop(key, None) is not None

    def keys(self, pattern: bytes) -> Reply:
        return [*filter(compile_glob(pattern), self.db.values)]

    def scan(self, cursor: bytes, *words: bytes) -> Reply:
        if not re.fullmatch(rb"[0-9]{1,20}", cursor):
            raise Error("ERR invalid cursor")
        given = options(words, "MATCH* COUNT* TYPE*")
        count = integer(given.get("COUNT", b"10"))
        if count < 1:
            raise Error(SYNTAX_ERROR)
        following, keys = self.db.scan(int(cursor), count)
        keys = [*filter(compile_glob(given.get("MATCH", b"*")), keys)]
        if "TYPE" in given:
            wanted = latin(given["TYPE"]).lower()
            keys = [key for key in keys if self.type(key) == wanted]
        return [b"%d" % following, keys]

    def dbsize(self) -> Reply:
        return len(self.db.values)

    def flushdb(self, *mode: bytes) -> Reply:
        if len(mode) > 1 or (mode and mode[0].upper() not in (b"SYNC", b"ASYNC")):
            raise Error(SYNTAX_ERROR)
        self.db.clear()
        return "OK"

    flushall = flushdb

    def set(self, key: bytes, value: bytes, *words: bytes) -> Reply:
        given = options(words, "EX* PX* NX XX KEEPTTL GET")
        if {"NX", "XX"} <= given.keys() or len({"EX", "PX", "KEEPTTL"} & given.keys()) > 1:
            raise Error(SYNTAX_ERROR)
        units = {"EX": 1000, "PX": 1}
        ends = [deadline("set", given[unit], units[unit], 1) for unit in given.keys() & units]
        old = self.db.string(key) if "GET" in given else None
        if ("XX" if key not in self.db.values else "NX") in given:
            return old
        if "KEEPTTL" not in given:
            self.db.deadlines.pop(key, None)
        self.db.put(key, value)
        for end in ends:
            self.db.set_deadline(key, end)
        return old if "GET" in given else "OK"

    def get(self, key: bytes) -> Reply:
        return self.db.string(key)

    def getdel(self, key: bytes) -> Reply:
        value = self.db.string(key)
        self.db.delete(key)
        return value

    def append(self, key: bytes, more: bytes) -> Reply:
        value = (self.db.string(key) or b"") + more
        if len(value) > MAX_BULK:
            raise Error("ERR string exceeds maximum allowed size (proto-max-bulk-len)")
        self.db.put(key, value)
        return len(value)

    def strlen(self, key: bytes) -> Reply:
        return len(self.db.string(key) or b"")

    def _add(self, by: int, key: bytes) -> Reply:
        old = self.db.string(key)
        total = by if old is None else integer(old) + by
        if not -INT64 <= total < INT64:
            raise Error("ERR increment or decrement would overflow")
        self.db.put(key, b"%d" % total)
        return total

    incr = partialmethod(_add, 1)
    decr = partialmethod(_add, -1)

    def incrby(self, key: bytes, increment: bytes) -> Reply:
        return self._add(integer(increment), key)

    def decrby(self, key: bytes, decrement: bytes) -> Reply:  # some clients know no DECR
        by = -integer(decrement)
        if by == INT64:
            raise Error("ERR decrement would overflow")
        return self._add(by, key)

    def mset(self, key: bytes, value: bytes, *more: bytes) -> Reply:
        if len(more) % 2:
            raise arity_error("mset")
        pairs = (key, value, *more)
        for name, string in zip(pairs[::2], pairs[1::2], strict=True):
            self.db.deadlines.pop(name, None)
            self.db.put(name, string)
        return "OK"

    def mget(self, key: bytes, *more: bytes) -> Reply:
        values = map(self.db.values.get, (key, *more))
        return [value if isinstance(value, bytes) else None for value in values]


# --- The server ---


def execute(client: Client, request: Sequence[bytes]) -> Reply:
    """Carry out a request."""
    client.db.expire()
    name = request[0].lower()
    words = (name, *(word.lower() for word in request[1:2])) if name in CONTAINERS else (name,)
    command = COMMANDS.get(words)
    if command is None:
        raise unknown(request)
    if not command.least <= len(request) <= command.most:
        raise arity_error(latin(b"|".join(words)))
    if command.owner is Client:
        return command.call(client, *request[len(words) :])
    return client.db.call(command, *request[1:])


def unknown(request: Sequence[bytes]) -> Error:
    """Return the error for a request that is not in the table."""
    name = latin(request[0])
    if request[0].lower() in CONTAINERS:
        subcommand = latin(request[1][:128])
        return Error(f"ERR unknown subcommand '{subcommand}'. Try {name.upper()} HELP.")
    shown = ""
    for argument in request[1:]:
        if len(shown) < 128:
            shown += f"'{latin(argument[: 128 - len(shown)])}' "
    return Error(f"ERR unknown command '{name[:128]}', with args beginning with: {shown}")


def answer(conn: anypoll.Connection, client: Client, request: Sequence[bytes]) -> None:
    """Carry out a request, and write the reply."""
    writer = conn.writer
    try:
        reply = execute(client, request)
    except Error as error:
        writer.write(error.encode())
        return
    if isinstance(reply, bytes) and len(reply) >= BY_REFERENCE:
        writer.write(b"$%d\r\n" % len(reply))
        writer.write(reply)
        writer.write(b"\r\n")
    else:
        writer.write(encode(reply, client.resp3))


DATABASE: Final = Database()


async def handler(conn: anypoll.Connection) -> None:
    """Serve a connection. What was written before a return still goes out."""
    client = Client(DATABASE)
    while not client.quitting:
        try:
            request = await read_request(conn)
        except (anyio.EndOfStream, anyio.IncompleteRead):
            return
        except Error as error:  # what follows would make no sense
            conn.writer.write(error.encode())
            return
        if request:
            answer(conn, client, request)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        anyio.run(functools.partial(anypoll.serve_forever, handler, host="127.0.0.1", port=6380))
