"""`examples/kv.py`, spoken to in raw RESP. The replies in the tables are those of Redis 7.0.15."""

from __future__ import annotations

import contextlib
import itertools
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from types import ModuleType
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream
from peers import MIB, resident

import anypoll

pytestmark = pytest.mark.anyio

WRONG_TYPE = b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"
NOT_AN_INTEGER = b"-ERR value is not an integer or out of range\r\n"
NOT_POSITIVE = b"-ERR value is out of range, must be positive\r\n"
NOT_A_FLOAT = b"-ERR value is not a valid float\r\n"
SYNTAX_ERROR = b"-ERR syntax error\r\n"
OVERFLOW = b"-ERR increment or decrement would overflow\r\n"
BAD_NAME = b"-ERR Client names cannot contain spaces, newlines or special characters.\r\n"
BAD_INDEX = b"-ERR DB index is out of range\r\n"

#: Commands, and their replies one after the other, with spaces for the ends of lines; or, if it is
#: bytes, the reply that each of them gets.
Table = list[tuple[str, str | bytes]]


def arity(command: str) -> bytes:
    return b"-ERR wrong number of arguments for '%b' command\r\n" % command.encode()


def expire_time(command: str) -> bytes:
    return b"-ERR invalid expire time in '%b' command\r\n" % command.encode()


STRINGS: Table = [
    ("SET k v; GET k; GET missing", "+OK $1 v $-1"),
    ("SET k w NX; SET new w nx; SET k w XX; SET missing w XX", "$-1 +OK +OK $-1"),
    ("SET k x GET; GET k; SET missing x XX GET; SET fresh x GET", "$1 w $1 x $-1 $-1"),
    ("SET k y NX GET; GET k", "$1 x $1 x"),
    ("SET k v EX 100; TTL k; SET k v KEEPTTL; TTL k; SET k v; TTL k", "+OK :100 +OK :100 +OK :-1"),
    ("SET k v PX 100000; TTL k; SET k v px 100000 xx get", "+OK :100 $1 v"),
    ("SET k v EX 0; SET k v PX -1; SET k v EX 9223372036854775807", expire_time("set")),
    ("SET k v EX 9223372036854776; SET k v PX 9223372036854775807", expire_time("set")),
    ("SET k v EX x", NOT_AN_INTEGER),
    ("SET k v EX; SET k v NX XX; SET k v EX 1 PX 1", SYNTAX_ERROR),
    ("SET k v KEEPTTL EX 1; SET k v BAD", SYNTAX_ERROR),
    ("GETDEL k; GETDEL k", "$1 v $-1"),
    ("APPEND a 12; APPEND a 34; GET a; STRLEN a; STRLEN missing", ":2 :4 $4 1234 :4 :0"),
    ("MSET a 1 b 2; MGET a missing b", "+OK *3 $1 1 $-1 $1 2"),
    ("SET empty ''; GET empty; STRLEN empty", "+OK $0  :0"),
    ("INCR empty", NOT_AN_INTEGER),
]

INTEGERS: Table = [
    ("INCR n; INCR n; DECR n; INCRBY n 10", ":1 :2 :1 :11"),
    ("INCRBY n -20; GET n; DECR m", ":-9 $2 -9 :-1"),
    ("SET n 9223372036854775807", "+OK"),
    ("INCR n; INCRBY n 1", OVERFLOW),
    ("DECR n; SET n -9223372036854775808", ":9223372036854775806 +OK"),
    ("DECR n; INCRBY n -9223372036854775808", OVERFLOW),
    ("INCRBY n 9223372036854775808; INCRBY n +1; INCRBY n ' 1'; INCRBY n 01", NOT_AN_INTEGER),
    ("INCRBY n 1_0; INCRBY n 1.0; INCRBY n -0; INCRBY n ''", NOT_AN_INTEGER),
    ("INCRBY n 0; SET n ' 1'", ":-9223372036854775808 +OK"),
    ("INCR n", NOT_AN_INTEGER),
    ("SET n 007", "+OK"),
    ("INCR n", NOT_AN_INTEGER),
    ("SET n text", "+OK"),
    ("INCRBY n 5; DECRBY n x", NOT_AN_INTEGER),
    ("SET n 5; DECRBY n 7", "+OK :-2"),
    ("DECRBY n -9223372036854775808", b"-ERR decrement would overflow\r\n"),
    ("DECRBY n 9223372036854775807", OVERFLOW),
]

