"""Train the native PPO in a learned world, tensors only: ``python -m examples.native_ppo``.

For a real training, with progress, logs and resume: ``python -m agents.train_ppo``.
"""

from __future__ import annotations

import argparse

import torch

from nfd_env import NFDVectorEnv
from nfd_env.evaluation.agents import AgentEvaluation, evaluate_agent, format_report
from nfd_env.learning.ppo import Position, PPOConfig, rollout, update
from nfd_env.models.weights import save_weights
from nfd_env.players.policy import ActorCritic, AgentSpec, PolicyConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20_000, help="decisions of all environments")
parser.add_argument("--num-envs", type=int, default=16)
parser.add_argument("--episodes", type=int, default=10, help="of the evaluation")
parser.add_argument("--max-frames", type=int, default=2100, help="of an episode of it")
parser.add_argument("--out", default="outputs/native_ppo")
args = parser.parse_args()

world = {"obs_type": "latent", "output": "torch", "frame_skip": 4, "autoreset_mode": "SameStep"}
env = NFDVectorEnv("DoomTakeCover", args.num_envs, max_episode_steps=525, **world)
policy = ActorCritic(PolicyConfig(AgentSpec.of(env, frame_stack=3))).to(env.model.device)
steps = max(1, min(64, args.steps // args.num_envs))
settings = PPOConfig(rollout_steps=steps, minibatch_size=steps * args.num_envs // 2)
optimiser = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
position = Position.start(env.reset(seed=0)[0], frame_stack=3)
for number in range(max(1, args.steps // (steps * args.num_envs))):
    batch, position = rollout(env, policy.act, position, settings.rollout_steps)
    logs = update(policy, optimiser, batch, settings)
    print(f"update {number}: entropy {logs['entropy']:.3f}, value loss {logs['value_loss']:.3f}")
agent = f"{args.out}/agent.safetensors"
save_weights(agent, policy, policy.config)

# What it is worth shows in the real game, not in the world that it learned in.
evaluation = AgentEvaluation(agent, episodes=args.episodes, max_frames=args.max_frames)
report = evaluate_agent(evaluation, args.out)
print(format_report(report))
