"""Real Redis clients against `anypoll serve examples/kv.py:handler`, on each backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from programs import run_to_end, running, stop

KV = Path(__file__).parent.parent / "examples" / "kv.py"

BENCHMARKS = "ping,set,get,incr,lpush,rpush,lpop,rpop,sadd,hset,spop,zadd,zpopmin,lrange,mset"


@pytest.fixture(scope="module", params=["asyncio", "uvloop", "trio"])
def port(request: pytest.FixtureRequest, anypoll_command: list[str]) -> Iterator[int]:
    """A server in a process of its own, on each backend; it must have had nothing to say."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is missing")
    command = [*anypoll_command, "serve", f"{KV}:handler", "--backend", request.param]
    with running(command) as (process, address):
        yield int(address.rpartition(":")[2])
        stop(process)


@pytest.fixture(autouse=True)
def _empty(port: int) -> None:
    with redis.Redis(port=port) as client:
        client.flushall()


# --- redis-cli and redis-benchmark ---------------------------------------------------------------

Cli = Callable[..., str]


@pytest.fixture
def cli(redis_cli: str, foreign_env: dict[str, str], port: int) -> Cli:
    """Runs redis-cli; returns what it prints."""

    def run(*arguments: str, stdin: str = "") -> str:
        done = run_to_end([redis_cli, "-p", str(port), *arguments], env=foreign_env, fed=stdin)
        assert (done.stderr, done.returncode) == ("", 0)
        return done.stdout

    return run


@pytest.mark.redis
def test_redis_cli(cli: Cli) -> None:
    assert cli("PING") == "PONG\n"
    assert cli("SET", "key", "a value") == "OK\n"
    assert cli("GET", "key") == "a value\n"
    assert cli("--no-raw", "GET", "missing") == "(nil)\n"
    assert cli("--no-raw", "RPUSH", "list", "a", "b") == "(integer) 2\n"
    assert cli("--no-raw", "LRANGE", "list", "0", "-1") == '1) "a"\n2) "b"\n'
    assert cli("--no-raw", "GET", "list").startswith("(error) WRONGTYPE ")
    assert cli("--no-raw", "nosuch", "a").startswith("(error) ERR unknown command 'nosuch'")
    assert cli("-x", "SET", "key", stdin="from stdin") == "OK\n"
    assert cli("STRLEN", "key") == "10\n"


@pytest.mark.redis
def test_redis_cli_in_resp3(cli: Cli) -> None:
    assert cli("-3", "--no-raw", "HSET", "hash", "f", "1") == "(integer) 1\n"
    assert cli("-3", "--no-raw", "HGETALL", "hash") == '1# "f" => "1"\n'
    assert cli("-3", "--no-raw", "ZADD", "zset", "1.5", "m") == "(integer) 1\n"
    listed = cli("-3", "--no-raw", "ZRANGE", "zset", "0", "-1", "WITHSCORES")
    assert listed == '1) 1) "m"\n   2) (double) 1.5\n'


@pytest.mark.redis
def test_redis_cli_reads_commands_and_bulk_loads(cli: Cli) -> None:
    lines = "".join(f"SET key:{n} {n}\n" for n in range(100))
    assert cli(stdin=lines) == "OK\n" * 100
    assert "errors: 0, replies: 100" in cli("--pipe", stdin=lines.replace("\n", "\r\n"))
    assert sorted(cli("--scan", "--pattern", "key:1?").split()) == [f"key:1{n}" for n in range(10)]
    assert "db0:keys=100" in cli("INFO", "keyspace")


