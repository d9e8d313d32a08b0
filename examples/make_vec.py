"""Step a batch of learned worlds with one model: ``python -m examples.make_vec``.

Observations are the tokenizer's latents and everything is a tensor on the model's device, so that
nothing is decoded and nothing copied.
"""

from __future__ import annotations

import argparse

import gymnasium
import torch

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--num-envs", type=int, default=8)
args = parser.parse_args()

envs = gymnasium.make_vec(
    "nfd_env:NFD/DoomTakeCover-v0",
    num_envs=args.num_envs,
    obs_type="latent",
    output="torch",
    frame_skip=4,
    autoreset_mode="SameStep",  # an episode that ends is followed by the next at once
)
latents, _ = envs.reset(seed=0)
print(f"observations {latents.dtype} {tuple(latents.shape)} on {latents.device}")
ended = 0
for _ in range(args.steps):
    actions = torch.randint(3, (args.num_envs,), device=latents.device)
    latents, rewards, terminated, truncated, infos = envs.step(actions)
    ended += int((terminated | truncated).sum())
print(f"{args.steps * args.num_envs} steps, {ended} episodes ended")
envs.close()
