"""The agents that come along play the world that comes along."""

from __future__ import annotations

import pytest
import torch

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.players.load import load_player, read_agent_spec, shipped_agents

AGENTS = sorted(shipped_agents())


@pytest.mark.parametrize("name", AGENTS)
def test_it_plays_the_shipped_world(name: str) -> None:
    spec = read_agent_spec(name)
    assert spec is not None and spec.trained_in == "world"
    obs_type = spec.obs_type
    env = NFDVectorEnv(
        "DoomTakeCover", 2, "cpu", obs_type=obs_type, frame_skip=4, output="torch", precision="fp32"
    )
    agent = load_player(name, env)
    agent.reset(2, seed=0)
    observation, _ = env.reset(seed=0)
    taken = []
    for _ in range(25):
        action = agent.act(observation)
        taken.append(action)
        observation, *_ = env.step(action)
    # It dodges: neither stands still nor holds a key for good.
    assert len(torch.stack(taken).unique()) > 1
    env.close()


def test_there_are_some() -> None:
    assert AGENTS
