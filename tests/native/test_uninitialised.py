"""Objects that `__new__` alone has made: at worst, what is asked of them raises an exception."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

import anypoll
from anypoll import _native, nocopy
from anypoll._connection.core import Core
from anypoll._loop.asyncio_hub import AsyncioHub
from anypoll._loop.trio_hub import TrioHub


async def nothing() -> None: ...


def bare(cls: Any) -> Any:
    return cls.__new__(cls)


def core_with_hub() -> Any:
    """Nothing has been opened."""
    core = bare(_native.Core)
    core.hub = bare(_native.Hub)
    return core


def core_with_all() -> Any:
    core = core_with_hub()
    core.reader, core.writer = bare(_native.Reader), bare(_native.Writer)
    core.reader._core = core
    core.writer._core = core
    return core


def reader_with(make: Callable[[], Any]) -> Any:
    reader = bare(_native.Reader)
    reader._core = make()
    return reader


def stream_with(make: Callable[[], Any]) -> Any:
    stream = bare(_native.Stream)
    stream._reader = reader_with(make)
    return stream


def writer_with(make: Callable[[], Any]) -> Any:
    writer = bare(_native.Writer)
    writer._core = make()
    return writer


OBJECTS: dict[str, Callable[[], Any]] = {
    "Core": lambda: bare(_native.Core),
    "Core, with a hub": core_with_hub,
    "Core, with all": core_with_all,
    "Reader": lambda: bare(_native.Reader),
    "Reader, of a core": lambda: reader_with(lambda: bare(_native.Core)),
    "Reader, of a core with a hub": lambda: reader_with(core_with_hub),
    "Writer": lambda: bare(_native.Writer),
    "Writer, of a core": lambda: writer_with(lambda: bare(_native.Core)),
    "Writer, of a core with a hub": lambda: writer_with(core_with_hub),
    "Hub": lambda: bare(_native.Hub),
    "Stream": lambda: bare(_native.Stream),
    "Stream, of a core": lambda: stream_with(lambda: bare(_native.Core)),
    "Stream, of a core with a hub": lambda: stream_with(core_with_hub),
    "Drive": lambda: _native.Drive(bare(_native.Hub), nothing()),
    "derived Core": lambda: bare(Core),
    "derived Reader": lambda: bare(nocopy.Reader),
    "derived Stream": lambda: bare(anypoll.Connection),
    "derived Stream, UNIX": lambda: bare(anypoll.UNIXConnection),
    "derived Hub, asyncio": lambda: bare(AsyncioHub),
    "derived Hub, Trio": lambda: bare(TrioHub),
}
VALUES = (None, 0, 1, b"x", [])
ARGUMENTS = [
    *itertools.chain.from_iterable(itertools.product(VALUES, repeat=n) for n in range(3)),
    (0, 0, 0),
]
FOREIGN = {"__class__", "__init__", "__new__", "__init_subclass__", "__subclasshook__"}


def names_of(kind: str) -> list[str]:
    with warnings.catch_warnings(action="ignore"):
        return [name for name in dir(type(OBJECTS[kind]())) if name not in FOREIGN]


def outcomes(function: Callable[[], Any]) -> Iterator[Any]:
    """What comes of the call, and of each step of an awaitable that it returns."""
    try:
        result = function()
        yield result
        if isinstance(result, _native.Operation) or inspect.iscoroutine(result):
            methods = [name for name in dir(result) if not name.startswith("__")]
            yield [getattr(result, name) for name in methods]
            yield repr(result)
            if isinstance(result, _native.Operation):
                yield result.get_loop()  # type: ignore[attr-defined]
            for _ in range(3):
                yield result.send(None)
    except BaseException as exc:  # noqa: BLE001
        yield exc


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", OBJECTS)
def test_whatever_is_asked_of_them(kind: str) -> None:
    """Nothing crashes, and nothing fails without an exception of its own."""
    asked = 0
    for name in names_of(kind):
        for args in ARGUMENTS:
            if name == "_attach" and args != (0,):
                continue  # it takes an address
            seen = outcomes(lambda: getattr(OBJECTS[kind](), name)(*args))  # noqa: B023
            assert not any(isinstance(outcome, SystemError) for outcome in seen), (name, args)
            asked += 1
    assert asked > 100


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", OBJECTS)
def test_attributes_that_are_set_and_deleted(kind: str) -> None:
    """Whatever they are then, the object goes in peace."""
    changed = 0
    for name in names_of(kind):
        for value in VALUES:
            made = OBJECTS[kind]()
            for step in (setattr, getattr, delattr, getattr):
                args = (made, name, value) if step is setattr else (made, name)
                with suppress(Exception):
                    step(*args)  # type: ignore[operator]
                    changed += step is setattr
            with suppress(Exception):
                repr(made)
    assert changed or kind.startswith(("Drive", "Stream"))


@pytest.mark.parametrize("cls", [_native.Block, _native.Operation])
def test_those_that_python_cannot_make(cls: Any) -> None:
    with pytest.raises(TypeError):
        cls()
    with pytest.raises(TypeError):
        object.__new__(cls)
