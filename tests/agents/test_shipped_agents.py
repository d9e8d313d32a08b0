"""The agents that come along play the world that comes along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agents.load import load_agent
from nfd_env.envs.vector_env import NFDVectorEnv

AGENTS = sorted((Path(__file__).parents[2] / "agents").glob("*.safetensors"))


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_it_plays_the_shipped_world(path: Path) -> None:
    obs_type = load_agent(path).spec.obs_type
    env = NFDVectorEnv(
        "DoomTakeCover", 2, "cpu", obs_type=obs_type, frame_skip=4, output="torch", precision="fp32"
    )
    agent = load_agent(path, env)
    assert agent.spec.trained_in == "world"
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
