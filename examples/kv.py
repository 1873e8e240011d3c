"""A key-value server for any Redis client: an example of a pipelining request/reply protocol.

Start it with `anypoll serve examples/kv.py:handler --port 6380`, and talk to it with
`redis-cli -p 6380`. It speaks RESP2 and, after `HELLO 3`, RESP3, and answers as Redis 7.0 does.

What is kept of a request is copied: a view would hold on to its whole block. Lengths are checked
before they are believed, and long strings read in pieces: memory follows what has arrived, not what
was announced. `handler` never flushes: replies pile up in the writer while there are requests at
hand, and go out in one system call when the reader has to wait. No command awaits: each is atomic.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import anyio

import anypoll

INT64: Final = range(-(2**63), 2**63)
COUNTS: Final = range(-(2**63), 1_000_000)  # of the strings in a request
LENGTHS: Final = range(512 * 1024 * 1024 + 1)  # of a string
IDS: Final = itertools.count(1)  # of connections
BIG: Final = 256 * 1024  # a longer string is read in pieces, and sent without being copied
NOT_INTEGER: Final = b"ERR value is not an integer or out of range"
SYNTAX_ERROR: Final = b"ERR syntax error"
WRONG_ARITY: Final = b"ERR wrong number of arguments for '%b' command"
WRONG_TYPE: Final = b"WRONGTYPE Operation against a key holding the wrong kind of value"
BAD_COUNT: Final = b"ERR Protocol error: invalid multibulk length"


class Error(Exception):
    """An error line, in bytes."""


def require(condition: bool, error: bytes) -> str:
    if not condition:
        raise Error(error)
    return "OK"


async def read_request(conn: anypoll.Connection) -> list[bytes]:
    """Read an array of bulk strings, or a line as people type it; it may be empty."""
    line = bytes(await conn.until(b"\n"))
    if not line.startswith(b"*"):
        return split(line[:-1].removesuffix(b"\r"))
    request = []
    for _ in range(integer(line[1:].removesuffix(b"\r\n"), BAD_COUNT, COUNTS)):
        line = bytes(await conn.until(b"\r\n"))
        if not line.startswith(b"$"):
            raise Error(b"ERR Protocol error: expected '$', got '%b'" % line[:1])
        length = integer(line[1:-2], b"ERR Protocol error: invalid bulk length", LENGTHS)
        if length <= BIG:
            request.append(bytes((await conn.next(length + 2))[:-2]))
        else:
            sizes = [BIG] * (length // BIG) + [length % BIG]
            request.append(b"".join([await conn.reader.read_bytes(size) for size in sizes]))
            await conn.skip(2)
    return request


# A word may go on with one part in quotes, and ends with that.
WORD: Final = re.compile(
    rb"""(?s)([^ \t\n\r"']*)"""
    rb"""(?:"((?:[^"\\]|\\.)*)"(?!\S)|'((?:[^'\\]|\\'|\\(?!'))*)'(?!\S)|(?=[ \t\n\r]|\Z))\s*"""
)
ESCAPED: Final = re.compile(rb"(?s)\\(?:x([0-9a-fA-F]{2})|(.))")
ESCAPES: Final = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}


def split(line: bytes) -> list[bytes]:
    """Split a line into words, which may be quoted as Redis has it."""
    if not re.search(rb"[\"'\v\f]", line):
        return line.split()
    words: list[bytes] = []
    line, end = line.lstrip(), 0
    while end < len(line):
        word = WORD.match(line, end)
        if word is None:
            raise Error(b"ERR Protocol error: unbalanced quotes in request")
        plain, double, single = word.groups(b"")
        words.append(plain + ESCAPED.sub(unescaped, double) + single.replace(b"\\'", b"'"))
        end = word.end()
    return words


def unescaped(match: re.Match[bytes]) -> bytes:
    digits, letter = match.groups()
    return bytes([int(digits, 16)]) if digits else ESCAPES.get(letter, letter)


