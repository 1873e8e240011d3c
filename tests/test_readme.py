"""The texts: their programs run, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio
import pytest

import anypoll

ROOT = Path(__file__).parent.parent
TEXTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


def _programs() -> list[Any]:
    programs = []
    for text in TEXTS:
        content = text.read_text(encoding="utf-8")
        for block in _BLOCK.finditer(content):
            line = content.count("\n", 0, block.start(1))  # lines above the program
            name = f"{text.relative_to(ROOT)}:{line + 1}"
            programs.append(pytest.param(text, line, block[1], id=name))
    return programs


@pytest.mark.unsanitized  # their timeouts are written for readers
@pytest.mark.parametrize(("text", "line", "source"), _programs())
def test_programs_run(text: Path, line: int, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as it stands, with two exceptions: its server gets a free port, and where it would
    serve for ever, what its handler says is an echo is tried, and it ends.
    """
    servers: list[anypoll.Server] = []

    class ServeOnFreePort(anypoll.serve):
        def __init__(self, handler: Any, **options: Any) -> None:
            super().__init__(handler, **{**options, "port": 0})

        async def __aenter__(self) -> anypoll.Server:
            servers.append(await super().__aenter__())
            return servers[-1]

    async def instead_of_for_ever() -> None:
        with anyio.fail_after(30):
            async with await anyio.connect_tcp("127.0.0.1", servers[-1].port) as client:
                await client.send(b"to and fro")
                received = b""
                while len(received) < len(b"to and fro"):
                    received += await client.receive()
        assert received == b"to and fro"

    monkeypatch.setattr(anypoll, "serve", ServeOnFreePort)
    monkeypatch.setattr(anyio, "sleep_forever", instead_of_for_ever)
    code = compile("\n" * line + source, str(text), "exec")
    exec(code, {"__name__": "__main__"})


def test_there_are_programs() -> None:
    assert [program.values[0].name for program in _programs()].count("README.md") >= 3


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_links_lead_somewhere(text: Path) -> None:
    targets = _LINK.findall(text.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (text.parent / target).exists()] == []


def test_make_targets_exist() -> None:
    makefiles = [ROOT / "Makefile", ROOT / "tests" / "c" / "rules.mk"]
    rules = "".join(path.read_text(encoding="utf-8") for path in makefiles)
    phony = {
        name
        for line in re.findall(r"^\.PHONY: (.*)$", rules, re.MULTILINE)
        for name in line.split()
    }
    phony |= {f"test-c-{variant}" for variant in ("plain", "asan", "tsan")}
    named = {
        target
        for text in TEXTS
        for target in re.findall(
            r"(?:`|^    )make ([a-z][a-z-]*)", text.read_text("utf-8"), re.MULTILINE
        )
    }
    assert named
    assert named <= phony
