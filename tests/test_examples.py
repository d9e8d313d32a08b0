"""Every example runs as it stands, with small arguments."""

from __future__ import annotations

import os
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
}
NEEDS = {
    "torchrl_rollout": ("torchrl", "torchrl"),
    "sb3_ppo": ("stable_baselines3", "sb3"),
}
# What each prints when it has done what it is there for.
SAYS = {
    "gym_make": "8 frames of shape (96, 128, 3)",
    "make_vec": "(2, 16, 6, 8)",
    "custom_reward": "mean reward",
    "planning": "score",
    "torchrl_rollout": "batch_size=torch.Size([2, 4])",
    "sb3_ppo": "| learned world |",
    "native_ppo": "| learned world |",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    if name in NEEDS and find_spec(NEEDS[name][0]) is None:
        pytest.skip(f"needs pip install 'nfd-env[{NEEDS[name][1]}]'")
    arguments = ARGUMENTS[name].split()
    if name.endswith("_ppo"):
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
    if name.endswith("_ppo"):
        # A score from inside the world never stands alone where the real game is installed.
        real = "| real game |" if find_spec("vizdoom") else "NO REAL SCORE"
        assert real in done.stdout
        assert (tmp_path / "eval_agent.mp4").is_file()


def test_they_stay_short() -> None:
    for name in EXAMPLES:
        lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 48, name
