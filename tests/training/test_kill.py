"""Stopping a stage from outside, through the command line; the other ways are in test_loop.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from nfd_env.data.shards import RecordedDataset
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import save_weights
from nfd_env.training.encode import EncodeConfig, check_encoded, encode
from tests.counter_env import record_counter_episodes

pytest.importorskip("tensorboard")
if not hasattr(signal, "SIGHUP"):
    pytest.skip("needs the signals of Unix", allow_module_level=True)

from tests.training.stage_command import cli, in_the_background  # noqa: E402

SIZES = {
    "tokenizer": {
        "model": {"encoder_channels": [8, 8], "decoder_channels": [8, 8], "latent_channels": 4}
    },
    "flow": {
        "model": {
            "latent_channels": 4,
            "latent_height": 4,
            "latent_width": 6,
            "patch": 2,
            "action_width": 3,
            "width": 16,
            "layers": 1,
            "heads": 1,
            "window": 4,
        },
        "frames": 4,
    },
    "heads": {"width": 8, "frames": 8},
    "distill": {
        "frames": 4,
        "tangent_warmup": 1,
        "rollouts": 3,
        "reference_steps": 0,
        "long_rollout": 8,
    },
}
PATIENCE = 600  # seconds; a machine may be busy
STATUS = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGHUP: 129,
    signal.SIGKILL: -signal.SIGKILL,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stages begin with: recordings in shards, a tokenizer, latents, a teacher."""
    folder = tmp_path_factory.mktemp("made")
    record_counter_episodes(folder / "r", 4, validation_every=2, frames_per_shard=20, length=20)
    sizes = TokenizerConfig([8, 8, 8], [8, 8, 8], 4)
    network = Tokenizer(sizes)
    network.normalise.momentum = None
    with torch.no_grad():
        network.encode_frames(
            torch.from_numpy(np.array(next(iter(RecordedDataset(folder / "r"))).frames))
        )
    save_weights(folder / "tokenizer.safetensors", network, sizes)
    encode(EncodeConfig(*(str(folder / n) for n in FILES)), progress=False)
    assert run("flow", folder, folder / "teacher", "train.steps=1") == 0
    return folder


FILES = "r", "tokenizer.safetensors", "latents"


def arguments(stage: str, made: Path, folder: Path, *overrides: str) -> list[str]:
    """The command that runs ``stage`` in ``folder``."""
    recordings, tokenizer, latents = (str(made / name) for name in FILES)
    values: dict = {"recordings": recordings}
    if stage == "encode":
        values |= {"tokenizer": tokenizer, "latents": str(folder)}
    else:
        values |= SIZES[stage]
        values["train"] = {
            "folder": str(folder),
            "steps": 100_000,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "validate_every": 100_000,
        }
    if stage in ("flow", "heads", "distill"):
        values |= {"tokenizer": tokenizer, "latents": latents}
    if stage == "distill":
        values["teacher"] = str(made / "teacher" / "model.safetensors")
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return ["stage", str(path), *overrides, "--name", stage]


def run(stage: str, made: Path, folder: Path, *overrides: str) -> int:
    return cli.main(arguments(stage, made, folder, *overrides))


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("stage", ["encode", *SIZES])
def test_a_stage_that_is_stopped_goes_on(
    made: Path, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    told, errors, folder = tmp_path / "told", tmp_path / "errors", tmp_path / "run"
    command = arguments(stage, made, folder)
    if stage != "encode":
        # A checkpoint is written when it is stopped, and by no clock. Where nothing can be written
        # any more there is one after every step.
        seconds = 0 if number == signal.SIGKILL else 10_000
        command.append(f"train.checkpoint_seconds={seconds}")
    # Its server has imported everything once, see tests/conftest.py.
    context = multiprocessing.get_context("forkserver")
    process = context.Process(
        target=in_the_background, args=([*command, "--told", str(told)], str(errors))
    )
    process.start()
    try:
        end = time.monotonic() + PATIENCE
        while not told.exists():
            assert process.is_alive() and time.monotonic() < end, errors.read_text()
            time.sleep(0.02)
        os.kill(process.pid or 0, number)
        process.join(PATIENCE)
    finally:
        process.kill()
    assert process.exitcode == STATUS[number], errors.read_text()
    assert "Traceback" not in errors.read_text()
    # The same command goes on from there, and nothing is left to clear up.
    if stage == "encode":
        first = folder / "shard-w00-00000.npy"
        stamp = first.stat().st_mtime_ns
        assert run(stage, made, folder) == 0
        assert first.stat().st_mtime_ns == stamp
        check_encoded(RecordedDataset(made / "r"), made / "tokenizer.safetensors", folder)
    else:
        step = torch.load(folder / "state.pt", weights_only=True)["step"]
        assert step >= (2 if number == signal.SIGKILL else 3)  # the last one is told before
        assert run(stage, made, folder, f"train.steps={step + 2}") == 0
        assert torch.load(folder / "state.pt", weights_only=True)["step"] == step + 2
        assert (folder / "model.safetensors").exists()
    assert not list(folder.glob(".*.tmp*"))
