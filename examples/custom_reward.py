"""A reward of one's own over a learned world: ``python -m examples.custom_reward``.

Death is rare and drawn by chance. The world also says how probable it was, and so the chance of
dying can be paid for at every step, by the player who ran the risk and not by the one who was
unlucky: the expectation is the same, the variance is lower.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper


class PayForRisk(VectorWrapper):
    """Takes ``price`` times the probability of having died from each step's reward."""

    def __init__(self, env: VectorEnv, price: float) -> None:
        """Wrap a vector env of a learned world."""
        super().__init__(env)
        self.price = price

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step; a step that only resets costs nothing."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        rewards = rewards - self.price * infos["hazard"] * infos["_hazard"]
        return observations, rewards, terminated, truncated, infos


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()
envs = PayForRisk(gymnasium.make_vec("nfd_env:NFD/DoomTakeCover-v0", num_envs=4), price=100.0)
envs.reset(seed=0)
rewards = np.array([envs.step(envs.action_space.sample())[1] for _ in range(args.steps)])
print(f"mean reward {rewards.mean():.3f}, lowest {rewards.min():.3f}")
