"""Players that get in each other's way, at random: not a byte is lost or seen twice."""

from __future__ import annotations

import pytest
from peers import within
from races import Game

pytestmark = pytest.mark.anyio

LONG = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 40)]


@pytest.mark.parametrize("seed", [*range(5), *LONG])
async def test_players_that_disturb_one_another(seed: int) -> None:
    game = Game(seed, players=8)
    await within(game.run(), 120)
    assert game.told["cancelled"] > 8