def encode(reply: Any, resp3: bool) -> bytes:
    """Make RESP of a value: a `str` is a status, `()` RESP2's null for an array, a `bytearray` text
    for people, and a list of tuples are pairs, which RESP2 has flat.
    """
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, bytearray):
        text = bytes(reply)
        return b"=%d\r\ntxt:%b\r\n" % (len(text) + 4, text) if resp3 else encode(text, resp3)
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, float):
        return b",%.17g\r\n" % reply if resp3 else encode(b"%.17g" % reply, resp3)
    if isinstance(reply, str):
        return b"+%b\r\n" % reply.encode()
    if isinstance(reply, Error):
        return b"-%b\r\n" % reply.args[0].replace(b"\r", b" ").replace(b"\n", b" ")
    if reply is None or reply == ():
        return b"_\r\n" if resp3 else b"$-1\r\n" if reply is None else b"*-1\r\n"
    is_map = isinstance(reply, dict)
    items = [*(reply.items() if is_map else reply)]
    size, mark = len(items), b"%" if is_map else b"~" if isinstance(reply, set) else b"*"
    if items and isinstance(items[0], tuple) and (is_map or not resp3):
        items = [*itertools.chain.from_iterable(items)]
    mark, size = (mark, size) if resp3 else (b"*", len(items))
    return b"%b%d\r\n%b" % (mark, size, b"".join([encode(item, resp3) for item in items]))


@lru_cache(1024)  # the lengths in requests are few; what is refused is not kept
def integer(text: bytes, error: bytes = NOT_INTEGER, allowed: range = INT64) -> int:
    """Return an integer's value; it must be written in the one way that Redis accepts."""
    if re.fullmatch(rb"0|-?[1-9][0-9]{0,18}", text) and int(text) in allowed:
        return int(text)
    raise Error(error)


def real(text: bytes) -> float:
    """Return a score's value: no NaN, and infinity only by its name."""
    is_name = re.fullmatch(rb"(?i)[+-]?inf(inity)?", text)
    is_number = re.fullmatch(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text)
    if is_name or (is_number and math.isfinite(float(text))):
        return float(text) + 0.0  # never -0
    raise Error(b"ERR value is not a valid float")


def span(start: bytes, stop: bytes, size: int) -> tuple[int, int]:
    """Turn a range with its end included, negative from the end, into one as slices have it."""
    first, last = (n + size if n < 0 else n for n in (integer(start), integer(stop)))
    return min(max(first, 0), size), min(max(last + 1, 0), size)


def deadline(command: bytes, text: bytes, unit: int, least: int) -> int:
    amount, now = integer(text), milliseconds()
    is_valid = amount >= least and amount * unit in INT64 and now + amount * unit in INT64
    require(is_valid, b"ERR invalid expire time in '%b' command" % command)
    return now + amount * unit


def milliseconds() -> int:
    return time.monotonic_ns() // 1_000_000


def paired(error: bytes, *words: bytes) -> list[tuple[bytes, bytes]]:
    require(bool(words) and len(words) % 2 == 0, error)
    return [*zip(words[::2], words[1::2], strict=True)]


def options(words: Sequence[bytes], error: bytes, **sizes: int) -> dict[str, bytes]:
    """Return the options that are given, each with the first of as many arguments as it takes."""
    given: dict[str, bytes] = {}
    rest = iter(words)
    for word in rest:
        name = word.decode("latin-1").upper()
        arguments = [*itertools.islice(rest, sizes.get(name, 0))]
        require(len(arguments) == sizes.get(name), error.replace(b"%b", word))
        given[name] = b"".join(arguments[:1])
    return given


GLOB: Final = re.compile(rb"(?s)(\*+)|(\?)|\[(\^?)((?:\\.|[^\]]-.|[^\]])*)\]?|\\?(.)")
GLOB_CLASS: Final = re.compile(rb"(?s)\\(.)|(.)-(.)|(.)")


@lru_cache(64)
def compile_glob(pattern: bytes) -> Callable[[bytes], object]:
    """Return a function that tells whether a key matches."""
    require(len(pattern) <= 4096, b"ERR pattern is too long")
    first, *rest = GLOB.sub(translate, pattern).split(b"*")
    last = b".*" + rest.pop() if rest else b""
    # Atomic groups: what was found is never looked for again.
    found = [b"(?>.*?%b)" % part for part in rest]
    return re.compile(b"".join([b"(?s)", first, *found, last])).fullmatch


