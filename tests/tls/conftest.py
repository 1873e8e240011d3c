"""Every test of TLS is about both kinds of sessions, unless it says otherwise."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _both_kinds(tls_way: str) -> None:
    pass