KEYS: Table = [
    ("DBSIZE; MSET a 1 b 2 c 3; DBSIZE; EXISTS a b missing a", ":0 +OK :3 :3"),
    ("DEL a b missing a; DBSIZE; TYPE c; TYPE missing", ":2 :1 +string +none"),
    ("RPUSH l x; SADD s x; HSET h f x; ZADD z 1 x", ":1 :1 :1 :1"),
    ("TYPE l; TYPE s; TYPE h; TYPE z", "+list +set +hash +zset"),
    ("KEYS [c]; KEYS x*", "*1 $1 c *0"),
    ("TTL c; TTL missing; PTTL c; PTTL missing", ":-1 :-2 :-1 :-2"),
    ("PERSIST c; EXPIRE c 100; TTL c; PERSIST c; TTL c", ":0 :1 :100 :1 :-1"),
    ("PERSIST missing; PEXPIRE c 200000; TTL c; EXPIRE missing 10", ":0 :1 :200 :0"),
    ("EXPIRE c x", NOT_AN_INTEGER),
    ("EXPIRE c 9223372036854775807", expire_time("expire")),
    ("PEXPIRE c 9223372036854775807", expire_time("pexpire")),
    ("EXPIRE c -1; EXISTS c; PEXPIRE l 0; EXISTS l", ":1 :0 :1 :0"),
    ("SCAN 0 MATCH h; SCAN 0 TYPE zset", "*2 $1 0 *1 $1 h *2 $1 0 *1 $1 z"),
    ("SCAN 0 TYPE ZSET MATCH x* COUNT 10; SCAN 0 TYPE nonsense", "*2 $1 0 *0 *2 $1 0 *0"),
    ("SCAN x", b"-ERR invalid cursor\r\n"),
    ("SCAN 0 COUNT 0; SCAN 0 COUNT; SCAN 0 BAD; FLUSHDB bad; FLUSHDB SYNC ASYNC", SYNTAX_ERROR),
    ("SCAN 0 COUNT x", NOT_AN_INTEGER),
    ("FLUSHDB async; DBSIZE; SET k v; FLUSHALL; DBSIZE", "+OK :0 +OK +OK :0"),
]

LISTS: Table = [
    ("RPUSH l a b c; LPUSH l d e; LLEN l; LLEN missing", ":3 :5 :5 :0"),
    ("LRANGE l 0 -1", "*5 $1 e $1 d $1 a $1 b $1 c"),
    ("LRANGE l 0 1; LRANGE l -2 -1", "*2 $1 e $1 d *2 $1 b $1 c"),
    ("LRANGE l 1 100; LRANGE l -100 0", "*4 $1 d $1 a $1 b $1 c *1 $1 e"),
    ("LRANGE l 3 1; LRANGE l 5 9; LRANGE missing 0 -1", "*0 *0 *0"),
    ("LRANGE l x 1", NOT_AN_INTEGER),
    ("LPOP l; RPOP l; LPOP l 2; RPOP l 5", "$1 e $1 c *2 $1 d $1 a *1 $1 b"),
    ("LLEN l; EXISTS l; LPOP l; LPOP l 1; RPOP l 0", ":0 :0 $-1 *-1 *-1"),
    ("RPUSH l a; LPOP l 0", ":1 *0"),
    ("LPOP l -1; RPOP l x", NOT_POSITIVE),
]

SETS: Table = [
    ("SADD s a b a; SADD s b c; SCARD s; SCARD missing", ":2 :1 :3 :0"),
    ("SISMEMBER s a; SISMEMBER s x; SISMEMBER missing x", ":1 :0 :0"),
    ("SREM s a b x; SMEMBERS s; SMEMBERS missing", ":2 *1 $1 c *0"),
    ("SPOP s; EXISTS s; SPOP s; SPOP s 1", "$1 c :0 $-1 *0"),
    ("SADD s x; SPOP s 0; SPOP s 5", ":1 *0 *1 $1 x"),
    ("SADD s x; SREM s x; EXISTS s", ":1 :1 :0"),
    ("SPOP s -1; SPOP s x", NOT_POSITIVE),
    ("SPOP s 1 2", SYNTAX_ERROR),
]

HASHES: Table = [
    ("HSET h a 1 b 2; HSET h a 3 c 4; HGET h a; HGET h x; HGET missing x", ":2 :1 $1 3 $-1 $-1"),
    ("HLEN h; HLEN missing; HGETALL missing", ":3 :0 *0"),
    ("HGETALL h", "*6 $1 a $1 3 $1 b $1 2 $1 c $1 4"),
    ("HDEL h a x; HDEL h b c; EXISTS h; HDEL h a", ":1 :2 :0 :0"),
    ("HSET h a 1 a 2; HGETALL h", ":1 *2 $1 a $1 2"),
]

