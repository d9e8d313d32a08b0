"""Train Stable-Baselines3's PPO in a learned world: ``python -m examples.sb3_ppo``.

Needs ``pip install 'nfd-env[sb3,doom]'``. For a real training: ``python -m agents.train_sb3``.
"""

from __future__ import annotations

import argparse

from nfd_env.evaluation.agents import AgentEvaluation, evaluate_agent, format_report
from nfd_env.sb3 import make_vec_env

from stable_baselines3 import PPO  # isort: skip  # after nfd_env.sb3, which says what to install
from stable_baselines3.common.vec_env import VecFrameStack  # isort: skip

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20_000, help="decisions of all environments")
parser.add_argument("--num-envs", type=int, default=8)
parser.add_argument("--episodes", type=int, default=10, help="of the evaluation")
parser.add_argument("--max-frames", type=int, default=2100, help="of an episode of it")
parser.add_argument("--out", default="outputs/sb3_ppo")
args = parser.parse_args()

world = {"obs_type": "latent", "frame_skip": 4, "max_episode_steps": 525}
envs = make_vec_env("NFD/DoomTakeCover-v0", args.num_envs, seed=0, env_kwargs=world)
stacked = VecFrameStack(envs, 3, channels_order="first")  # one picture shows no motion
steps = max(2, min(128, args.steps // args.num_envs))
agent = PPO("MlpPolicy", stacked, n_steps=steps, batch_size=steps * args.num_envs, seed=0)
agent.learn(args.steps)
agent.save(f"{args.out}/agent.zip")
stacked.close()

# What it is worth shows in the real game, not in the world that it learned in.
evaluation = AgentEvaluation(
    f"{args.out}/agent.zip",
    world="DoomTakeCover",
    episodes=args.episodes,
    obs_type="latent",
    frame_skip=4,
    max_frames=args.max_frames,
    trust=True,  # it is our own
)
report = evaluate_agent(evaluation, args.out)
print(format_report(report))
