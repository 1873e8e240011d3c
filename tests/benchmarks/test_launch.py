"""benchmarks/peers/_launch.py: what the programs take from their command lines."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from catalog import HERE


def launch() -> Any:
    """The module; the folder of the programs is not among those that are searched."""
    spec = importlib.util.spec_from_file_location("_launch", Path(HERE) / "peers" / "_launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("pollers=2", 2),
        ("direct_resume=False", False),
        ("direct_resume=True", True),
        ("driver=thread", "thread"),
        ("driver=1+", "1+"),
    ],
)
def test_settings_are_literals_or_strings(text: str, value: object) -> None:
    module = launch()
    parser = module.server_parser()
    module.add_settings(parser)
    options = parser.parse_args(["--loop=trio", "--workload=rpc", f"--configure={text}"])
    assert dict(options.configure) == {text.partition("=")[0]: value}


@pytest.mark.anyio
async def test_a_stall_of_the_loop_is_seen() -> None:
    watch = launch().StallWatch()
    longest = 0.0
    async with anyio.create_task_group() as group:
        group.start_soon(watch.run)
        while watch.take() == 0:  # every sleep takes a little longer than it should
            await anyio.sleep(0)
        time.sleep(0.05)
        while longest < 0.049:
            await anyio.sleep(0)
            longest = max(longest, watch.take())
        group.cancel_scope.cancel()
