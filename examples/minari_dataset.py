"""Play in a learned world as an offline data set: ``python -m examples.minari_dataset``.

Needs ``pip install 'nfd-env[minari]'``.
"""

from __future__ import annotations

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--episodes", type=int, default=4)
parser.add_argument("--steps", type=int, default=100, help="at most in an episode")
parser.add_argument("--out", default="outputs/minari", help="folder of Minari data sets")
args = parser.parse_args()
os.environ["MINARI_DATASETS_PATH"] = os.path.abspath(args.out)  # read when it is imported

import gymnasium  # noqa: E402
from minari import DataCollector  # noqa: E402

env = gymnasium.make("nfd_env:NFD/DoomTakeCover-v0", max_episode_steps=args.steps)
collector = DataCollector(env, record_infos=True)  # infos: what each step risked
env.action_space.seed(0)
for episode in range(args.episodes):
    collector.reset(seed=episode)
    ended = False
    while not ended:
        _, _, terminated, truncated, _ = collector.step(env.action_space.sample())
        ended = terminated or truncated
dataset = collector.create_dataset("nfd/doom-take-cover-random-v0", algorithm_name="random")
print(f"{dataset.total_episodes} episodes, {dataset.total_steps} steps in {args.out}")
collector.close()
