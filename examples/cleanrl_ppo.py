"""PPO in one file, as CleanRL writes it, in a learned world: ``python -m examples.cleanrl_ppo``."""

from __future__ import annotations

import argparse

import gymnasium
import torch
from torch import nn
from torch.distributions import Categorical

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--updates", type=int, default=100)
parser.add_argument("--num-envs", type=int, default=8)
parser.add_argument("--num-steps", type=int, default=64, help="decisions between two updates")
args = parser.parse_args()
torch.manual_seed(1)

settings = {"obs_type": "latent", "frame_skip": 4, "autoreset_mode": "SameStep"}
envs = gymnasium.make_vec("nfd_env:NFD/DoomTakeCover-v0", num_envs=args.num_envs, **settings)
envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
choices = 3  # stay, right, left
net = nn.Sequential(nn.Flatten(-3), nn.LazyLinear(256), nn.Tanh(), nn.LazyLinear(choices + 1))
obs = torch.as_tensor(envs.reset(seed=1)[0])
net(obs)  # gives the layers their sizes
optimiser = torch.optim.Adam(net.parameters(), lr=2.5e-4)


def judge(obs: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
    """The policy and the value of what is observed."""
    logits, value = net(obs).split([choices, 1], -1)
    return Categorical(logits=logits), value[..., 0]


for update in range(args.updates):
    kept = []
    for _ in range(args.num_steps):
        with torch.no_grad():
            policy, value = judge(obs)
        action, seen = policy.sample(), obs
        obs, reward, terminated, truncated, info = envs.step(action.numpy())
        obs, reward, done = (torch.as_tensor(x) for x in (obs, reward / 4, terminated | truncated))
        kept.append((seen, action, policy.log_prob(action), value, reward.float(), done.float()))
    seen, action, old, value, reward, done = map(torch.stack, zip(*kept, strict=True))
    advantage, last, later = torch.zeros_like(value), 0.0, judge(obs)[1].detach()
    for t in reversed(range(args.num_steps)):
        last = reward[t] + 0.99 * (1 - done[t]) * (later + 0.95 * last) - value[t]
        advantage[t], later = last, value[t]
    for epoch in range(4):
        policy, now = judge(seen)
        ratio = (policy.log_prob(action) - old).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        error = (now - value - advantage).square().mean()
        optimiser.zero_grad()
        (error / 2 - gain - 0.01 * policy.entropy().mean()).backward()
        optimiser.step()
        if epoch == 0:
            print(
                f"update {update}: entropy {policy.entropy().mean():.3f}, value error {error:.3f}"
            )
envs.close()
