"""The world that comes with the package, as its users meet it."""

from __future__ import annotations

import cv2
import gymnasium
import numpy as np
import pytest
import torch
import yaml

import nfd_env  # noqa: F401  (registers the environments)
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.sources.spec import SourceError
from nfd_env.worlds.load import find_world, make_real, shipped_worlds

WORLDS = shipped_worlds()
NOOP, RIGHT, LEFT = 0, 1, 2


def test_there_is_one() -> None:
    assert "doom_take_cover" in WORLDS


@pytest.mark.parametrize("world", WORLDS)
def test_it_is_small_and_says_where_it_comes_from(world: str) -> None:
    folder = find_world(world)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 10e6
    provenance = yaml.safe_load((folder / "provenance.yaml").read_text())
    assert provenance["recordings"]["frames"] >= 100_000
    for stage in provenance["stages"].values():
        assert stage["steps"] > 0 and stage["wall_seconds"] > 0 and stage["validation"]
    assert provenance["configs"]


@pytest.mark.parametrize("world", WORLDS)
def test_the_real_game_is_seen_and_played_as_its_world_is(world: str) -> None:
    try:
        real = make_real(world)
    except SourceError as error:
        pytest.skip(f"the real game is not installed: {error}")
    learned = NFDVectorEnv(world, num_envs=1)
    assert real.observation_space == learned.single_observation_space
    assert real.action_space == learned.single_action_space
    frames = [real.reset(seed=0)[0]]
    real.action_space.seed(0)
    for _ in range(8):
        frame, reward, terminated, truncated, _ = real.step(real.action_space.sample())
        frames.append(frame)
        assert np.isfinite(reward) and not terminated and not truncated
    assert all(frame in real.observation_space for frame in frames)
    # One palette: the real game is what the world has learnt, no other level or crop of it. Where
    # backgrounds differ from level to level, that of one of the recorded starts.
    starts = torch.stack([start.latents[-1] for start in learned.starts[:128]])
    palettes = learned.model.decode(starts).float().mean((1, 2)).numpy()
    assert np.abs(np.mean(frames, (0, 1, 2)) - palettes).max(1).min() < 30
    real.close()


def slide(frames: list[np.ndarray]) -> float:
    """Median horizontal motion between consecutive frames, pixels a frame, right positive."""
    window = cv2.createHanningWindow((frames[0].shape[1], frames[0].shape[0]), cv2.CV_32F)
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY).astype(np.float32) for f in frames]
    pairs = zip(grey, grey[1:], strict=False)
    return float(np.median([cv2.phaseCorrelate(a, b, window)[0][0] for a, b in pairs]))


def test_a_held_key_slides_the_walls_the_right_way() -> None:
    env = NFDVectorEnv("DoomTakeCover", num_envs=6, sampling_steps=1, precision="fp32")
    env.reset(seed=list(range(2)) * 3, options={"start": "beginning"})
    held = np.repeat([NOOP, RIGHT, LEFT], 2)
    shown: list[np.ndarray] = []
    for _ in range(24):
        shown.append(env.step(held)[0])
    # The player starts from rest, so look at the second half.
    still, right, left = (
        np.mean(
            [slide([frames[row] for frames in shown[12:]]) for row in np.flatnonzero(held == a)]
        )
        for a in (NOOP, RIGHT, LEFT)
    )
    assert right < -0.3 and left > 0.3  # walking right moves the picture left
    assert abs(still) < 0.2


def test_the_world_of_the_package_steps_as_any_env() -> None:
    env = gymnasium.make("NFD/DoomTakeCover-v0")
    frame, _ = env.reset(seed=0)
    seen = [frame]
    for _ in range(4):
        frame, reward, _, _, info = env.step(RIGHT)
        seen.append(frame)
        assert reward == pytest.approx(1, abs=0.05)  # the game pays one for each tic
        assert 0 <= info["hazard"] <= 1
    assert len({f.tobytes() for f in seen}) == 5