@pytest.mark.redis
def test_redis_benchmark(redis_benchmark: str, foreign_env: dict[str, str], port: int) -> None:
    sizes = ["-n", "2000", "-c", "20", "-P", "16"]
    done = run_to_end(
        [redis_benchmark, "-p", str(port), "-t", BENCHMARKS, *sizes, "-q"], env=foreign_env
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = done.stdout.replace("\r", "\n")
    assert "error" not in results.lower()
    # PING in two ways, LRANGE in four and after an LPUSH of its own
    assert results.count("requests per second") == len(BENCHMARKS.split(",")) + 5


# --- redis-py ------------------------------------------------------------------------------------


@pytest.fixture(params=[2, 3])
def client(request: pytest.FixtureRequest, port: int) -> Iterator[Any]:
    """redis-py in either version of RESP. (Typed as anything: its methods may be coroutines.)"""
    with redis.Redis(port=port, protocol=request.param, decode_responses=True) as client:
        yield client


def test_redis_py_strings_and_keys(client: Any) -> None:
    assert client.ping() is True
    assert client.echo("héllo") == "héllo"
    assert client.set("k", "v", ex=100) is True
    assert client.set("k", "w", nx=True) is None
    assert client.set("k", "w", get=True, keepttl=True) == "v"
    assert 0 < client.ttl("k") <= 100
    assert client.persist("k") in (True, 1)
    assert client.getdel("k") == "w"
    assert client.get("k") is None
    assert client.mset({"a": "1", "b": "2"}) is True
    assert client.mget("a", "b", "c") == ["1", "2", None]
    assert (client.incr("n"), client.decr("n"), client.incrby("n", 5)) == (1, 0, 5)
    assert client.type("a") == "string"
    assert sorted(client.keys("[ab]")) == ["a", "b"]
    assert sorted(client.scan_iter(count=1)) == ["a", "b", "n"]
    assert client.delete("a", "b") == 2
    assert client.flushdb() is True


def test_redis_py_collections(client: Any) -> None:
    assert client.rpush("l", "a", "b", "c") == 3
    assert client.lpush("l", "d") == 4
    assert client.lrange("l", 0, -1) == ["d", "a", "b", "c"]
    assert (client.lpop("l"), client.rpop("l", 2), client.llen("l")) == ("d", ["c", "b"], 1)
    assert client.sadd("s", "a", "b") == 2
    assert client.smembers("s") in ({"a", "b"}, ["a", "b"], ["b", "a"])
    assert bool(client.sismember("s", "a"))
    assert (client.srem("s", "a"), client.spop("s"), client.scard("s")) == (1, "b", 0)
    assert client.hset("h", mapping={"a": "1", "b": "2"}) == 2
    assert client.hgetall("h") == {"a": "1", "b": "2"}
    assert (client.hget("h", "a"), client.hdel("h", "a"), client.hlen("h")) == ("1", 1, 1)
    assert client.zadd("z", {"a": 1, "b": 2.5, "c": float("inf")}) == 3
    scores = client.zrange("z", 0, -1, withscores=True)
    assert [tuple(pair) for pair in scores] == [("a", 1), ("b", 2.5), ("c", float("inf"))]
    assert [tuple(pair) for pair in client.zpopmin("z", 2)] == [("a", 1), ("b", 2.5)]


def test_redis_py_server_and_errors(client: Any) -> None:
    assert client.client_setname("me") is True
    assert client.client_getname() == "me"
    assert client.client_id() > 0
    assert client.config_get("save") == {"save": ""}
    assert client.info()["redis_version"] == "7.0.15"
    assert client.command_count() > 50
    assert client.command() in ({}, [])
    client.rpush("l", "a")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        client.get("l")
    with pytest.raises(redis.ResponseError, match="unknown command"):
        client.execute_command("NOSUCH")
    assert client.ping() is True


def test_redis_py_pipelines_and_big_values(client: Any) -> None:
    with client.pipeline(transaction=False) as pipe:
        for n in range(1000):
            pipe.set(f"k{n}", n).get(f"k{n}")
        assert pipe.execute() == [reply for n in range(1000) for reply in (True, str(n))]
    value = "x" * 3_000_000
    assert client.set("big", value) is True
    assert client.get("big") == value
