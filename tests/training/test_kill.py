"""Stopping a stage from outside, through the command line; the other ways are in test_loop.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.training.stage_command import cli

pytest.importorskip("tensorboard")


@pytest.fixture
def config(tmp_path: Path, recordings: Path) -> Path:
    path = tmp_path / "tokenizer.yaml"
    sizes = {"encoder_channels": [8, 8], "decoder_channels": [8, 8], "latent_channels": 4}
    train = {
        "folder": str(tmp_path / "run"),
        "steps": 100_000,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "validate_every": 100_000,
    }
    path.write_text(yaml.safe_dump({"recordings": str(recordings), "model": sizes, "train": train}))
    return path


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_stage_that_is_stopped_goes_on(
    config: Path, tmp_path: Path, number: int, status: int
) -> None:
    # As a shell starts what runs in the background: INT is ignored.
    ignoring = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash"]
    # A checkpoint is written when it is stopped, and by no clock. Where nothing can be written any
    # more there is one after every step.
    seconds = 0 if number == signal.SIGKILL else 10_000
    command = [sys.executable, "-m", "tests.training.stage_command", "tokenizer", str(config)]
    process = subprocess.Popen(
        [*ignoring, *command, f"train.checkpoint_seconds={seconds}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    run, state = tmp_path / "run", tmp_path / "run" / "state.pt"
    try:
        end = time.monotonic() + 240
        # Twenty steps are done when the log is more than its head.
        while not any(p.stat().st_size > 200 for p in run.glob("tensorboard/*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    step = torch.load(state, weights_only=True)["step"]
    assert step >= (19 if number == signal.SIGKILL else 20)  # a step is logged before it is saved
    # The same command goes on from there, and nothing is left to clear up.
    assert cli.main(["tokenizer", str(config), f"train.steps={step + 2}"]) == 0
    assert torch.load(state, weights_only=True)["step"] == step + 2
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not list((tmp_path / "run").glob(".*.tmp*"))