SORTED_SETS: Table = [
    ("ZADD z 2 b 1 a 3 c; ZADD z 1 b 4 d", ":3 :1"),
    ("ZRANGE z 0 -1", "*4 $1 a $1 b $1 c $1 d"),
    ("ZRANGE z 0 -1 WITHSCORES", "*8 $1 a $1 1 $1 b $1 1 $1 c $1 3 $1 d $1 4"),
    ("ZRANGE z 0 1 withscores; ZRANGE z -2 -1", "*4 $1 a $1 1 $1 b $1 1 *2 $1 c $1 d"),
    ("ZRANGE z 3 1; ZRANGE z 9 10; ZRANGE missing 0 -1", "*0 *0 *0"),
    ("ZRANGE z x 1", NOT_AN_INTEGER),
    ("ZPOPMIN z; ZPOPMIN z 2", "*2 $1 a $1 1 *4 $1 b $1 1 $1 c $1 3"),
    ("ZPOPMIN z 9; EXISTS z; ZPOPMIN z; ZPOPMIN z 1", "*2 $1 d $1 4 :0 *0 *0"),
    ("ZADD z 0.1 a 1.5 b inf c -inf d 1e20 e 3.0 f +INFINITY g -0 h .5 i 5. j", ":10"),
    (
        "ZRANGE z 0 -1 WITHSCORES",
        (
            "*20 $1 d $4 -inf $1 h $1 0 $1 a $19 0.10000000000000001 $1 i $3 0.5 $1 b $3 1.5"
            " $1 f $1 3 $1 j $1 5 $1 e $5 1e+20 $1 c $3 inf $1 g $3 inf"
        ),
    ),
    ("ZADD z nan a; ZADD z x a; ZADD z '' a; ZADD z 1_0 a; ZADD z ' 1' a", NOT_A_FLOAT),
    ("ZADD z 1e999 a", NOT_A_FLOAT),
    ("ZADD z 1 a 2; ZRANGE z 0 -1 BAD; ZPOPMIN z 1 2", SYNTAX_ERROR),
    ("ZPOPMIN z -1; ZPOPMIN z x", NOT_POSITIVE),
    ("ZPOPMIN z 0; ZADD z -1 a 1 a; ZPOPMIN z 2", "*0 :0 *4 $1 d $4 -inf $1 h $1 0"),
]

WRONG_TYPES: Table = [
    ("SET s v; RPUSH l v", "+OK :1"),
    ("GET l; GETDEL l; APPEND l x; STRLEN l; INCR l; INCRBY l 1; SET l v GET", WRONG_TYPE),
    ("LPUSH s x; RPUSH s x; LPOP s; RPOP s; LLEN s; LRANGE s 0 1", WRONG_TYPE),
    ("SADD s x; SREM s x; SMEMBERS s; SISMEMBER s x; SPOP s; SCARD s", WRONG_TYPE),
    ("HSET s f x; HGET s f; HDEL s f; HGETALL s; HLEN s", WRONG_TYPE),
    ("ZADD s 1 x; ZRANGE s 0 1; ZPOPMIN s", WRONG_TYPE),
    ("INCRBY l x; LRANGE s 0 x", NOT_AN_INTEGER),
    ("LPOP s x; SPOP s x; ZPOPMIN s x", NOT_POSITIVE),
    ("ZADD s x x", NOT_A_FLOAT),
    ("MGET s l missing; GET s; LRANGE l 0 -1", "*3 $1 v $-1 $-1 $1 v *1 $1 v"),
    ("SET l v; GET l", "+OK $1 v"),
]

