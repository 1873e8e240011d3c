"""The compiled core as Python sees it: its stub and its layouts tell the truth."""

from __future__ import annotations

import ast
import errno
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

import anypoll
from anypoll import _epoll
from anypoll._epoll import ffi, lib

STUB = ast.parse((Path(_epoll.__file__).parent / "_native" / "_core.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def constants(name: str) -> list[str]:
    return [
        node.target.id
        for node in CLASSES[name].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def test_the_stub_has_the_functions_with_their_arguments() -> None:
    nodes = [node for node in CLASSES["Lib"].body if isinstance(node, ast.FunctionDef)]
    assert {node.name for node in nodes} == {name for name in dir(lib) if name.startswith("ap_")}
    for node in nodes:
        real = ffi.typeof(getattr(lib, node.name))
        assert node.args.args == node.args.kwonlyargs == []
        for parameter, ctype in zip(node.args.posonlyargs[1:], real.args, strict=True):
            assert parameter.annotation is not None
            integer = ast.unparse(parameter.annotation) == "int"
            assert integer == (ctype.kind == "primitive"), f"{node.name}: {parameter.arg}"
        assert node.returns is not None
        assert (ast.unparse(node.returns) == "None") == (real.result.kind == "void"), node.name


def test_the_stub_has_the_constants() -> None:
    names = constants("Lib")
    assert names
    for name in names:
        assert type(getattr(lib, name)) is int
    real = {name for name in dir(lib) if name.startswith("AP_")} - {"AP_CALLS"}
    assert set(names) == real


@pytest.mark.parametrize(
    ("struct_name", "ours"),
    [
        ("ap_view", constants("View")),
        ("ap_accepted", constants("Accepted")),
        ("ap_tls_status", constants("TLSStatus")),
        ("ap_poller_stats", anypoll.PollerStatistics.__dataclass_fields__),
        ("ap_conn_stats", anypoll.ConnectionStatistics.__dataclass_fields__),
    ],
)
def test_every_field_is_known(struct_name: str, ours: Any) -> None:
    assert sorted(ours) == sorted(field for field, _ in ffi.typeof(struct_name).fields)


def test_layouts_that_python_unpacks() -> None:
    accepted = ffi.typeof("ap_accepted")
    assert ffi.sizeof(accepted) == _epoll._ACCEPTED.size
    assert [(name, field.offset) for name, field in accepted.fields] == [
        ("fd", 0),
        ("family", 4),
        ("port", 6),
        ("scope", 8),
        ("address", 12),
    ]


def test_codes_of_our_own_lie_below_every_errno() -> None:
    codes = [_epoll.EEOF, _epoll.EQUEUED, _epoll.EDELIM, _epoll.EIDLE]
    assert len(set(codes)) == len(codes)
    assert max(codes) < -max(errno.errorcode)


def test_check() -> None:
    assert _epoll.check(0) == 0
    assert _epoll.check(7) == 7
    with pytest.raises(OSError, match="Too many open files") as caught:
        _epoll.check(-errno.EMFILE)
    assert caught.value.errno == errno.EMFILE
    with pytest.raises(ConnectionResetError):
        _epoll.check(-errno.ECONNRESET)


@pytest.mark.parametrize(
    ("family", "port", "scope", "packed", "address"),
    [
        (socket.AF_INET, 80, 0, b"\x7f\0\0\1", ("127.0.0.1", 80)),
        (socket.AF_INET6, 80, 0, b"\0" * 15 + b"\1", ("::1", 80)),
        (socket.AF_INET6, 80, 2, b"\xfe\x80" + b"\0" * 13 + b"\1", ("fe80::1%2", 80)),
        (socket.AF_UNIX, 0, 0, b"", ""),
        (socket.AF_UNIX, 1, 0, b"", None),  # it has a name: ask
    ],
)
def test_peer_address(family: int, port: int, scope: int, packed: bytes, address: Any) -> None:
    record = struct.pack("=iHHI16s", 3, family, port, scope, packed)
    assert _epoll.peer_address(record) == address


def test_a_fault_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(AttributeError):
        _epoll.set_fault("NAP")