def translate(match: re.Match[bytes]) -> bytes:
    star, single, negation, members, literal = match.groups()
    if star or single or literal:
        return b"*" if star else b"." if single else b"\\x%02x" % ord(literal)
    ranges = b""
    for escaped, low, high, plain in GLOB_CLASS.findall(members):
        ranges += b"\\x%02x-\\x%02x" % (*sorted(low + high or (escaped or plain) * 2),)
    return b"[%b%b]" % (negation, ranges) if ranges else b"." if negation else b"(?!)"


class SortedSet(dict[bytes, float]):
    """Members with their scores, and in their order."""

    def __init__(self) -> None:
        self.order: list[tuple[float, bytes]] = []

    def add(self, *pairs: bytes) -> Any:
        old = len(self)
        for member, score in [(m, real(s)) for s, m in paired(SYNTAX_ERROR, *pairs)]:
            if member in self:
                del self.order[bisect_left(self.order, (self[member], member))]
            self[member] = score
            insort(self.order, (score, member))
        return len(self) - old

    def pop_min(self, size: int) -> list[tuple[bytes, float]]:
        page = self.order[:size]
        del self.order[:size]
        return [(member, self.pop(member)) for _, member in page]

    def range(self, start: bytes, stop: bytes, *words: bytes) -> Any:
        with_scores = options(words, SYNTAX_ERROR, WITHSCORES=0)
        page = self.order[slice(*span(start, stop, len(self)))]
        return [(member, score) if with_scores else member for score, member in page]


TYPES: Final[Any] = {bytes: "string", deque: "list", set: "set", dict: "hash", SortedSet: "zset"}