SERVER: Table = [
    ("PING; PING hello; ECHO hello; SELECT 0", "+PONG $5 hello $5 hello +OK"),
    ("SELECT -1; SELECT 16", BAD_INDEX),
    ("SELECT x", NOT_AN_INTEGER),
    ("COMMAND DOCS nosuch; CONFIG GET nosuch; CONFIG GET save", "*0 *0 *2 $4 save $0 "),
    ("CONFIG GET APPENDONL[Y] nosuch*", "*2 $10 appendonly $2 no"),
    ("COMMAND zz", b"-ERR unknown subcommand 'zz'. Try COMMAND HELP.\r\n"),
    ("CONFIG zz", b"-ERR unknown subcommand 'zz'. Try CONFIG HELP.\r\n"),
    ("CLIENT zz", b"-ERR unknown subcommand 'zz'. Try CLIENT HELP.\r\n"),
    ("CLIENT GETNAME; CLIENT SETNAME me; CLIENT GETNAME", "$-1 +OK $2 me"),
    ("CLIENT SETNAME 'a b'; HELLO 2 SETNAME 'a b'", BAD_NAME),
    ("CLIENT SETNAME ''; CLIENT GETNAME", "+OK $-1"),
    ("HELLO 4", b"-NOPROTO unsupported protocol version\r\n"),
    ("HELLO x", b"-ERR Protocol version is not an integer or out of range\r\n"),
    ("HELLO 3 BAD", b"-ERR Syntax error in HELLO option 'BAD'\r\n"),
    ("HELLO 3 SETNAME", b"-ERR Syntax error in HELLO option 'SETNAME'\r\n"),
    ("HELLO 3 AUTH default", b"-ERR Syntax error in HELLO option 'AUTH'\r\n"),
    (
        "HELLO 3 AUTH me secret",
        b"-WRONGPASS invalid username-password pair or user is disabled.\r\n",
    ),
    ("nosuch", b"-ERR unknown command 'nosuch', with args beginning with: \r\n"),
    (
        "NoSuch 'a\nb' \"c d\" ''",
        b"-ERR unknown command 'NoSuch', with args beginning with: 'a b' 'c d' '' \r\n",
    ),
    ("CLIENT|ID", b"-ERR unknown command 'CLIENT|ID', with args beginning with: \r\n"),
]

# Too few arguments, or too many.
ARITIES = (
    "SET k; MSET a; MSET a 1 b; MGET; GET; get; GET a b; INCRBY n; DECRBY n; INCR; DEL; EXISTS;"
    "KEYS; EXPIRE c; SCAN; LRANGE l 0; LPOP l 1 2; LPOP; RPUSH l; LPUSH l; SPOP; SADD s; SREM s;"
    "SISMEMBER s; HSET h a; HSET h a 1 b; HGET h; HDEL h; ZRANGE z 0; ZADD z 1; ZPOPMIN; PING a b;"
    "ECHO; COMMAND|COUNT x; CONFIG; CONFIG|GET; CLIENT; CLIENT|ID x; CLIENT|SETNAME"
)

# There is only one database; SETINFO came with Redis 7.2; ZADD has no flags.
DIFFERENT: Table = [
    ("SELECT 1", BAD_INDEX),
    ("CLIENT SETINFO LIB-NAME test; CLIENT SETINFO lib-ver 1.0", "+OK +OK"),
    ("ZADD z NX 1 a", SYNTAX_ERROR),
]

RESP3: Table = [
    ("GET missing; LPOP missing; LPOP missing 1; MGET missing", "_ _ _ *1 _"),
    ("HSET h a 1 b 2; HGETALL h", ":2 %2 $1 a $1 1 $1 b $1 2"),
    ("HGETALL missing; HGET h x", "%0 _"),
    ("SADD s x; SMEMBERS s; SMEMBERS missing; SISMEMBER s x", ":1 ~1 $1 x ~0 :1"),
    ("SPOP s 0; SPOP s 2; SPOP s; SPOP s 1", "~0 ~1 $1 x _ ~0"),
    ("ZADD z 1 a 2.5 b inf c 0.1 d; ZRANGE z 0 -1", ":4 *4 $1 d $1 a $1 b $1 c"),
    (
        "ZRANGE z 0 -1 WITHSCORES",
        "*4 *2 $1 d ,0.10000000000000001 *2 $1 a ,1 *2 $1 b ,2.5 *2 $1 c ,inf",
    ),
    ("ZPOPMIN z; ZPOPMIN z 1", "*2 $1 d ,0.10000000000000001 *1 *2 $1 a ,1"),
    ("ZPOPMIN missing; ZPOPMIN missing 1", "*0 *0"),
    ("CONFIG GET save; CONFIG GET nosuch; CLIENT GETNAME", "%1 $4 save $0  %0 _"),
    ("SET k v NX; SET k v NX; SET k v GET; TTL k", "+OK _ $1 v :-1"),
    ("COMMAND DOCS nosuch; SCAN 0 MATCH k", "%0 *2 $1 0 *1 $1 k"),
    ("GET h", WRONG_TYPE),
    ("nosuch", b"-ERR unknown command 'nosuch', with args beginning with: \r\n"),
]

