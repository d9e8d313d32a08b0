"""Batches of TorchRL's collector for its losses: ``python -m examples.torchrl_collector``.

Needs ``pip install 'nfd-env[torchrl]'``.
"""

from __future__ import annotations

import argparse

from nfd_env.torchrl import TorchRLEnv

from tensordict.nn import TensorDictModule  # isort: skip  # after nfd_env.torchrl
from torch import nn  # isort: skip
from torch.distributions import Categorical  # isort: skip
from torchrl.collectors import Collector  # isort: skip
from torchrl.modules import ProbabilisticActor, ValueOperator  # isort: skip
from torchrl.objectives.value import GAE  # isort: skip

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=2000, help="decisions of all environments")
parser.add_argument("--batch", type=int, default=500)
parser.add_argument("--num-envs", type=int, default=4)
args = parser.parse_args()

env = TorchRLEnv("DoomTakeCover", args.num_envs, obs_type="latent", frame_skip=4)
actor = ProbabilisticActor(
    TensorDictModule(nn.Sequential(nn.Flatten(-3), nn.LazyLinear(3)), ["observation"], ["logits"]),
    in_keys=["logits"],
    distribution_class=Categorical,
    return_log_prob=True,
).to(env.device)
value = ValueOperator(nn.Sequential(nn.Flatten(-3), nn.LazyLinear(1)), in_keys=["observation"])
value = value.to(env.device)
value(actor(env.reset()))  # gives the layers their sizes
collector = Collector(env, actor, frames_per_batch=args.batch, total_frames=args.steps)
for batch in collector:
    GAE(gamma=0.99, lmbda=0.95, value_network=value)(batch)
    print(f"batch {tuple(batch.batch_size)}: advantage {batch['advantage'].mean():.3f}")
collector.shutdown()
