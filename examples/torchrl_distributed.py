"""TorchRL's distributed collector: ``python -m examples.torchrl_distributed --runners 2``.

Needs ``pip install 'nfd-env[torchrl]'``. With ``--launcher submitit`` (``pip install submitit``)
each runner is a job of a Slurm cluster; each loads the world once and holds a native batch.
"""

from __future__ import annotations

import argparse
from functools import partial

from nfd_env.torchrl import TorchRLEnv

from torchrl.collectors.distributed import DistributedSyncCollector  # isort: skip

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--world", default="DoomTakeCover", help="every machine must find it")
parser.add_argument("--runners", type=int, default=2)
parser.add_argument("--num-envs", type=int, default=8, help="in all runners together")
parser.add_argument("--steps", type=int, default=200, help="decisions of each environment")
parser.add_argument("--batch", type=int, default=50, help="of them in a batch")
parser.add_argument("--launcher", default="mp", help="mp (this machine) or submitit")
parser.add_argument("--port", default="10003")


def make(world: str, seed: int, num_envs: int) -> TorchRLEnv:
    """One runner's environments; slot i has the seed ``seed`` + i."""
    env = TorchRLEnv(world, num_envs, obs_type="latent", frame_skip=4)
    env.set_seed(seed)
    return env


if __name__ == "__main__":
    args = parser.parse_args()
    share = args.num_envs // args.runners
    collector = DistributedSyncCollector(
        [partial(make, args.world, n * share, share) for n in range(args.runners)],
        None,  # random actions; or a policy
        frames_per_batch=args.batch * args.num_envs,
        total_frames=args.steps * args.num_envs,
        backend="gloo",
        launcher=args.launcher,
        tcp_port=args.port,
    )
    for batch in collector:
        print(f"{batch.numel()} decisions, mean reward {batch['next', 'reward'].mean():.3f}")
    collector.shutdown()