TABLES = (STRINGS, INTEGERS, KEYS, LISTS, SETS, HASHES, SORTED_SETS, WRONG_TYPES, SERVER, DIFFERENT)

# Lines as people type them, or telnet does.
INLINE = [
    (b"PING\r\n", b"+PONG\r\n"),
    (b"PING\n", b"+PONG\r\n"),
    (b"  ping  \t hello \r\n", b"$5\r\nhello\r\n"),
    (b"\r\n\n   \r\nPING\r\n", b"+PONG\r\n"),
    (rb'ECHO "a\" \\ b"' + b"\r\n", b'$6\r\na" \\ b\r\n'),
    (rb"ECHO 'a\nb'" + b"\r\n", b"$4\r\na\\nb\r\n"),
    (rb"ECHO a\b" + b"\r\n", b"$3\r\na\\b\r\n"),
    (rb'ECHO fo"o b"' + b"\r\n", b"$5\r\nfoo b\r\n"),
    (b"ECHO ''\r\n", b"$0\r\n\r\n"),
    (rb'ECHO "\x4a\XFF\x4\n\r\t\b\a\q"' + b"\n", b"$12\r\nJXFFx4\n\r\t\b\aq\r\n"),
    (rb"ECHO 'a\'\\\x41'" + b"\n", b"$8\r\na'\\\\\\x41\r\n"),
    (b"ECHO a\v\f \v\f\n", b"$3\r\na\v\f\r\n"),
    (b"ECHO \xff\r\n", b"$1\r\n\xff\r\n"),
    (b"nosuch a\r\n", b"-ERR unknown command 'nosuch', with args beginning with: 'a' \r\n"),
    (
        b"*4\r\n$3\r\nn\0o\r\n$3\r\na\0b\r\n$130\r\n" + b"x" * 130 + b"\r\n$1\r\nc\r\n",
        b"-ERR unknown command 'n', with args beginning with: 'a' '" + b"x" * 124 + b"' \r\n",
    ),
    (b"*0\r\n*-1\r\nPING\r\n", b"+PONG\r\n"),
]

PROTOCOL_ERRORS = {
    b"invalid multibulk length": (
        *(b"*x", b"*", b"*01", b"*1 ", b"*1_0", b"*1048577", b"*1000000", b"*2147483648"),
        b"*99999999999999999999",
    ),
    b"expected '$', got 'x'": (b"*1\r\nx",),
    b"expected '$', got ' '": (b"*1\r\n",),
    b"expected '$', got ':'": (b"*1\r\n:4",),
    b"invalid bulk length": (
        *(b"*1\r\n$-1", b"*1\r\n$x", b"*1\r\n$04", b"*1\r\n$536870913"),
        b"*1\r\n$99999999999999999999",
    ),
    b"too big mbulk count string": (b"*" + b"1" * 70_000,),
    b"too big bulk count string": (b"*1\r\n$" + b"1" * 70_000,),
    b"too big inline request": (b"x" * 70_000,),
    b"unbalanced quotes in request": (
        *(b'ECHO "a', b"ECHO 'a", b'ECHO "a"b', b"ECHO a''b", rb"ECHO 'a\'", rb'ECHO "a\"'),
    ),
}

# What they match, and what not.
GLOBS: dict[bytes, tuple[list[bytes], list[bytes]]] = {
    b"*": ([b"", b"any\nthing"], []),
    b"": ([b""], [b"a"]),
    b"a?c": ([b"abc"], [b"ac"]),
    b"a*c*e": ([b"abcde"], [b"abcdef"]),
    b"*.b*.c": ([b"a.b.c"], []),
    b"*a*": ([b"bab"], []),
    b"[abc]": ([b"b"], []),
    b"[a-c]": ([b"b"], [b"d"]),
    b"[c-a]": ([b"b"], []),
    b"[^a-c]": ([b"d"], [b"b"]),
    b"[a\\-c]": ([b"-"], [b"b"]),
    b"[\\]]": ([b"]"], []),
    b"[]": ([], [b"a"]),
    b"[^]": ([b"a"], []),
    b"[ab": ([b"a"], []),
    b"a.c": ([], [b"abc"]),
    b"\\*": ([b"*"], [b"a"]),
    b"a\\": ([b"a\\"], []),
    b"(a|b)+$": ([b"(a|b)+$"], []),
    b"\xff*": ([b"\xff\xfe"], []),
}

Connect = Callable[[], Awaitable[Any]]


@pytest.fixture
def kv(example: Callable[[str], ModuleType]) -> Any:
    """The example, with a database of its own."""
    return example("kv")


