"""Every example runs as it stands, with small arguments."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
ARGUMENTS = {
    "gym_make": "--steps 8",
    "make_vec": "--steps 4 --num-envs 2",
    "custom_reward": "--steps 4",
    "planning": "--steps 8 --plans 2 --keys 1",
    "torchrl_rollout": "--steps 4 --num-envs 2",
    "sb3_ppo": "--steps 8 --num-envs 2 --episodes 1 --max-frames 8",
    "native_ppo": "--steps 8 --num-envs 2 --episodes 1 --max-frames 8",
    "cleanrl_ppo": "--updates 1 --num-envs 2 --num-steps 4",
    "sb3_recurrent_ppo": "--steps 8 --num-envs 2",
    "torchrl_collector": "--steps 8 --batch 8 --num-envs 2",
    "skrl_ppo": "--steps 4 --num-envs 2",
    "minari_dataset": "--episodes 2 --steps 6",
    "tianshou_ppo": "--steps 16 --epochs 1 --num-envs 2",
    "rllib_ppo": "--iterations 1 --batch 16 --runners 2 --num-envs 4",
    "torchrl_distributed": "--num-envs 2 --steps 4 --batch 2",
}
# The module that each needs, and how it is installed.
NEEDS = {
    "torchrl_rollout": ("torchrl", "pip install 'nfd-env[torchrl]'"),
    "torchrl_distributed": ("torchrl", "pip install 'nfd-env[torchrl]'"),
    "torchrl_collector": ("torchrl", "pip install 'nfd-env[torchrl]'"),
    "sb3_ppo": ("stable_baselines3", "pip install 'nfd-env[sb3]'"),
    "sb3_recurrent_ppo": ("sb3_contrib", "pip install 'nfd-env[sb3-contrib]'"),
    "skrl_ppo": ("skrl", "pip install 'nfd-env[skrl]'"),
    "minari_dataset": ("jax", "pip install 'nfd-env[minari]'"),
    "tianshou_ppo": ("tianshou", "pip install 'nfd-env[tianshou]'"),
    "rllib_ppo": ("ray", "pip install 'nfd-env[rllib]', in an environment of its own"),
}
WITH_SCORE = ("sb3_ppo", "native_ppo")
# What each prints when it has done what it is there for.
SAYS = {
    "gym_make": "8 frames of shape (96, 128, 3)",
    "make_vec": "(2, 16, 6, 8)",
    "custom_reward": "mean reward",
    "planning": "score",
    "torchrl_rollout": "batch_size=torch.Size([2, 4])",
    "sb3_ppo": "| learned world |",
    "native_ppo": "| learned world |",
    "cleanrl_ppo": "update 0: entropy",
    "sb3_recurrent_ppo": "8 decisions; five more",
    "torchrl_collector": "batch (2, 4): advantage",
    "skrl_ppo": "trained and played 4 decisions in each of 2",
    "minari_dataset": "2 episodes, 12 steps",
    "tianshou_ppo": "16 decisions in 1 epochs",
    "rllib_ppo": "iteration 0: 16 decisions",
    "torchrl_distributed": "4 decisions, mean reward",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    if name in NEEDS and find_spec(NEEDS[name][0]) is None:
        pytest.skip(f"needs {NEEDS[name][1]}")
    arguments = ARGUMENTS[name].split()
    if name == "torchrl_distributed":
        with socket.create_server(("127.0.0.1", 0)) as free:
            arguments += ["--port", str(free.getsockname()[1])]
    if name in (*WITH_SCORE, "minari_dataset"):
        arguments += ["--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    if name in WITH_SCORE:
        # A score from inside the world never stands alone where the real game is installed.
        real = "| real game |" if find_spec("vizdoom") else "NO REAL SCORE"
        assert real in done.stdout
        assert (tmp_path / "eval_agent.mp4").is_file()


def test_they_stay_short() -> None:
    for name in EXAMPLES:
        lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
        # One of them holds the algorithm itself.
        assert len(lines) <= (62 if name == "cleanrl_ppo" else 50), name