class Database:
    """Keys with values and deadlines; a key that is due goes when it is looked at."""

    def __init__(self) -> None:
        self.values: dict[bytes, Any] = {}
        self.deadlines: dict[bytes, int] = {}
        self.scanned: list[tuple[int, bytes]] = []

    def find(self, key: bytes) -> Any:
        if key in self.deadlines and self.deadlines[key] <= milliseconds():
            del self.values[key], self.deadlines[key]
        return self.values.get(key)

    def string(self, key: bytes) -> bytes | None:
        value: bytes | None = self.find(key)
        require(value is None or isinstance(value, bytes), WRONG_TYPE)
        return value

    def delete(self, key: bytes) -> Any:
        value = self.find(key)
        self.deadlines.pop(key, None)
        self.values.pop(key, None)
        return value

    def sweep(self) -> dict[bytes, Any]:
        for key in [*self.deadlines]:
            self.find(key)
        return self.values

    def scan(self, cursor: bytes, *words: bytes) -> Any:
        require(re.fullmatch(rb"[0-9]{1,20}", cursor) is not None, b"ERR invalid cursor")
        given = options(words, SYNTAX_ERROR, MATCH=1, COUNT=1, TYPE=1)
        count = integer(given.get("COUNT", b"10"))
        require(count > 0, SYNTAX_ERROR)
        if int(cursor) == 0:  # sorted anew, which skips no key that stays in another scan
            self.scanned = sorted((hash(key) % 2**62, key) for key in self.sweep())
        start = bisect_left(self.scanned, (int(cursor), b""))
        page = self.scanned[start : start + count + 1]
        following = page.pop()[0] if len(page) > count else 0
        keys = [key for _, key in page if self.find(key) is not None]
        keys = [*filter(compile_glob(given.get("MATCH", b"*")), keys)]
        if "TYPE" in given:
            wanted = given["TYPE"].decode("latin-1").lower()
            keys = [key for key in keys if TYPES[type(self.values[key])] == wanted]
        return [b"%d" % following, keys]

    def flush(self, mode: bytes = b"SYNC", *more: bytes) -> Any:
        require(not more and mode.upper() in (b"SYNC", b"ASYNC"), SYNTAX_ERROR)
        self.values.clear()
        self.deadlines.clear()
        return "OK"

    def ttl(self, key: bytes, unit: int) -> int:
        if self.find(key) is None or key not in self.deadlines:
            return -1 if key in self.values else -2
        return (self.deadlines[key] - milliseconds() + unit // 2) // unit

    def expire(self, key: bytes, amount: bytes, command: bytes, unit: int) -> Any:
        end = deadline(command, amount, unit, INT64.start)
        if is_there := self.find(key) is not None:
            self.deadlines[key] = end
        return is_there

    def info(self, *sections: bytes) -> Any:
        sizes = len(self.sweep()), len(self.deadlines)
        counts = b"db0:keys=%d,expires=%d,avg_ttl=0\r\n" % sizes if sizes[0] else b""
        return bytearray(b"# Server\r\nredis_version:7.0.15\r\n\r\n# Keyspace\r\n" + counts)

    def set(self, key: bytes, value: bytes, *words: bytes) -> Any:
        given = options(words, SYNTAX_ERROR, EX=1, PX=1, NX=0, XX=0, KEEPTTL=0, GET=0)
        for group in ({"NX", "XX"}, {"EX", "PX", "KEEPTTL"}):
            require(len(group & given.keys()) < 2, SYNTAX_ERROR)
        units = {"EX": 1000, "PX": 1}
        ends = [deadline(b"set", given[n], units[n], 1) for n in units if n in given]
        old = self.string(key) if "GET" in given else None
        if ("XX" if self.find(key) is None else "NX") in given:
            return old
        if "KEEPTTL" not in given:
            self.deadlines.pop(key, None)
        self.values[key] = value
        for end in ends:
            self.deadlines[key] = end
        return old if "GET" in given else "OK"

    def mset(self, *pairs: bytes) -> Any:
        for key, value in paired(WRONG_ARITY % b"mset", *pairs):
            self.deadlines.pop(key, None)
            self.values[key] = value
        return "OK"

    def mget(self, key: bytes, *more: bytes) -> Any:
        return [v if isinstance(v, bytes) else None for v in map(self.find, (key, *more))]

    def append(self, key: bytes, more: bytes) -> Any:
        value = (self.string(key) or b"") + more
        error = b"ERR string exceeds maximum allowed size (proto-max-bulk-len)"
        require(len(value) in LENGTHS, error)
        self.values[key] = value
        return len(value)

    def add(self, key: bytes, amount: bytes, sign: int = 1) -> Any:
        by, old = sign * integer(amount), self.string(key)
        require(by in INT64, b"ERR decrement would overflow")
        total = by if old is None else by + integer(old)
        require(total in INT64, b"ERR increment or decrement would overflow")
        self.values[key] = b"%d" % total
        return total


class Client:
    def __init__(self) -> None:
        self.id = next(IDS)
        self.name = b""
        self.resp3 = False

    def hello(self, version: bytes | None = None, *words: bytes) -> Any:
        error = b"ERR Protocol version is not an integer or out of range"
        protocol = 2 + self.resp3 if version is None else integer(version, error)
        require(protocol in (2, 3), b"NOPROTO unsupported protocol version")
        given = options(words, b"ERR Syntax error in HELLO option '%b'", AUTH=2, SETNAME=1)
        error = b"WRONGPASS invalid username-password pair or user is disabled."
        require(given.get("AUTH", b"default") == b"default", error)
        self.set_name(given.get("SETNAME", self.name))
        self.resp3 = protocol == 3
        return {
            b"server": b"redis", b"version": b"7.0.15", b"proto": protocol, b"id": self.id,
            b"mode": b"standalone", b"role": b"master", b"modules": [],
        }  # fmt: skip

    def set_name(self, name: bytes) -> Any:
        error = b"ERR Client names cannot contain spaces, newlines or special characters."
        require(re.fullmatch(rb"[!-~]*", name) is not None, error)
        self.name = name
        return "OK"

    def config(self, *patterns: bytes) -> Any:
        known = {b"appendonly": b"no", b"databases": b"1", b"maxmemory": b"0", b"save": b""}
        return {n: known[n] for p in patterns for n in filter(compile_glob(p.lower()), known)}


def changed(items: Any, how: Callable[..., object], what: object) -> Any:
    before = len(items)
    how(items, what)
    return abs(len(items) - before)


def pop(items: Any, take: Any, nothing: Any, count: bytes | None = None, *more: bytes) -> Any:
    """Take one item, or as a collection as many as are asked for; `nothing` has both kinds."""
    require(not more, SYNTAX_ERROR)
    error = b"ERR value is out of range, must be positive"
    size = min(1 if count is None else integer(count, error, range(2**63)), len(items))
    if not items:
        return nothing[count is not None]
    popped = [take(items) for _ in range(size)] if take else items.pop_min(size)
    return popped[0] if count is None else {*popped} if isinstance(items, set) else popped


# By what a function gets first. A collection is the one under the key that the client gives.
FUNCTIONS: Final[dict[type, dict[str, Callable[..., Any]]]] = {
    Client: {
        "PING": lambda client, message="PONG": message,
        "ECHO": lambda client, message: message,
        "QUIT": lambda client, *_: "OK",
        "SELECT": lambda _, index: require(integer(index) == 0, b"ERR DB index is out of range"),
        "HELLO": Client.hello,
        "CLIENT": lambda client, subcommand: None,
        "CLIENT GETNAME": lambda client: client.name or None,
        "CLIENT ID": lambda client: client.id,
        "CLIENT SETINFO": lambda client, attribute, value: "OK",
        "CLIENT SETNAME": Client.set_name,
        "COMMAND": lambda client: [],
        "COMMAND COUNT": lambda client: sum(b" " not in name for name in COMMANDS),
        "COMMAND DOCS": lambda client, *names: {},
        "CONFIG": lambda client, subcommand: None,
        "CONFIG GET": lambda client, pattern, *more: client.config(pattern, *more),
    },
    Database: {
        "INFO": Database.info,
        "DBSIZE": lambda db: len(db.sweep()),
        "FLUSHALL": Database.flush,
        "FLUSHDB": Database.flush,
        "KEYS": lambda db, pattern: [*filter(compile_glob(pattern), db.sweep())],
        "SCAN": Database.scan,
        "DEL": lambda db, key, *more: sum(db.delete(k) is not None for k in (key, *more)),
        "EXISTS": lambda db, key, *more: sum(db.find(k) is not None for k in (key, *more)),
        "TYPE": lambda db, key: TYPES.get(type(db.find(key)), "none"),
        "EXPIRE": lambda db, key, amount: db.expire(key, amount, b"expire", 1000),
        "PEXPIRE": lambda db, key, amount: db.expire(key, amount, b"pexpire", 1),
        "TTL": lambda db, key: db.ttl(key, 1000),
        "PTTL": lambda db, key: db.ttl(key, 1),
        "PERSIST": lambda db, key: db.ttl(key, 1) >= 0 and bool(db.deadlines.pop(key)),
        "GET": Database.string,
        "GETDEL": lambda db, key: (db.string(key), db.delete(key))[0],
        "SET": Database.set,
        "MGET": Database.mget,
        "MSET": Database.mset,
        "APPEND": Database.append,
        "STRLEN": lambda db, key: len(db.string(key) or b""),
        "INCR": lambda db, key: db.add(key, b"1"),
        "DECR": lambda db, key: db.add(key, b"-1"),
        "INCRBY": lambda db, key, amount: db.add(key, amount),
        "DECRBY": lambda db, key, amount: db.add(key, amount, -1),
    },
    deque: {
        "LPUSH": lambda items, item, *more: items.extendleft((item, *more)) or len(items),
        "RPUSH": lambda items, item, *more: items.extend((item, *more)) or len(items),
        "LPOP": lambda items, count=None: pop(items, deque.popleft, (None, ()), count),
        "RPOP": lambda items, count=None: pop(items, deque.pop, (None, ()), count),
        "LLEN": len,
        "LRANGE": lambda v, start, stop: [*itertools.islice(v, *span(start, stop, len(v)))],
    },
    set: {
        "SADD": lambda items, item, *more: changed(items, set.update, (item, *more)),
        "SREM": lambda items, item, *more: changed(items, set.difference_update, (item, *more)),
        "SPOP": lambda items, *count: pop(items, set.pop, (None, set()), *count),
        "SMEMBERS": lambda items: items,
        "SISMEMBER": lambda items, item: item in items,
        "SCARD": len,
    },
    dict: {
        "HSET": lambda h, *pairs: changed(h, dict.update, paired(WRONG_ARITY % b"hset", *pairs)),
        "HGET": lambda items, field: items.get(field),
        "HDEL": lambda h, field, *more: sum(h.pop(f, None) is not None for f in (field, *more)),
        "HGETALL": lambda items: items,
        "HLEN": len,
    },
    SortedSet: {
        "ZADD": lambda items, score, member, *more: items.add(score, member, *more),
        "ZRANGE": SortedSet.range,
        "ZPOPMIN": lambda items, *count: pop(items, None, ([], []), *count),
    },
}


def arity(function: Callable[..., Any]) -> tuple[int, float]:
    parameters = inspect.signature(function).parameters.values()
    is_open = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    least = sum(p.default is p.empty for p in parameters) - is_open
    return least, math.inf if is_open else len(parameters)


COMMANDS: Final[dict[bytes, tuple[type, Callable[..., Any], int, float]]] = {
    name.lower().encode(): (kind, function, *arity(function))
    for kind, functions in FUNCTIONS.items()
    for name, function in functions.items()
}
DATABASE: Final = Database()
CONTAINERS: Final = {b"client", b"command", b"config"}  # of subcommands


def execute(client: Client, request: Sequence[bytes]) -> Any:
    name, *arguments = request
    name = name.lower()
    if name in CONTAINERS and arguments:
        name += b" " + arguments.pop(0).lower()
    if name not in COMMANDS:
        raise unknown(request)
    kind, function, least, most = COMMANDS[name]
    owner = client if kind is Client else DATABASE if kind is Database else None
    if not least <= len(arguments) + (owner is not None) <= most:
        raise Error(WRONG_ARITY % name.replace(b" ", b"|"))
    if owner is not None:
        return function(owner, *arguments)
    key, *arguments = arguments
    value = DATABASE.find(key)
    items = value if type(value) is kind else kind()
    reply = function(items, *arguments)
    require(value is None or value is items, WRONG_TYPE)  # Redis looks at the arguments first
    if items:
        DATABASE.values[key] = items
    else:  # the same as none
        DATABASE.delete(key)
    return reply


def unknown(request: Sequence[bytes]) -> Error:
    if request[0].lower() in CONTAINERS:
        text = b"ERR unknown subcommand '%b'. Try %b HELP."
        return Error(text % (as_text(request[1])[:128], request[0].upper()))
    shown = b""
    for word in request[1:]:
        if len(shown) < 128:
            shown += b"'%b' " % as_text(word)[: 128 - len(shown)]
    text = b"ERR unknown command '%b', with args beginning with: %b"
    return Error(text % (as_text(request[0])[:128], shown))


def as_text(word: bytes) -> bytes:
    """Return what C takes for the string."""
    return word.partition(b"\0")[0]


async def handler(conn: anypoll.Connection) -> None:
    client = Client()
    name = b""
    try:
        while name != b"quit":
            if request := await read_request(conn):
                name = request[0].lower()
                try:
                    reply = execute(client, request)
                except Error as error:
                    reply = error
                if isinstance(reply, bytes) and len(reply) > BIG:
                    for part in (b"$%d\r\n" % len(reply), reply, b"\r\n"):
                        conn.writer.write(part)
                else:
                    conn.writer.write(encode(reply, client.resp3))
    except Error as error:  # what follows would make no sense
        conn.writer.write(encode(error, client.resp3))
    except anyio.DelimiterNotFound:
        kinds = {b"*": b"mbulk count string", b"$": b"bulk count string"}
        kind = kinds.get(bytes(conn.reader.peek_nowait(1)), b"inline request")
        conn.writer.write(b"-ERR Protocol error: too big %b\r\n" % kind)
