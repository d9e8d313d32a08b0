"""What the scripted player knows of the game."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from agents.take_cover_dodger import Dodger, approaching


def thing(name: str, number: int, x: float, y: float, speed: tuple[float, float]) -> Any:
    return SimpleNamespace(
        name=name,
        id=number,
        position_x=x,
        position_y=y,
        velocity_x=speed[0],
        velocity_y=speed[1],
    )


def actions(memory: int | None, balls: list[list[Any]]) -> list[list[int]]:
    """Of several players, deciding anew on every tic, in a game where these balls fly."""
    chosen = []
    for seed in range(8):
        player = thing("DoomPlayer", 0, 0.0, 384.0, (0.0, 0.0))
        game = SimpleNamespace(state=SimpleNamespace(objects=[player]))
        game.unwrapped = game
        dodger = Dodger(replan=1, memory=memory)
        dodger.reset(game, np.random.default_rng(seed))  # type: ignore[arg-type]
        taken = []
        for now in balls:
            game.state.objects = [player, *now]
            taken.append(dodger.act(np.zeros(0)))
        chosen.append(taken)
    return chosen


def test_without_memory_it_knows_what_the_picture_shows() -> None:
    # Both hit the player, who stands still; the second comes from beyond 45 degrees.
    ahead = [[thing("DoomImpBall", 1, 150.0, 384.0, (-10.0, 0.0))]]
    aside = [[thing("DoomImpBall", 1, 150.0, 609.0, (-10.0, -15.0))]]
    nothing = actions(None, [[]])
    assert actions(0, aside) == nothing != actions(None, aside)
    assert actions(0, ahead) == actions(None, ahead) != nothing


def test_it_remembers_what_left_the_picture_for_so_long() -> None:
    seen = [thing("DoomImpBall", 1, 500.0, 609.0, (-10.0, -15.0))]
    left = [thing("DoomImpBall", 1, 150.0, 609.0, (-10.0, -15.0))]
    flight = [seen, left, left, left]
    everything = actions(None, flight)

    def last(chosen: list[list[int]], tic: int) -> list[int]:
        return [taken[tic] for taken in chosen]

    two, none = actions(2, flight), actions(0, flight)
    assert last(two, 2) == last(everything, 2) != last(none, 2)
    assert last(two, 3) == last(none, 3) != last(everything, 3)


def test_where_fireballs_are_coming_to() -> None:
    player = thing("DoomPlayer", 0, 100.0, 384.0, (0.0, 0.0))

    def told(*balls: Any) -> np.ndarray:
        game = SimpleNamespace(state=SimpleNamespace(objects=[player, *balls]))
        game.unwrapped = game
        return approaching(game).reshape(6, 12)  # type: ignore[arg-type]

    assert not told().any()
    hit = thing("DoomImpBall", 1, 130.0, 384.0, (-10.0, 0.0))  # in 3 tics
    later = thing("DoomImpBall", 2, 300.0, 584.0, (-10.0, -4.0))  # in 20 tics, at 504
    assert np.argwhere(told(hit, later)).tolist() == [[0, 5], [3, 10]]
    gone = thing("DoomImpBall", 3, 90.0, 384.0, (-10.0, 0.0))
    bursting = thing("DoomImpBall", 4, 140.0, 384.0, (0.0, 0.0))
    far = thing("DoomImpBall", 5, 900.0, 384.0, (-10.0, 0.0))
    wide = thing("DoomImpBall", 6, 140.0, 900.0, (-10.0, 0.0))
    monster = thing("DoomImp", 7, 140.0, 384.0, (-10.0, 0.0))
    assert not told(gone, bursting, far, wide, monster).any()
    dead = SimpleNamespace(state=None)
    dead.unwrapped = dead
    assert np.isnan(approaching(dead)).all()  # type: ignore[arg-type]
