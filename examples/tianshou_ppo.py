"""PPO of Tianshou in a learned world: ``python -m examples.tianshou_ppo``.

Needs ``pip install 'nfd-env[tianshou]'``.
"""

from __future__ import annotations

import argparse

import gymnasium
import torch
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=2000, help="decisions in an epoch")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--num-envs", type=int, default=4)
args = parser.parse_args()

world = {"obs_type": "latent", "frame_skip": 4, "max_episode_steps": 100}
make = lambda: gymnasium.make("nfd_env:NFD/DoomTakeCover-v0", **world)  # noqa: E731
envs, probe = DummyVectorEnv([make] * args.num_envs), make()  # all share the weights
net = Net(state_shape=probe.observation_space.shape, hidden_sizes=[256])
actor = DiscreteActor(preprocess_net=net, action_shape=3, softmax_output=False)
policy = ProbabilisticActorPolicy(
    actor=actor,
    dist_fn=lambda logits: torch.distributions.Categorical(logits=logits),
    action_space=probe.action_space,
    action_scaling=False,
)
critic = DiscreteCritic(preprocess_net=net)
ppo = PPO(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=1e-3))
buffer = VectorReplayBuffer(args.steps * 2, args.num_envs)
result = ppo.run_training(
    OnPolicyTrainerParams(
        training_collector=Collector(ppo, envs, buffer),
        max_epochs=args.epochs,
        epoch_num_steps=args.steps,
        collection_step_num_env_steps=args.steps,
        batch_size=64,
    )
)
print(f"{result.train_step} decisions in {args.epochs} epochs")
