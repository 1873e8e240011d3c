"""The texts: their links lead somewhere. That their programs run: test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]

_LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


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
