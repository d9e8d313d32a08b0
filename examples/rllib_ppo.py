"""PPO of RLlib in a learned world: ``python -m examples.rllib_ppo``.

Needs ``pip install 'nfd-env[rllib]'`` in an environment of its own: it brings an older Gymnasium.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import FlattenObservation
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.envs.wrappers import SlotShare

SEED = 0

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--world", default="DoomTakeCover", help="every machine must find it")
parser.add_argument("--iterations", type=int, default=10)
parser.add_argument("--batch", type=int, default=500, help="decisions in an iteration")
parser.add_argument("--runners", type=int, default=0, help="processes; 0 for this one")
parser.add_argument("--num-envs", type=int, default=8, help="in all runners together")


def make(settings: dict[str, Any]) -> gymnasium.vector.VectorEnv:
    """One runner's environments, a native batch; called in every process."""
    env = NFDVectorEnv(obs_type="latent", autoreset_mode=AutoresetMode.NEXT_STEP, **settings)
    return FlattenObservation(SlotShare(env, SEED + 1))  # RLlib counts runners from 1


if __name__ == "__main__":
    args = parser.parse_args()
    register_env("learned-world", make)
    world = {"world": args.world, "frame_skip": 4, "max_episode_steps": 100}
    config = PPOConfig().environment("learned-world", env_config=world).debugging(seed=SEED)
    config.env_runners(
        num_env_runners=args.runners,
        num_envs_per_env_runner=args.num_envs // max(1, args.runners),
        gym_env_vectorize_mode=gymnasium.VectorizeMode.VECTOR_ENTRY_POINT,
    )
    config.training(train_batch_size_per_learner=args.batch, minibatch_size=args.batch // 4)
    algorithm = config.build_algo()
    for number in range(args.iterations):
        print(f"iteration {number}:", algorithm.train()["num_env_steps_sampled_lifetime"])
    algorithm.stop()
