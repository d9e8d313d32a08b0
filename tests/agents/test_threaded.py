"""Environments stepped by threads beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from agents.network import AgentSpec
from agents.threaded import ThreadedVectorEnv
from agents.train_ppo import TrainPPOConfig
from nfd_env.envs.vector_env import NFDVectorEnv


def make(world: Path) -> Any:
    def of(num_envs: int) -> NFDVectorEnv:
        return NFDVectorEnv(
            world,
            num_envs,
            device="cpu",
            precision="fp32",
            obs_type="latent",
            output="torch",
            autoreset_mode="SameStep",
            max_episode_steps=9,
        )

    return of


def test_it_is_the_one_env_in_parts(tiny_world: Path) -> None:
    whole, parts = make(tiny_world)(6), ThreadedVectorEnv(make(tiny_world), 6, 3)
    assert AgentSpec.of(parts, 2) == AgentSpec.of(whole, 2)
    close: dict[str, float] = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(parts.reset(seed=5)[0], whole.reset(seed=5)[0])
    generator, ends = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        actions = torch.randint(0, 3, (6,), generator=generator)
        left, right = parts.step(actions), whole.step(actions)
        for mine, its in zip(left[:4], right[:4], strict=True):
            torch.testing.assert_close(mine, its, **close)
        torch.testing.assert_close(left[4]["hazard"], right[4]["hazard"], **close)
        ended = left[2] | left[3]
        assert ("final_obs" in left[4]) == bool(ended.any())
        if ended.any():
            mine, its = (info["final_obs"][ended] for info in (left[4], right[4]))
            torch.testing.assert_close(mine, its, **close)
            ends += 1
    assert ends > 3
    parts.close()


def test_threads_do_not_disturb_one_another(tiny_world: Path) -> None:
    """The same seed gives the same rollout bit for bit, however the threads take turns."""
    rollouts = []
    for _ in range(3):
        env = ThreadedVectorEnv(make(tiny_world), 4, 4)
        seen = [env.reset(seed=1)[0]]
        seen += [env.step(torch.tensor([0, 1, 2, 1]))[0] for _ in range(25)]
        rollouts.append(torch.stack(seen))
        env.close()
    assert torch.equal(rollouts[0], rollouts[1]) and torch.equal(rollouts[0], rollouts[2])


def test_the_number_of_torch_threads_stays(tiny_world: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        env = ThreadedVectorEnv(make(tiny_world), 2, 2)
        assert list(env._pool.map(lambda _: torch.get_num_threads(), range(2))) == [1, 1]
        assert torch.get_num_threads() == 2
        env.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_share_evenly(workers: int) -> None:
    with pytest.raises(ValueError, match="does not divide num_envs 4"):
        TrainPPOConfig("a", 1, num_envs=4, workers=workers)
