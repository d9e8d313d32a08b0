"""Step one learned world like any Gymnasium environment: ``python -m examples.gym_make``."""

from __future__ import annotations

import argparse

import gymnasium
from gymnasium.wrappers import RecordEpisodeStatistics

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()

# "nfd_env:" imports the package, which registers its ids.
env = RecordEpisodeStatistics(gymnasium.make("nfd_env:NFD/DoomTakeCover-v0"))
print(f"observations {env.observation_space}, actions {env.action_space}")
env.action_space.seed(0)
frame, info = env.reset(seed=0)
for _ in range(args.steps):
    frame, reward, terminated, truncated, info = env.step(env.action_space.sample())
    if terminated or truncated:
        print(f"an episode ended after {info['episode']['t']:.1f} s of computing")
        frame, info = env.reset()
print(f"{args.steps} frames of shape {frame.shape}; info tells {', '.join(info)}")
env.close()
