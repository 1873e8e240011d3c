"""`examples/kv.py`, spoken to in raw RESP. The replies in the tables are those of Redis 7.0.15."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import shlex
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import anyio
import pytest
from anyio.abc import ByteStream

import anypoll

pytestmark = pytest.mark.anyio

KV = Path(__file__).parent.parent / "examples" / "kv.py"
MIB = 1024 * 1024

WRONG_TYPE = b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"
NOT_AN_INTEGER = b"-ERR value is not an integer or out of range\r\n"
NOT_POSITIVE = b"-ERR value is out of range, must be positive\r\n"
NOT_A_FLOAT = b"-ERR value is not a valid float\r\n"
SYNTAX_ERROR = b"-ERR syntax error\r\n"
OVERFLOW = b"-ERR increment or decrement would overflow\r\n"
BAD_NAME = b"-ERR Client names cannot contain spaces, newlines or special characters.\r\n"

Table = list[tuple[str, bytes]]


def arity(command: str) -> bytes:
    return b"-ERR wrong number of arguments for '%b' command\r\n" % command.encode()


def expire_time(command: str) -> bytes:
    return b"-ERR invalid expire time in '%b' command\r\n" % command.encode()


STRINGS: Table = [
    ("SET k v", b"+OK\r\n"),
    ("GET k", b"$1\r\nv\r\n"),
    ("GET missing", b"$-1\r\n"),
    ("SET k w NX", b"$-1\r\n"),
    ("SET new w nx", b"+OK\r\n"),
    ("SET k w XX", b"+OK\r\n"),
    ("SET missing w XX", b"$-1\r\n"),
    ("SET k x GET", b"$1\r\nw\r\n"),
    ("GET k", b"$1\r\nx\r\n"),
    ("SET missing x XX GET", b"$-1\r\n"),
    ("SET fresh x GET", b"$-1\r\n"),
    ("SET k y NX GET", b"$1\r\nx\r\n"),
    ("GET k", b"$1\r\nx\r\n"),
    ("SET k v EX 100", b"+OK\r\n"),
    ("TTL k", b":100\r\n"),
    ("SET k v KEEPTTL", b"+OK\r\n"),
    ("TTL k", b":100\r\n"),
    ("SET k v", b"+OK\r\n"),
    ("TTL k", b":-1\r\n"),
    ("SET k v PX 100000", b"+OK\r\n"),
    ("TTL k", b":100\r\n"),
    ("SET k v px 100000 xx get", b"$1\r\nv\r\n"),
    ("SET k v EX 0", expire_time("set")),
    ("SET k v PX -1", expire_time("set")),
    ("SET k v EX x", NOT_AN_INTEGER),
    ("SET k v EX 9223372036854775807", expire_time("set")),
    ("SET k v EX 9223372036854776", expire_time("set")),
    ("SET k v PX 9223372036854775807", expire_time("set")),
    ("SET k v EX", SYNTAX_ERROR),
    ("SET k v NX XX", SYNTAX_ERROR),
    ("SET k v EX 1 PX 1", SYNTAX_ERROR),
    ("SET k v KEEPTTL EX 1", SYNTAX_ERROR),
    ("SET k v BAD", SYNTAX_ERROR),
    ("SET k", arity("set")),
    ("GETDEL k", b"$1\r\nv\r\n"),
    ("GETDEL k", b"$-1\r\n"),
    ("APPEND a 12", b":2\r\n"),
    ("APPEND a 34", b":4\r\n"),
    ("GET a", b"$4\r\n1234\r\n"),
    ("STRLEN a", b":4\r\n"),
    ("STRLEN missing", b":0\r\n"),
    ("MSET a 1 b 2", b"+OK\r\n"),
    ("MGET a missing b", b"*3\r\n$1\r\n1\r\n$-1\r\n$1\r\n2\r\n"),
    ("MSET a", arity("mset")),
    ("MSET a 1 b", arity("mset")),
    ("MGET", arity("mget")),
    ("GET", arity("get")),
    ("GET a b", arity("get")),
    ("SET empty ''", b"+OK\r\n"),
    ("GET empty", b"$0\r\n\r\n"),
    ("STRLEN empty", b":0\r\n"),
    ("INCR empty", NOT_AN_INTEGER),
]

INTEGERS: Table = [
    ("INCR n", b":1\r\n"),
    ("INCR n", b":2\r\n"),
    ("DECR n", b":1\r\n"),
    ("INCRBY n 10", b":11\r\n"),
    ("INCRBY n -20", b":-9\r\n"),
    ("GET n", b"$2\r\n-9\r\n"),
    ("DECR m", b":-1\r\n"),
    ("SET n 9223372036854775807", b"+OK\r\n"),
    ("INCR n", OVERFLOW),
    ("INCRBY n 1", OVERFLOW),
    ("DECR n", b":9223372036854775806\r\n"),
    ("SET n -9223372036854775808", b"+OK\r\n"),
    ("DECR n", OVERFLOW),
    ("INCRBY n -9223372036854775808", OVERFLOW),
    ("INCRBY n 9223372036854775808", NOT_AN_INTEGER),
    ("INCRBY n +1", NOT_AN_INTEGER),
    ("INCRBY n ' 1'", NOT_AN_INTEGER),
    ("INCRBY n 01", NOT_AN_INTEGER),
    ("INCRBY n 1_0", NOT_AN_INTEGER),
    ("INCRBY n 1.0", NOT_AN_INTEGER),
    ("INCRBY n -0", NOT_AN_INTEGER),
    ("INCRBY n ''", NOT_AN_INTEGER),
    ("INCRBY n 0", b":-9223372036854775808\r\n"),
    ("SET n ' 1'", b"+OK\r\n"),
    ("INCR n", NOT_AN_INTEGER),
    ("SET n 007", b"+OK\r\n"),
    ("INCR n", NOT_AN_INTEGER),
    ("SET n text", b"+OK\r\n"),
    ("INCRBY n 5", NOT_AN_INTEGER),
    ("INCRBY n", arity("incrby")),
    ("SET n 5", b"+OK\r\n"),
    ("DECRBY n 7", b":-2\r\n"),
    ("DECRBY n -9223372036854775808", b"-ERR decrement would overflow\r\n"),
    ("DECRBY n 9223372036854775807", OVERFLOW),
    ("DECRBY n x", NOT_AN_INTEGER),
    ("DECRBY n", arity("decrby")),
    ("INCR", arity("incr")),
]

KEYS: Table = [
    ("DBSIZE", b":0\r\n"),
    ("MSET a 1 b 2 c 3", b"+OK\r\n"),
    ("DBSIZE", b":3\r\n"),
    ("EXISTS a b missing a", b":3\r\n"),
    ("DEL a b missing a", b":2\r\n"),
    ("DBSIZE", b":1\r\n"),
    ("DEL", arity("del")),
    ("EXISTS", arity("exists")),
    ("TYPE c", b"+string\r\n"),
    ("TYPE missing", b"+none\r\n"),
    ("RPUSH l x", b":1\r\n"),
    ("SADD s x", b":1\r\n"),
    ("HSET h f x", b":1\r\n"),
    ("ZADD z 1 x", b":1\r\n"),
    ("TYPE l", b"+list\r\n"),
    ("TYPE s", b"+set\r\n"),
    ("TYPE h", b"+hash\r\n"),
    ("TYPE z", b"+zset\r\n"),
    ("KEYS [c]", b"*1\r\n$1\r\nc\r\n"),
    ("KEYS x*", b"*0\r\n"),
    ("KEYS", arity("keys")),
    ("TTL c", b":-1\r\n"),
    ("TTL missing", b":-2\r\n"),
    ("PTTL c", b":-1\r\n"),
    ("PTTL missing", b":-2\r\n"),
    ("PERSIST c", b":0\r\n"),
    ("EXPIRE c 100", b":1\r\n"),
    ("TTL c", b":100\r\n"),
    ("PERSIST c", b":1\r\n"),
    ("TTL c", b":-1\r\n"),
    ("PERSIST missing", b":0\r\n"),
    ("PEXPIRE c 200000", b":1\r\n"),
    ("TTL c", b":200\r\n"),
    ("EXPIRE missing 10", b":0\r\n"),
    ("EXPIRE c x", NOT_AN_INTEGER),
    ("EXPIRE c 9223372036854775807", expire_time("expire")),
    ("PEXPIRE c 9223372036854775807", expire_time("pexpire")),
    ("EXPIRE c", arity("expire")),
    ("EXPIRE c -1", b":1\r\n"),
    ("EXISTS c", b":0\r\n"),
    ("PEXPIRE l 0", b":1\r\n"),
    ("EXISTS l", b":0\r\n"),
    ("SCAN 0 MATCH h", b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nh\r\n"),
    ("SCAN 0 TYPE zset", b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nz\r\n"),
    ("SCAN 0 TYPE ZSET MATCH x* COUNT 10", b"*2\r\n$1\r\n0\r\n*0\r\n"),
    ("SCAN 0 TYPE nonsense", b"*2\r\n$1\r\n0\r\n*0\r\n"),
    ("SCAN x", b"-ERR invalid cursor\r\n"),
    ("SCAN 0 COUNT 0", SYNTAX_ERROR),
    ("SCAN 0 COUNT x", NOT_AN_INTEGER),
    ("SCAN 0 COUNT", SYNTAX_ERROR),
    ("SCAN 0 BAD", SYNTAX_ERROR),
    ("SCAN", arity("scan")),
    ("FLUSHDB bad", SYNTAX_ERROR),
    ("FLUSHDB SYNC ASYNC", SYNTAX_ERROR),
    ("FLUSHDB async", b"+OK\r\n"),
    ("DBSIZE", b":0\r\n"),
    ("SET k v", b"+OK\r\n"),
    ("FLUSHALL", b"+OK\r\n"),
    ("DBSIZE", b":0\r\n"),
]

LISTS: Table = [
    ("RPUSH l a b c", b":3\r\n"),
    ("LPUSH l d e", b":5\r\n"),
    ("LLEN l", b":5\r\n"),
    ("LLEN missing", b":0\r\n"),
    ("LRANGE l 0 -1", b"*5\r\n$1\r\ne\r\n$1\r\nd\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n"),
    ("LRANGE l 0 1", b"*2\r\n$1\r\ne\r\n$1\r\nd\r\n"),
    ("LRANGE l -2 -1", b"*2\r\n$1\r\nb\r\n$1\r\nc\r\n"),
    ("LRANGE l 1 100", b"*4\r\n$1\r\nd\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n"),
    ("LRANGE l 3 1", b"*0\r\n"),
    ("LRANGE l 5 9", b"*0\r\n"),
    ("LRANGE l -100 0", b"*1\r\n$1\r\ne\r\n"),
    ("LRANGE missing 0 -1", b"*0\r\n"),
    ("LRANGE l x 1", NOT_AN_INTEGER),
    ("LRANGE l 0", arity("lrange")),
    ("LPOP l", b"$1\r\ne\r\n"),
    ("RPOP l", b"$1\r\nc\r\n"),
    ("LPOP l 2", b"*2\r\n$1\r\nd\r\n$1\r\na\r\n"),
    ("RPOP l 5", b"*1\r\n$1\r\nb\r\n"),
    ("LLEN l", b":0\r\n"),
    ("EXISTS l", b":0\r\n"),
    ("LPOP l", b"$-1\r\n"),
    ("LPOP l 1", b"*-1\r\n"),
    ("RPOP l 0", b"*-1\r\n"),
    ("RPUSH l a", b":1\r\n"),
    ("LPOP l 0", b"*0\r\n"),
    ("LPOP l -1", NOT_POSITIVE),
    ("RPOP l x", NOT_POSITIVE),
    ("LPOP l 1 2", arity("lpop")),
    ("LPOP", arity("lpop")),
    ("RPUSH l", arity("rpush")),
    ("LPUSH l", arity("lpush")),
]

SETS: Table = [
    ("SADD s a b a", b":2\r\n"),
    ("SADD s b c", b":1\r\n"),
    ("SCARD s", b":3\r\n"),
    ("SCARD missing", b":0\r\n"),
    ("SISMEMBER s a", b":1\r\n"),
    ("SISMEMBER s x", b":0\r\n"),
    ("SISMEMBER missing x", b":0\r\n"),
    ("SREM s a b x", b":2\r\n"),
    ("SMEMBERS s", b"*1\r\n$1\r\nc\r\n"),
    ("SMEMBERS missing", b"*0\r\n"),
    ("SPOP s", b"$1\r\nc\r\n"),
    ("EXISTS s", b":0\r\n"),
    ("SPOP s", b"$-1\r\n"),
    ("SPOP s 1", b"*0\r\n"),
    ("SADD s x", b":1\r\n"),
    ("SPOP s 0", b"*0\r\n"),
    ("SPOP s 5", b"*1\r\n$1\r\nx\r\n"),
    ("SADD s x", b":1\r\n"),
    ("SREM s x", b":1\r\n"),
    ("EXISTS s", b":0\r\n"),
    ("SPOP s -1", NOT_POSITIVE),
    ("SPOP s x", NOT_POSITIVE),
    ("SPOP s 1 2", SYNTAX_ERROR),
    ("SPOP", arity("spop")),
    ("SADD s", arity("sadd")),
    ("SREM s", arity("srem")),
    ("SISMEMBER s", arity("sismember")),
]

HASHES: Table = [
    ("HSET h a 1 b 2", b":2\r\n"),
    ("HSET h a 3 c 4", b":1\r\n"),
    ("HGET h a", b"$1\r\n3\r\n"),
    ("HGET h x", b"$-1\r\n"),
    ("HGET missing x", b"$-1\r\n"),
    ("HLEN h", b":3\r\n"),
    ("HLEN missing", b":0\r\n"),
    ("HGETALL h", b"*6\r\n$1\r\na\r\n$1\r\n3\r\n$1\r\nb\r\n$1\r\n2\r\n$1\r\nc\r\n$1\r\n4\r\n"),
    ("HGETALL missing", b"*0\r\n"),
    ("HDEL h a x", b":1\r\n"),
    ("HDEL h b c", b":2\r\n"),
    ("EXISTS h", b":0\r\n"),
    ("HDEL h a", b":0\r\n"),
    ("HSET h a", arity("hset")),
    ("HSET h a 1 b", arity("hset")),
    ("HGET h", arity("hget")),
    ("HDEL h", arity("hdel")),
    ("HSET h a 1 a 2", b":1\r\n"),
    ("HGETALL h", b"*2\r\n$1\r\na\r\n$1\r\n2\r\n"),
]

SORTED_SETS: Table = [
    ("ZADD z 2 b 1 a 3 c", b":3\r\n"),
    ("ZADD z 1 b 4 d", b":1\r\n"),
    ("ZRANGE z 0 -1", b"*4\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n$1\r\nd\r\n"),
    (
        "ZRANGE z 0 -1 WITHSCORES",
        b"*8\r\n$1\r\na\r\n$1\r\n1\r\n$1\r\nb\r\n$1\r\n1\r\n$1\r\nc\r\n$1\r\n3\r\n$1\r\nd\r\n$1\r\n4\r\n",
    ),
    ("ZRANGE z 0 1 withscores", b"*4\r\n$1\r\na\r\n$1\r\n1\r\n$1\r\nb\r\n$1\r\n1\r\n"),
    ("ZRANGE z -2 -1", b"*2\r\n$1\r\nc\r\n$1\r\nd\r\n"),
    ("ZRANGE z 3 1", b"*0\r\n"),
    ("ZRANGE z 9 10", b"*0\r\n"),
    ("ZRANGE missing 0 -1", b"*0\r\n"),
    ("ZRANGE z 0 -1 BAD", SYNTAX_ERROR),
    ("ZRANGE z x 1", NOT_AN_INTEGER),
    ("ZRANGE z 0", arity("zrange")),
    ("ZPOPMIN z", b"*2\r\n$1\r\na\r\n$1\r\n1\r\n"),
    ("ZPOPMIN z 2", b"*4\r\n$1\r\nb\r\n$1\r\n1\r\n$1\r\nc\r\n$1\r\n3\r\n"),
    ("ZPOPMIN z 9", b"*2\r\n$1\r\nd\r\n$1\r\n4\r\n"),
    ("EXISTS z", b":0\r\n"),
    ("ZPOPMIN z", b"*0\r\n"),
    ("ZPOPMIN z 1", b"*0\r\n"),
    ("ZADD z 0.1 a 1.5 b inf c -inf d 1e20 e 3.0 f +INFINITY g -0 h .5 i 5. j", b":10\r\n"),
    (
        "ZRANGE z 0 -1 WITHSCORES",
        b"*20\r\n$1\r\nd\r\n$4\r\n-inf\r\n$1\r\nh\r\n$1\r\n0\r\n$1\r\na\r\n$19\r\n0.10000000000000001\r\n$1\r\ni\r\n$3\r\n0.5\r\n$1\r\nb\r\n$3\r\n1.5\r\n$1\r\nf\r\n$1\r\n3\r\n$1\r\nj\r\n$1\r\n5\r\n$1\r\ne\r\n$5\r\n1e+20\r\n$1\r\nc\r\n$3\r\ninf\r\n$1\r\ng\r\n$3\r\ninf\r\n",
    ),
    ("ZADD z nan a", NOT_A_FLOAT),
    ("ZADD z x a", NOT_A_FLOAT),
    ("ZADD z '' a", NOT_A_FLOAT),
    ("ZADD z 1_0 a", NOT_A_FLOAT),
    ("ZADD z ' 1' a", NOT_A_FLOAT),
    ("ZADD z 1e999 a", NOT_A_FLOAT),
    ("ZADD z 1 a 2", SYNTAX_ERROR),
    ("ZADD z 1", arity("zadd")),
    ("ZPOPMIN z 0", b"*0\r\n"),
    ("ZPOPMIN z -1", NOT_POSITIVE),
    ("ZPOPMIN z x", NOT_POSITIVE),
    ("ZPOPMIN z 1 2", SYNTAX_ERROR),
    ("ZPOPMIN", arity("zpopmin")),
    ("ZADD z -1 a 1 a", b":0\r\n"),
    ("ZPOPMIN z 2", b"*4\r\n$1\r\nd\r\n$4\r\n-inf\r\n$1\r\nh\r\n$1\r\n0\r\n"),
]

WRONG_TYPES: Table = [
    ("SET s v", b"+OK\r\n"),
    ("RPUSH l v", b":1\r\n"),
    ("GET l", WRONG_TYPE),
    ("GETDEL l", WRONG_TYPE),
    ("APPEND l x", WRONG_TYPE),
    ("STRLEN l", WRONG_TYPE),
    ("INCR l", WRONG_TYPE),
    ("INCRBY l 1", WRONG_TYPE),
    ("INCRBY l x", NOT_AN_INTEGER),
    ("SET l v GET", WRONG_TYPE),
    ("LPUSH s x", WRONG_TYPE),
    ("RPUSH s x", WRONG_TYPE),
    ("LPOP s", WRONG_TYPE),
    ("RPOP s", WRONG_TYPE),
    ("LPOP s x", NOT_POSITIVE),
    ("LLEN s", WRONG_TYPE),
    ("LRANGE s 0 1", WRONG_TYPE),
    ("LRANGE s 0 x", NOT_AN_INTEGER),
    ("SADD s x", WRONG_TYPE),
    ("SREM s x", WRONG_TYPE),
    ("SMEMBERS s", WRONG_TYPE),
    ("SISMEMBER s x", WRONG_TYPE),
    ("SPOP s", WRONG_TYPE),
    ("SPOP s x", NOT_POSITIVE),
    ("SCARD s", WRONG_TYPE),
    ("HSET s f x", WRONG_TYPE),
    ("HGET s f", WRONG_TYPE),
    ("HDEL s f", WRONG_TYPE),
    ("HGETALL s", WRONG_TYPE),
    ("HLEN s", WRONG_TYPE),
    ("ZADD s 1 x", WRONG_TYPE),
    ("ZADD s x x", NOT_A_FLOAT),
    ("ZRANGE s 0 1", WRONG_TYPE),
    ("ZPOPMIN s", WRONG_TYPE),
    ("ZPOPMIN s x", NOT_POSITIVE),
    ("MGET s l missing", b"*3\r\n$1\r\nv\r\n$-1\r\n$-1\r\n"),
    ("GET s", b"$1\r\nv\r\n"),
    ("LRANGE l 0 -1", b"*1\r\n$1\r\nv\r\n"),
    ("SET l v", b"+OK\r\n"),
    ("GET l", b"$1\r\nv\r\n"),
]

SERVER: Table = [
    ("PING", b"+PONG\r\n"),
    ("PING hello", b"$5\r\nhello\r\n"),
    ("PING a b", arity("ping")),
    ("ECHO hello", b"$5\r\nhello\r\n"),
    ("ECHO", arity("echo")),
    ("SELECT 0", b"+OK\r\n"),
    ("SELECT -1", b"-ERR DB index is out of range\r\n"),
    ("SELECT 16", b"-ERR DB index is out of range\r\n"),
    ("SELECT x", NOT_AN_INTEGER),
    ("COMMAND COUNT x", arity("command|count")),
    ("COMMAND zz", b"-ERR unknown subcommand 'zz'. Try COMMAND HELP.\r\n"),
    ("COMMAND DOCS nosuch", b"*0\r\n"),
    ("CONFIG", arity("config")),
    ("CONFIG GET", arity("config|get")),
    ("CONFIG zz", b"-ERR unknown subcommand 'zz'. Try CONFIG HELP.\r\n"),
    ("CONFIG GET nosuch", b"*0\r\n"),
    ("CONFIG GET save", b"*2\r\n$4\r\nsave\r\n$0\r\n\r\n"),
    ("CONFIG GET APPENDONL[Y] nosuch*", b"*2\r\n$10\r\nappendonly\r\n$2\r\nno\r\n"),
    ("CLIENT", arity("client")),
    ("CLIENT zz", b"-ERR unknown subcommand 'zz'. Try CLIENT HELP.\r\n"),
    ("CLIENT ID x", arity("client|id")),
    ("CLIENT GETNAME", b"$-1\r\n"),
    ("CLIENT SETNAME me", b"+OK\r\n"),
    ("CLIENT GETNAME", b"$2\r\nme\r\n"),
    ("CLIENT SETNAME 'a b'", BAD_NAME),
    ("CLIENT SETNAME", arity("client|setname")),
    ("CLIENT SETNAME ''", b"+OK\r\n"),
    ("CLIENT GETNAME", b"$-1\r\n"),
    ("SET k v", b"+OK\r\n"),
    ("SET k v EX 100", b"+OK\r\n"),
    ("HELLO 4", b"-NOPROTO unsupported protocol version\r\n"),
    ("HELLO x", b"-ERR Protocol version is not an integer or out of range\r\n"),
    ("HELLO 3 BAD", b"-ERR Syntax error in HELLO option 'BAD'\r\n"),
    ("HELLO 3 SETNAME", b"-ERR Syntax error in HELLO option 'SETNAME'\r\n"),
    ("HELLO 3 AUTH default", b"-ERR Syntax error in HELLO option 'AUTH'\r\n"),
    (
        "HELLO 3 AUTH me secret",
        b"-WRONGPASS invalid username-password pair or user is disabled.\r\n",
    ),
    ("HELLO 2 SETNAME 'a b'", BAD_NAME),
    ("nosuch", b"-ERR unknown command 'nosuch', with args beginning with: \r\n"),
    (
        "NoSuch 'a\nb' \"c d\" ''",
        b"-ERR unknown command 'NoSuch', with args beginning with: 'a b' 'c d' '' \r\n",
    ),
    ("CLIENT|ID", b"-ERR unknown command 'CLIENT|ID', with args beginning with: \r\n"),
    ("get", arity("get")),
    ("quit", b"+OK\r\n"),
]

RESP3: Table = [
    ("GET missing", b"_\r\n"),
    ("LPOP missing", b"_\r\n"),
    ("LPOP missing 1", b"_\r\n"),
    ("MGET missing", b"*1\r\n_\r\n"),
    ("HSET h a 1 b 2", b":2\r\n"),
    ("HGETALL h", b"%2\r\n$1\r\na\r\n$1\r\n1\r\n$1\r\nb\r\n$1\r\n2\r\n"),
    ("HGETALL missing", b"%0\r\n"),
    ("HGET h x", b"_\r\n"),
    ("SADD s x", b":1\r\n"),
    ("SMEMBERS s", b"~1\r\n$1\r\nx\r\n"),
    ("SMEMBERS missing", b"~0\r\n"),
    ("SISMEMBER s x", b":1\r\n"),
    ("SPOP s 0", b"~0\r\n"),
    ("SPOP s 2", b"~1\r\n$1\r\nx\r\n"),
    ("SPOP s", b"_\r\n"),
    ("SPOP s 1", b"~0\r\n"),
    ("ZADD z 1 a 2.5 b inf c 0.1 d", b":4\r\n"),
    ("ZRANGE z 0 -1", b"*4\r\n$1\r\nd\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n"),
    (
        "ZRANGE z 0 -1 WITHSCORES",
        b"*4\r\n*2\r\n$1\r\nd\r\n,0.10000000000000001\r\n*2\r\n$1\r\na\r\n,1\r\n*2\r\n$1\r\nb\r\n,2.5\r\n*2\r\n$1\r\nc\r\n,inf\r\n",
    ),
    ("ZPOPMIN z", b"*2\r\n$1\r\nd\r\n,0.10000000000000001\r\n"),
    ("ZPOPMIN z 1", b"*1\r\n*2\r\n$1\r\na\r\n,1\r\n"),
    ("ZPOPMIN missing", b"*0\r\n"),
    ("ZPOPMIN missing 1", b"*0\r\n"),
    ("CONFIG GET save", b"%1\r\n$4\r\nsave\r\n$0\r\n\r\n"),
    ("CONFIG GET nosuch", b"%0\r\n"),
    ("CLIENT GETNAME", b"_\r\n"),
    ("SET k v NX", b"+OK\r\n"),
    ("SET k v NX", b"_\r\n"),
    ("SET k v GET", b"$1\r\nv\r\n"),
    ("COMMAND DOCS nosuch", b"%0\r\n"),
    ("SCAN 0 MATCH k", b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nk\r\n"),
    ("TTL k", b":-1\r\n"),
    ("GET h", WRONG_TYPE),
    ("nosuch", b"-ERR unknown command 'nosuch', with args beginning with: \r\n"),
]

TABLES = {
    "strings": STRINGS,
    "integers": INTEGERS,
    "keys": KEYS,
    "lists": LISTS,
    "sets": SETS,
    "hashes": HASHES,
    "sorted sets": SORTED_SETS,
    "wrong types": WRONG_TYPES,
    "server": SERVER,
}

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

PROTOCOL_ERRORS = [
    (b"*x\r\n", b"invalid multibulk length"),
    (b"*\r\n", b"invalid multibulk length"),
    (b"*01\r\n", b"invalid multibulk length"),
    (b"*1 \r\n", b"invalid multibulk length"),
    (b"*1_0\r\n", b"invalid multibulk length"),
    (b"*1048577\r\n", b"invalid multibulk length"),
    (b"*1000000\r\n", b"invalid multibulk length"),
    (b"*2147483648\r\n", b"invalid multibulk length"),
    (b"*99999999999999999999\r\n", b"invalid multibulk length"),
    (b"*1\r\nx\r\n", b"expected '$', got 'x'"),
    (b"*1\r\n\r\n", b"expected '$', got ' '"),
    (b"*1\r\n:4\r\n", b"expected '$', got ':'"),
    (b"*1\r\n$-1\r\n", b"invalid bulk length"),
    (b"*1\r\n$x\r\n", b"invalid bulk length"),
    (b"*1\r\n$04\r\n", b"invalid bulk length"),
    (b"*1\r\n$536870913\r\n", b"invalid bulk length"),
    (b"*1\r\n$99999999999999999999\r\n", b"invalid bulk length"),
    (b"*" + b"1" * 70_000, b"too big mbulk count string"),
    (b"*1\r\n$" + b"1" * 70_000, b"too big bulk count string"),
    (b"x" * 70_000, b"too big inline request"),
    (b'ECHO "a\r\n', b"unbalanced quotes in request"),
    (b"ECHO 'a\r\n", b"unbalanced quotes in request"),
    (b'ECHO "a"b\r\n', b"unbalanced quotes in request"),
    (b"ECHO a''b\r\n", b"unbalanced quotes in request"),
    (rb"ECHO 'a\'" + b"\r\n", b"unbalanced quotes in request"),
    (rb'ECHO "a\"' + b"\r\n", b"unbalanced quotes in request"),
]

GLOBS = [
    (b"*", b"", True),
    (b"*", b"any\nthing", True),
    (b"", b"", True),
    (b"", b"a", False),
    (b"a?c", b"abc", True),
    (b"a?c", b"ac", False),
    (b"a*c*e", b"abcde", True),
    (b"a*c*e", b"abcdef", False),
    (b"*.b*.c", b"a.b.c", True),
    (b"*a*", b"bab", True),
    (b"[abc]", b"b", True),
    (b"[a-c]", b"b", True),
    (b"[c-a]", b"b", True),
    (b"[a-c]", b"d", False),
    (b"[^a-c]", b"d", True),
    (b"[^a-c]", b"b", False),
    (b"[a\\-c]", b"b", False),
    (b"[a\\-c]", b"-", True),
    (b"[\\]]", b"]", True),
    (b"[]", b"a", False),
    (b"[^]", b"a", True),
    (b"[ab", b"a", True),
    (b"a.c", b"abc", False),
    (b"\\*", b"*", True),
    (b"\\*", b"a", False),
    (b"a\\", b"a\\", True),
    (b"(a|b)+$", b"(a|b)+$", True),
    (b"\xff*", b"\xff\xfe", True),
]


def load_kv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kv_under_test", KV)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["kv_under_test"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kv() -> ModuleType:
    """The example, with a database of its own."""
    return load_kv()


def request(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


def from_line(line: str) -> bytes:
    return request(*(word.encode() for word in shlex.split(line)))


@contextlib.asynccontextmanager
async def connected(kv: ModuleType) -> AsyncIterator[ByteStream]:
    """A connection to a server of the test's own."""
    with anyio.fail_after(30):
        async with (
            anypoll.serve(kv.handler, host="127.0.0.1", port=0) as server,
            await anyio.connect_tcp("127.0.0.1", server.port) as stream,
        ):
            yield stream


