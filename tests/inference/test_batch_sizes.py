"""What a row shows does not depend on how many rows there are, in every number format."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.precision import multiplies_bf16
from nfd_env.worlds.load import shipped_worlds

FRAMES, LEVELS = 24, 2
MOST_ROWS = 17


def play(world: str, rows: int, precision: str, frames: int = FRAMES) -> np.ndarray:
    env = NFDVectorEnv(world, rows, "cpu", precision=precision, obs_type="latent")
    shown = [env.reset(seed=5)[0][:1]]
    env.single_action_space.seed(0)
    for _ in range(frames):
        actions = np.stack([env.single_action_space.sample() for _ in range(MOST_ROWS)])
        shown.append(env.step(actions[:rows])[0][:1])
    # Decoded one at a time: what is compared is the rollout.
    decoded = [env.model.decode(torch.from_numpy(latents)).numpy() for latents in shown]
    return np.concatenate(decoded).astype(int)


@pytest.mark.parametrize("world", shipped_worlds())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_is_the_same_alone_and_among_others(precision: str, world: str) -> None:
    if precision == "bf16" and not multiplies_bf16(torch.device("cpu")):
        pytest.skip("this processor has no bf16 products")
    alone = play(world, 1, precision)
    for rows in (3, 4, MOST_ROWS):
        assert np.abs(play(world, rows, precision) - alone).max() <= LEVELS, rows
    assert np.abs(np.diff(alone, axis=0)).max() > 50  # it moves


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_again_is_the_same_bit_for_bit(precision: str) -> None:
    if precision == "bf16" and not multiplies_bf16(torch.device("cpu")):
        pytest.skip("this processor has no bf16 products")
    world = shipped_worlds()[0]
    assert np.array_equal(play(world, 3, precision, 12), play(world, 3, precision, 12))
