"""PPO of RLlib in a learned world: ``python -m examples.rllib_ppo``.

Needs ``pip install 'nfd-env[rllib]'``, which brings an older Gymnasium, in an environment of its
own. Each of Ray's processes has a model and its share of the processor.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--iterations", type=int, default=10)
parser.add_argument("--batch", type=int, default=500, help="decisions in an iteration")
parser.add_argument("--runners", type=int, default=0, help="processes; 0 for this one")
args = parser.parse_args()


def make(settings: dict[str, Any]) -> gymnasium.Env:
    """A world whose observations are flat vectors; called in every process."""
    env = gymnasium.make("nfd_env:NFD/DoomTakeCover-v0", obs_type="latent", **settings)
    return gymnasium.wrappers.FlattenObservation(env)


register_env("doom-take-cover", make)
config = PPOConfig()
config.environment("doom-take-cover", env_config={"frame_skip": 4, "max_episode_steps": 100})
config.env_runners(num_env_runners=args.runners)
config.training(train_batch_size_per_learner=args.batch, minibatch_size=args.batch // 4)
algorithm = config.build_algo()
for iteration in range(args.iterations):
    result = algorithm.train()
    decisions = result["num_env_steps_sampled_lifetime"]
    print(f"iteration {iteration}: {decisions:.0f} decisions")
algorithm.stop()