def request(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


def from_line(line: str) -> bytes:
    """Requests, from commands with semicolons between them."""
    return b"".join(
        request(*(word.encode() for word in shlex.split(command))) for command in line.split(";")
    )


@contextlib.asynccontextmanager
async def served(kv: Any) -> AsyncIterator[Connect]:
    """A server of the test's own; a function that connects to it."""
    with anyio.fail_after(60):
        async with anypoll.serve(kv.handler, host="127.0.0.1", port=0) as server:
            yield lambda: anyio.connect_tcp("127.0.0.1", server.port)


@contextlib.asynccontextmanager
async def connected(kv: Any) -> AsyncIterator[ByteStream]:
    async with served(kv) as connect, await connect() as stream:
        yield stream


MARK = b"<end of the replies>"


async def exchange(stream: ByteStream, data: bytes | str) -> bytes:
    """Sends requests; returns all the replies to them, of whatever length."""
    data = from_line(data) if isinstance(data, str) else data
    end = b"$%d\r\n%b\r\n" % (len(MARK), MARK)
    async with anyio.create_task_group() as tasks:  # the replies may be too long to wait for
        tasks.start_soon(stream.send, data + request(b"ECHO", MARK))
        received = bytearray()
        while not received.endswith(end):
            received += await stream.receive()
    return bytes(received[: -len(end)])


async def until_eof(stream: ByteStream) -> bytes:
    return b"".join([piece async for piece in stream])


async def check(stream: ByteStream, table: Table) -> None:
    for line, reply in table:
        if isinstance(reply, str):
            expected = reply.replace(" ", "\r\n").encode() + b"\r\n"
        else:
            expected = reply * len(line.split(";"))
        assert await exchange(stream, line) == expected, line


# --- commands ------------------------------------------------------------------------------------


async def test_replies_are_those_of_redis(kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "milliseconds", lambda: 12345)  # the tables look at times
    async with connected(kv) as stream:
        for table in TABLES:
            await check(stream, [*table, ("FLUSHALL", "+OK")])
        for line in ARITIES.split(";"):
            name = line.split()[0].lower()
            await check(stream, [(line.replace("|", " "), arity(name))])
        await exchange(stream, "HELLO 3")
        await check(stream, RESP3)


HELLO = (
    "$6 server $5 redis $7 version $6 7.0.15 $5 proto :{} $2 id :{}"
    " $4 mode $10 standalone $4 role $6 master $7 modules *0"
)


async def test_hello_changes_the_protocol_and_tells_about_the_server(kv: Any) -> None:
    async with connected(kv) as stream:
        client_id = int((await exchange(stream, "CLIENT ID"))[1:])
        two, three = "*14 " + HELLO.format(2, client_id), "%7 " + HELLO.format(3, client_id)
        await check(
            stream,
            [
                ("HELLO; HELLO 3", f"{two} {three}"),
                ("GET missing; HELLO", f"_ {three}"),
                ("HELLO 2 AUTH default any SETNAME me", two),
                ("CLIENT GETNAME; GET missing", "$2 me $-1"),
            ],
        )


async def test_info_and_command_say_the_least(kv: Any) -> None:
    empty = b"# Server\r\nredis_version:7.0.15\r\n\r\n# Keyspace\r\n"
    filled = empty + b"db0:keys=2,expires=1,avg_ttl=0\r\n"
    count = sum(b" " not in name for name in kv.COMMANDS)
    async with connected(kv) as stream:
        await check(
            stream,
            [
                ("INFO", b"$%d\r\n%b\r\n" % (len(empty), empty)),
                ("SET k v EX 100; SET l v", "+OK +OK"),
                ("INFO keyspace", b"$%d\r\n%b\r\n" % (len(filled), filled)),
                ("COMMAND; COMMAND COUNT", f"*0 :{count}"),
            ],
        )
        await exchange(stream, "HELLO 3")
        await check(stream, [("INFO", b"=%d\r\ntxt:%b\r\n" % (len(filled) + 4, filled))])


async def test_spop_takes_each_member_once(kv: Any) -> None:
    members = {b"member-%d" % n for n in range(100)}
    async with connected(kv) as stream:
        await exchange(stream, request(b"SADD", b"s", *members))
        popped = await exchange(stream, request(b"SPOP", b"s") * 50)
        popped += await exchange(stream, "SPOP s 100")
    assert {line for line in popped.split(b"\r\n") if line.startswith(b"m")} == members
    assert popped.count(b"member-") == 100


async def test_zpopmin_and_zadd_alternate(kv: Any) -> None:
    added = ";".join(f"ZADD z {n} m{n}" for n in range(0, 100, 2))
    turns = ";".join(f"ZPOPMIN z; ZADD z {2 * n + 1} m{2 * n + 1}" for n in range(50))
    popped = " ".join(f"*2 ${len(f'm{n}')} m{n} ${len(str(n))} {n} :1" for n in range(50))
    async with connected(kv) as stream:
        await exchange(stream, added)
        await check(stream, [(turns, popped)])


async def test_big_replies_and_values_arrive_whole(kv: Any) -> None:
    value = bytes(range(256)) * (5 * MIB // 256) + b"\r\nodd"
    async with connected(kv) as stream:
        sent = request(b"SET", b"k", value) + request(b"APPEND", b"k", b"!") + request(b"GET", b"k")
        replies = await exchange(stream, sent)
        size = len(value) + 1
        assert replies == b"+OK\r\n:%d\r\n$%d\r\n%b!\r\n" % (size, size, value)
        elements = [b"%d" % n for n in range(50_000)]
        assert await exchange(stream, request(b"RPUSH", b"l", *elements)) == b":50000\r\n"
        assert await exchange(stream, "LRANGE l 0 -1") == request(*elements)


# --- keys that go, and scans ---------------------------------------------------------------------


async def test_expired_keys_are_gone_for_every_command(
    kv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000
    monkeypatch.setattr(kv, "milliseconds", lambda: now)
    async with connected(kv) as stream:
        table: Table = [
            ("SET a 1 PX 500; SET b 1 EX 2; RPUSH l x; PEXPIRE l 500", "+OK +OK :1 :1"),
            ("PTTL a; TTL a; PTTL b", ":500 :1 :2000"),
        ]
        await check(stream, table)
        now = 1499
        await check(stream, [("PTTL a; TTL a; DBSIZE", ":1 :0 :3")])
        now = 1500
        table = [
            ("DBSIZE; KEYS *; SCAN 0", ":1 *1 $1 b *2 $1 0 *1 $1 b"),
            ("EXISTS a l; TTL a; LPUSH l y; TTL l", ":0 :-2 :1 :-1"),
            ("SET a 2 NX; TTL a; PERSIST b", "+OK :-1 :1"),
        ]
        await check(stream, table)
        now = 10_000
        await check(stream, [("DBSIZE", ":3")])


async def test_expiry_in_real_time(kv: Any) -> None:
    async with connected(kv) as stream:
        assert await exchange(stream, "SET k v PX 20") == b"+OK\r\n"
        while await exchange(stream, "GET k") != b"$-1\r\n":
            await anyio.sleep(0.01)


async def test_what_keeps_and_what_drops_a_deadline(kv: Any) -> None:
    keep = ["SET k 1 KEEPTTL", "APPEND k 1", "INCR k", "SET k 2 NX"]
    drop = ["SET k 1", "MSET k 1", "PERSIST k"]
    async with connected(kv) as stream:
        for line in keep + drop:
            await exchange(stream, f"SET k 1 EX 1000; {line}")
            assert (await exchange(stream, "TTL k") != b":-1\r\n") == (line in keep), line


def test_a_scan_returns_what_was_there_all_the_time(kv: Any) -> None:
    db = kv.Database()
    for n in range(1000):
        db.set(b"stays-%d" % n, b"")
        db.set(b"goes-%d" % n, b"")
    seen: list[bytes] = []
    cursor, rounds = b"0", 0
    while rounds == 0 or cursor != b"0":
        cursor, keys = db.scan(cursor, b"COUNT", b"7")
        assert len(keys) <= 7
        seen += keys
        for n in range(3 * rounds, 3 * rounds + 3):
            db.delete(b"goes-%d" % n)
            db.set(b"comes-%d" % n, b"")
            db.delete(b"comes-%d" % (n - 10))
        if rounds % 10 == 5:
            db.scan(b"0")  # another one starts
        rounds += 1
        assert rounds < 10_000
    stayed = [key for key in seen if key.startswith(b"stays")]
    assert sorted(stayed) == sorted(b"stays-%d" % n for n in range(1000))


async def test_a_scan_over_the_wire(kv: Any) -> None:
    names = {b"key:%d" % n for n in range(100)}
    async with connected(kv) as stream:
        await exchange(stream, request(b"MSET", *itertools.chain(*((name, b"") for name in names))))
        seen: set[bytes] = set()
        cursor = "0"
        for _ in range(1000):
            reply = await exchange(stream, f"SCAN {cursor} COUNT 9 MATCH key:*")
            cursor, _, *keys = reply.decode().split("\r\n")[2:]
            seen.update(key.encode() for key in keys if key.startswith("key:"))
            if cursor == "0":
                break
        assert seen == names


def test_glob(kv: Any) -> None:
    for pattern, (matches, others) in GLOBS.items():
        is_match = kv.compile_glob(pattern)
        assert all(map(is_match, matches)), pattern
        assert not any(map(is_match, others)), pattern


def test_a_hostile_pattern_takes_no_time(kv: Any) -> None:
    key = b"a" * 5000
    for pattern in (b"*a" * 1000, b"a*" * 1000, b"*?" * 1000):
        assert kv.compile_glob(pattern)(key)
        assert not kv.compile_glob(pattern + b"b")(key)
    assert kv.compile_glob(b"*" * 4096)(key)
    with pytest.raises(kv.Error):
        kv.compile_glob(b"?" * 4097)


# --- the protocol --------------------------------------------------------------------------------


async def test_inline_commands(kv: Any) -> None:
    async with connected(kv) as stream:
        for line, reply in INLINE:
            assert await exchange(stream, line) == reply, line


async def test_a_protocol_error_is_answered_and_closes(kv: Any) -> None:
    async with served(kv) as connect:
        for reason, requests in PROTOCOL_ERRORS.items():
            for data in requests:
                async with await connect() as stream:
                    await stream.send(request(b"PING") + data + b"\r\n" + request(b"PING"))
                    got = await until_eof(stream)
                assert got == b"+PONG\r\n-ERR Protocol error: %b\r\n" % reason, data


async def test_quit_answers_what_came_before_and_closes(kv: Any) -> None:
    async with connected(kv) as stream:
        await stream.send(from_line("PING; quit; PING"))
        assert await until_eof(stream) == b"+PONG\r\n+OK\r\n"


async def test_segments_of_one_byte(kv: Any) -> None:
    data = request(b"SET", b"k", b"a\r\nb") + request(b"GET", b"k") + b"ECHO 'a b'\r\n"
    async with connected(kv) as stream:
        for n in range(len(data)):
            await stream.send(data[n : n + 1])
            await anyio.sleep(0.001)
        assert await exchange(stream, b"") == b"+OK\r\n$4\r\na\r\nb\r\n$3\r\na b\r\n"


async def test_the_peer_may_end_at_any_point_and_gets_its_replies(kv: Any) -> None:
    first, second = request(b"PING"), request(b"SET", b"k", b"value")
    data = first + second
    async with served(kv) as connect:
        for size in range(1, len(data) + 1):
            replies = b"+PONG\r\n" if size >= len(first) else b""
            replies += b"+OK\r\n" if size == len(data) else b""
            async with await connect() as stream:
                await stream.send(data[:size])
                await stream.send_eof()
                assert await until_eof(stream) == replies


async def test_announced_lengths_take_no_memory(kv: Any) -> None:
    big = (b"*999999\r\n", b"*2\r\n$536870912\r\nabc", b"*999999\r\n$536870912\r\n")
    async with served(kv) as connect, contextlib.AsyncExitStack() as stack:
        before = resident()
        for announced in big * 5:
            stream = await stack.enter_async_context(await connect())
            assert await exchange(stream, b"") == b""  # it is being served
            await stream.send(announced)
        async with await connect() as other:
            assert await exchange(other, "PING") == b"+PONG\r\n"
        assert resident() - before < 64 * MIB


async def test_values_are_private_copies(kv: Any) -> None:
    async with connected(kv) as stream:
        await exchange(stream, "SET k v; RPUSH l " + "x" * 100)
        await exchange(stream, "HSET h f v; SADD s m; ZADD z 1 m; GETDEL none")
    values = kv.DATABASE.values
    field = [*itertools.chain(*values[b"h"].items())]
    kept = [*values, values[b"k"], *values[b"l"], *field, *values[b"s"], *values[b"z"]]
    assert [type(value) for value in kept] == [bytes] * 11


async def test_many_clients_share_the_data(kv: Any) -> None:
    async def count() -> None:
        async with await connect() as stream:
            for _ in range(20):
                await exchange(stream, request(b"INCR", b"n") * 5)

    async with served(kv) as connect:
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(count)
        async with await connect() as stream:
            assert await exchange(stream, "GET n") == b"$4\r\n1000\r\n"
