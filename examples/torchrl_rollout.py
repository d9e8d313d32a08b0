"""A rollout into a TensorDict with TorchRL: ``python -m examples.torchrl_rollout``.

Needs ``pip install 'nfd-env[torchrl]'``.
"""

from __future__ import annotations

import argparse

from nfd_env.torchrl import TorchRLEnv

from torchrl.envs import StepCounter, TransformedEnv  # isort: skip  # after nfd_env.torchrl

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--num-envs", type=int, default=4)
args = parser.parse_args()

world = TorchRLEnv("DoomTakeCover", args.num_envs, obs_type="latent", frame_skip=4)
env = TransformedEnv(world, StepCounter())
env.set_seed(0)
batch = env.rollout(args.steps, break_when_any_done=False)  # random actions; or give a policy
print(batch)
print(f"{int(batch['next', 'terminated'].sum())} episodes ended")
