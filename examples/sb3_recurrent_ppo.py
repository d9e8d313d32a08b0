"""An agent that remembers: sb3-contrib's RecurrentPPO: ``python -m examples.sb3_recurrent_ppo``.

Needs ``pip install 'nfd-env[sb3-contrib]'``.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from sb3_contrib import RecurrentPPO

from nfd_env.sb3 import make_vec_env

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20_000, help="decisions of all environments")
parser.add_argument("--num-envs", type=int, default=8)
args = parser.parse_args()

# One picture at a time: motion must be remembered.
world = {"obs_type": "latent", "frame_skip": 4, "max_episode_steps": 525}
envs = make_vec_env("NFD/DoomTakeCover-v0", args.num_envs, seed=0, env_kwargs=world)
steps = max(2, min(128, args.steps // args.num_envs))
agent = RecurrentPPO("MlpLstmPolicy", envs, n_steps=steps, batch_size=steps, seed=0)
agent.learn(args.steps)
observation: Any = envs.reset()
memory, begins = None, np.ones(args.num_envs, bool)
for _ in range(5):
    action, memory = agent.predict(observation, memory, begins)
    observation, rewards, begins, _ = envs.step(action)
print(
    f"{agent.num_timesteps} decisions; five more, of which it remembers {len(memory or ())} states"
)
envs.close()
