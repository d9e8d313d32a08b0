"""Two runners of Ray on this machine, each with a native batch."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "ray", reason="RAY'S RUNNERS ARE NOT TESTED: pip install 'nfd-env[rllib]' in an environment"
)

# In a process of its own, which Ray may set up as it likes.
PROGRAM = """
import sys
import gymnasium, ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env
from examples.rllib_ppo import SEED, make

def found(runner):
    import os
    from nfd_env.worlds import load
    env = runner.env.unwrapped
    return os.getpid(), len(load._loaded), list(env.np_random_seed)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
register_env("world", make)
for runners in (2, 1):
    config = PPOConfig().debugging(seed=SEED)
    config.environment("world", env_config={"world": sys.argv[1]})
    config.env_runners(
        num_env_runners=runners, num_envs_per_env_runner=4 // runners, rollout_fragment_length=2,
        gym_env_vectorize_mode=gymnasium.VectorizeMode.VECTOR_ENTRY_POINT,
    )
    config.training(train_batch_size_per_learner=8, minibatch_size=4, num_epochs=1)
    algorithm = config.build_algo()
    algorithm.train()
    parts = algorithm.env_runner_group.foreach_env_runner(found, local_env_runner=False)
    assert len({pid for pid, _, _ in parts}) == runners, parts
    assert all(worlds == 1 for _, worlds, _ in parts), parts
    assert sorted(sum((seeds for _, _, seeds in parts), [])) == [1, 2, 3, 4], parts
    algorithm.stop()
print("seeds are kept")
"""


def test_slots_keep_their_seeds_with_one_and_two_runners(make_world):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(make_world(hazard_bias=-30.0))],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert "seeds are kept" in done.stdout, done.stderr
