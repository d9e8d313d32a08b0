"""The recipe as torchrun starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import yaml

import nfd_env  # noqa: F401  (registers the environments)
from tests.recipe.dots import ENV_ID
from tests.recipe.tiny import TINY


def test_two_processes_make_one_world(tmp_path: Path) -> None:
    folder, game = tmp_path / "run", tmp_path / "dots.yaml"
    source = {"env_id": ENV_ID, "imports": ["tests.recipe.dots"]}
    given = {"name": "Dots", "folder": str(folder), "source": source, "frames": 600, "minutes": 1}
    game.write_text(yaml.safe_dump({**given, "device": "cpu", **TINY}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "nfd_env", "train", str(game), "--keep-going"]
    made = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.count("play it:") == 1  # said by one of them
    assert (folder / "report.html").is_file()
    env = gymnasium.make("NFD/World-v0", world=folder / "world")
    env.reset(seed=0)
    assert env.step(2)[0].shape == (48, 48, 3)