MARK = b"<end of the replies>"


async def exchange(stream: ByteStream, data: bytes) -> bytes:
    """Sends requests; returns all the replies to them, of whatever length."""
    end = b"$%d\r\n%b\r\n" % (len(MARK), MARK)
    async with anyio.create_task_group() as tasks:  # the replies may be too long to wait for
        tasks.start_soon(stream.send, data + request(b"ECHO", MARK))
        received = bytearray()
        while not received.endswith(end):
            received += await stream.receive()
    return bytes(received[: -len(end)])


async def until_eof(stream: ByteStream) -> bytes:
    received = b""
    with contextlib.suppress(anyio.EndOfStream):
        while True:
            received += await stream.receive()
    return received


async def check(stream: ByteStream, table: Iterable[tuple[str, bytes]]) -> None:
    for line, reply in table:
        assert await exchange(stream, from_line(line)) == reply, line


def resident() -> int:
    """The process's memory, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# --- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
async def test_replies_are_those_of_redis(
    kv: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv, "milliseconds", lambda: 12345)  # the tables look at times
    async with connected(kv) as stream:
        *table, last = TABLES[name]
        await check(stream, table)
        await stream.send(from_line(last[0]))
        assert await stream.receive() == last[1]


async def test_pipelined_requests_get_their_replies_in_order(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        for table in (STRINGS, LISTS, HASHES, SORTED_SETS):
            requests = b"".join(from_line(line) for line, _ in table)
            replies = b"".join(reply for _, reply in table)
            assert await exchange(stream, requests) == replies
            assert await exchange(stream, from_line("FLUSHALL")) == b"+OK\r\n"


async def test_resp3(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        await exchange(stream, from_line("HELLO 3"))
        await check(stream, RESP3)


HELLO = (
    b"$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n7.0.15\r\n$5\r\nproto\r\n:%d\r\n"
    b"$2\r\nid\r\n:%d\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n"
    b"$7\r\nmodules\r\n*0\r\n"
)


async def test_hello_changes_the_protocol_and_tells_about_the_server(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        client_id = int((await exchange(stream, from_line("CLIENT ID")))[1:])
        await check(
            stream,
            [
                ("HELLO", b"*14\r\n" + HELLO % (2, client_id)),
                ("HELLO 3", b"%7\r\n" + HELLO % (3, client_id)),
                ("GET missing", b"_\r\n"),
                ("HELLO", b"%7\r\n" + HELLO % (3, client_id)),
                ("HELLO 2 AUTH default any SETNAME me", b"*14\r\n" + HELLO % (2, client_id)),
                ("CLIENT GETNAME", b"$2\r\nme\r\n"),
                ("GET missing", b"$-1\r\n"),
            ],
        )


async def test_what_differs_from_redis(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        await check(
            stream,
            [
                ("SELECT 1", b"-ERR DB index is out of range\r\n"),  # there is only one
                ("CLIENT SETINFO LIB-NAME test", b"+OK\r\n"),  # as of Redis 7.2
                ("CLIENT SETINFO lib-ver 1.0", b"+OK\r\n"),
                ("ZADD z NX 1 a", SYNTAX_ERROR),  # no flags
            ],
        )


async def test_info_and_command_say_the_least(kv: ModuleType) -> None:
    empty = b"# Server\r\nredis_version:7.0.15\r\n\r\n# Keyspace\r\n"
    filled = empty + b"db0:keys=2,expires=1,avg_ttl=0\r\n"
    async with connected(kv) as stream:
        await check(
            stream,
            [
                ("INFO", b"$%d\r\n%b\r\n" % (len(empty), empty)),
                ("SET k v EX 100", b"+OK\r\n"),
                ("SET l v", b"+OK\r\n"),
                ("INFO keyspace", b"$%d\r\n%b\r\n" % (len(filled), filled)),
                ("COMMAND", b"*0\r\n"),
                ("COMMAND COUNT", b":%d\r\n" % sum(b" " not in name for name in kv.COMMANDS)),
            ],
        )
        await exchange(stream, from_line("HELLO 3"))
        await check(stream, [("INFO", b"=%d\r\ntxt:%b\r\n" % (len(filled) + 4, filled))])


async def test_spop_takes_each_member_once(kv: ModuleType) -> None:
    members = {b"member-%d" % n for n in range(100)}
    async with connected(kv) as stream:
        await exchange(stream, request(b"SADD", b"s", *members))
        popped = await exchange(stream, request(b"SPOP", b"s") * 50)
        popped += await exchange(stream, request(b"SPOP", b"s", b"100"))
    assert {line for line in popped.split(b"\r\n") if line.startswith(b"m")} == members
    assert popped.count(b"member-") == 100


async def test_zpopmin_and_zadd_alternate(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        for n in range(0, 200, 2):
            await exchange(stream, request(b"ZADD", b"z", b"%d" % n, b"m%d" % n))
        expected = b"".join(
            b"*2\r\n$%d\r\nm%d\r\n$%d\r\n%d\r\n:1\r\n" % (len(f"m{n}"), n, len(str(n)), n)
            for n in range(100)
        )
        requests = b"".join(
            request(b"ZPOPMIN", b"z")
            + request(b"ZADD", b"z", b"%d" % (2 * n + 1), b"m%d" % (2 * n + 1))
            for n in range(100)
        )
        assert await exchange(stream, requests) == expected


async def test_big_replies_and_values_arrive_whole(kv: ModuleType) -> None:
    value = bytes(range(256)) * (5 * MIB // 256) + b"\r\nodd"
    async with connected(kv) as stream:
        sent = request(b"SET", b"k", value) + request(b"APPEND", b"k", b"!") + request(b"GET", b"k")
        replies = await exchange(stream, sent)
        size = len(value) + 1
        assert replies == b"+OK\r\n:%d\r\n$%d\r\n%b!\r\n" % (size, size, value)
        elements = [b"%d" % n for n in range(50_000)]
        assert await exchange(stream, request(b"RPUSH", b"l", *elements)) == b":50000\r\n"
        listed = await exchange(stream, request(b"LRANGE", b"l", b"0", b"-1"))
        assert listed == request(*elements)


# --- keys that go, and scans ---------------------------------------------------------------------


async def test_expired_keys_are_gone_for_every_command(
    kv: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.repeat(1000)
    monkeypatch.setattr(kv, "milliseconds", lambda: next(now))
    async with connected(kv) as stream:
        await check(
            stream,
            [
                ("SET a 1 PX 500", b"+OK\r\n"),
                ("SET b 1 EX 2", b"+OK\r\n"),
                ("RPUSH l x", b":1\r\n"),
                ("PEXPIRE l 500", b":1\r\n"),
                ("PTTL a", b":500\r\n"),
                ("TTL a", b":1\r\n"),
                ("PTTL b", b":2000\r\n"),
            ],
        )
        now = itertools.repeat(1499)
        await check(stream, [("PTTL a", b":1\r\n"), ("TTL a", b":0\r\n"), ("DBSIZE", b":3\r\n")])
        now = itertools.repeat(1500)
        await check(
            stream,
            [
                ("DBSIZE", b":1\r\n"),
                ("KEYS *", b"*1\r\n$1\r\nb\r\n"),
                ("SCAN 0", b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nb\r\n"),
                ("EXISTS a l", b":0\r\n"),
                ("TTL a", b":-2\r\n"),
                ("LPUSH l y", b":1\r\n"),
                ("TTL l", b":-1\r\n"),
                ("SET a 2 NX", b"+OK\r\n"),
                ("TTL a", b":-1\r\n"),
                ("PERSIST b", b":1\r\n"),
            ],
        )
        now = itertools.repeat(10_000)
        await check(stream, [("DBSIZE", b":3\r\n")])


async def test_expiry_in_real_time(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        assert await exchange(stream, from_line("SET k v PX 20")) == b"+OK\r\n"
        while await exchange(stream, from_line("GET k")) != b"$-1\r\n":
            await anyio.sleep(0.01)


async def test_what_keeps_and_what_drops_a_deadline(kv: ModuleType) -> None:
    keep = ["SET k 1 KEEPTTL", "APPEND k 1", "INCR k", "SET k 2 NX"]
    drop = ["SET k 1", "MSET k 1", "PERSIST k"]
    async with connected(kv) as stream:
        for lines, lives in (keep, True), (drop, False):
            for line in lines:
                await exchange(stream, from_line("SET k 1 EX 1000") + from_line(line))
                ttl = int((await exchange(stream, from_line("TTL k")))[1:])
                assert (ttl > 0) is lives, line


def test_a_scan_returns_what_was_there_all_the_time(kv: ModuleType) -> None:
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


async def test_a_scan_over_the_wire(kv: ModuleType) -> None:
    names = {b"key:%d" % n for n in range(100)}
    async with connected(kv) as stream:
        await exchange(stream, request(b"MSET", *itertools.chain(*((name, b"") for name in names))))
        seen: set[bytes] = set()
        cursor = b"0"
        for _ in range(1000):
            reply = await exchange(
                stream, request(b"SCAN", cursor, b"COUNT", b"9", b"MATCH", b"key:*")
            )
            _, _, cursor, _, *keys = reply.split(b"\r\n")
            seen.update(key for key in keys if key.startswith(b"key:"))
            if cursor == b"0":
                break
        assert seen == names


@pytest.mark.parametrize(("pattern", "key", "matches"), GLOBS)
def test_glob(kv: ModuleType, pattern: bytes, key: bytes, matches: bool) -> None:
    assert bool(kv.compile_glob(pattern)(key)) is matches


def test_a_hostile_pattern_takes_no_time(kv: ModuleType) -> None:
    key = b"a" * 5000
    for pattern in (b"*a" * 1000, b"a*" * 1000, b"*?" * 1000):
        assert kv.compile_glob(pattern)(key)
        assert not kv.compile_glob(pattern + b"b")(key)
    assert kv.compile_glob(b"*" * 4096)(key)
    with pytest.raises(kv.Error):
        kv.compile_glob(b"?" * 4097)


# --- the protocol --------------------------------------------------------------------------------


async def test_inline_commands(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        for line, reply in INLINE:
            assert await exchange(stream, line) == reply, line


@pytest.mark.parametrize(("data", "reason"), PROTOCOL_ERRORS)
async def test_a_protocol_error_is_answered_and_closes(
    kv: ModuleType, data: bytes, reason: bytes
) -> None:
    async with connected(kv) as stream:
        await stream.send(request(b"PING") + data + request(b"PING"))
        assert await until_eof(stream) == b"+PONG\r\n-ERR Protocol error: %b\r\n" % reason


async def test_quit_answers_what_came_before_and_closes(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        await stream.send(request(b"PING") + request(b"QUIT") + request(b"PING"))
        assert await until_eof(stream) == b"+PONG\r\n+OK\r\n"


async def test_segments_of_one_byte(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        for data, replies in (
            (request(b"SET", b"k", b"a\r\nb"), b"+OK\r\n"),
            (request(b"GET", b"k") + b"ECHO 'a b'\r\n", b"$4\r\na\r\nb\r\n$3\r\na b\r\n"),
        ):
            for n in range(len(data)):
                await stream.send(data[n : n + 1])
                await anyio.sleep(0.001)
            assert await exchange(stream, b"") == replies


async def test_the_peer_may_end_at_any_point_and_gets_its_replies(kv: ModuleType) -> None:
    first, second = request(b"PING"), request(b"SET", b"k", b"value")
    data = first + second
    with anyio.fail_after(30):
        async with anypoll.serve(kv.handler, host="127.0.0.1", port=0) as server:
            for size in range(1, len(data) + 1):
                replies = b"+PONG\r\n" if size >= len(first) else b""
                replies += b"+OK\r\n" if size == len(data) else b""
                async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
                    await stream.send(data[:size])
                    await stream.send_eof()
                    assert await until_eof(stream) == replies


async def test_announced_lengths_take_no_memory(kv: ModuleType) -> None:
    with anyio.fail_after(30):
        async with (
            anypoll.serve(kv.handler, host="127.0.0.1", port=0) as server,
            contextlib.AsyncExitStack() as stack,
        ):
            before = resident()
            for announced in (
                b"*999999\r\n",
                b"*2\r\n$536870912\r\nabc",
                b"*999999\r\n$536870912\r\n",
            ) * 5:
                stream = await anyio.connect_tcp("127.0.0.1", server.port)
                await stack.enter_async_context(stream)
                assert await exchange(stream, b"") == b""  # it is being served
                await stream.send(announced)
            async with await anyio.connect_tcp("127.0.0.1", server.port) as other:
                assert await exchange(other, request(b"PING")) == b"+PONG\r\n"
            assert resident() - before < 64 * MIB


async def test_values_are_private_copies(kv: ModuleType) -> None:
    async with connected(kv) as stream:
        await exchange(stream, request(b"SET", b"k", b"v") + request(b"RPUSH", b"l", b"x" * 100))
        await exchange(stream, request(b"HSET", b"h", b"f", b"v") + request(b"SADD", b"s", b"m"))
        await exchange(stream, request(b"ZADD", b"z", b"1", b"m") + request(b"GETDEL", b"none"))
    values = kv.DATABASE.values
    assert all(type(key) is bytes for key in values)
    kept: Sequence[object] = [
        values[b"k"],
        *values[b"l"],
        *itertools.chain(*values[b"h"].items()),
        *values[b"s"],
        *values[b"z"],
    ]
    assert [type(value) for value in kept] == [bytes] * 6


async def test_many_clients_share_the_data(kv: ModuleType) -> None:
    async def count(port: int) -> None:
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            for _ in range(20):
                await exchange(stream, request(b"INCR", b"n") * 5)

    with anyio.fail_after(60):
        async with anypoll.serve(kv.handler, host="127.0.0.1", port=0) as server:
            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(count, server.port)
            async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
                assert await exchange(stream, request(b"GET", b"n")) == b"$4\r\n1000\r\n"
