"""benchmarks/callgrind.py: reading what callgrind writes."""

from __future__ import annotations

import pytest
from callgrind import NO_NAME, Function, parse

# What stands in a call, after `calls=`, is counted in the called function already.
DUMP = """\
# callgrind format
version: 1
creator: callgrind-3.19.0
pid: 4448
cmd:  python server.py --loop=uvloop
part: 1

positions: line
events: Ir
summary: 0


ob=(1) /usr/lib/libpython3.11.so.1.0
fl=(1) /src/ceval.c
fn=(1) _PyEval_EvalFrameDefault
10 100
+3 20
fi=(2) /src/object.h
-2 5
* 1
cob=(2) /site-packages/_core.abi3.so
cfi=(3) ???
cfn=(2) ap_conn_write
calls=7 40
12 9000

fn=(3) _PyEval_EvalFrameDefault'2
10 4

ob=(2)
fl=(3)
fn=(2)
0 60
cob=(1)
cfi=(2)
cfn=(1)
calls=1 10
0 126
0 6

fn=(4) 0x0000000004936788
0 2

fn=(5) 0x0000000004936790
0 1

totals: 199
"""


def test_each_function_has_its_own_instructions_only() -> None:
    profile = parse(DUMP)
    assert profile.instructions == 199
    assert profile.functions == {
        Function("libpython3.11.so.1.0", "_PyEval_EvalFrameDefault"): 100 + 20 + 5 + 1 + 4,
        Function("_core.abi3.so", "ap_conn_write"): 60 + 6,
        Function("_core.abi3.so", NO_NAME): 2 + 1,
    }


def test_functions_must_add_up() -> None:
    with pytest.raises(ValueError, match="199 instructions in functions, of 200"):
        parse(DUMP.replace("totals: 199", "totals: 200"))


def test_a_file_that_ends_early_is_no_profile() -> None:
    with pytest.raises(ValueError):
        parse(DUMP[: DUMP.index("totals")])
