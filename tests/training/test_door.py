"""What cannot be trained is refused before anything is encoded or trained, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfd_env.data.episode import Episode
from nfd_env.data.shards import RecordingError, ShardWriter
from nfd_env.devices import DeviceError
from nfd_env.models.dynamics import DynamicsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, save_weights
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.flow import FlowStage, FlowTrainingConfig
from nfd_env.training.heads import HeadsStage, HeadsTrainingConfig
from nfd_env.training.loop import TrainConfig
from nfd_env.training.recorded import open_recordings
from nfd_env.training.tokenizer import TokenizerStage, TokenizerTrainingConfig
from tests.counter_env import dataset_spec, record_counter_episodes

SIZES = TokenizerConfig([8, 8, 8], [8, 8, 8], 4)
MODEL = DynamicsConfig(4, 4, 6, 2, 3, 32, 2, 2, 4)


def plan(folder: Path, **kwargs: Any) -> TrainConfig:
    return TrainConfig(str(folder / "run"), 2, 4, 1e-3, precision="fp32", **kwargs)


def of_tokenizer(folder: Path, **kwargs: Any) -> TokenizerTrainingConfig:
    return TokenizerTrainingConfig(str(folder / "r"), plan(folder, **kwargs), SIZES)


def of_flow(folder: Path, **kwargs: Any) -> FlowTrainingConfig:
    values = {"frames": 6, "model": MODEL, **kwargs}
    paths = (str(folder / name) for name in ("r", "tokenizer", "latents"))
    return FlowTrainingConfig(*paths, plan(folder), **values)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: TokenizerStage(of_tokenizer(folder)),
        lambda folder: encode(EncodeConfig(*(str(folder / n) for n in ("r", "tokenizer", "l")))),
        lambda folder: FlowStage(of_flow(folder)),
    ],
)
@pytest.mark.parametrize(
    ("validation_every", "episodes", "message"),
    [(1, 1, "has no train episode, and 1 in all"), (9, 2, "has no train"), (5, 0, "has no train")],
)
def test_too_few_episodes(
    tmp_path: Path,
    make: Callable[[Path], Any],
    validation_every: int,
    episodes: int,
    message: str,
) -> None:
    first = 0 if validation_every == 1 else 1
    record_counter_episodes(tmp_path / "r", episodes, validation_every, first=first)
    if validation_every == 9:
        message = "has no validation episode, and 2 in all: record more"
    with pytest.raises(RecordingError, match=message):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_episodes_shorter_than_a_window(tmp_path: Path) -> None:
    record_counter_episodes(tmp_path / "r", 2, validation_every=2, length=40)
    with pytest.raises(RecordingError, match="no train episode of .*/r has 42 frames.*has 41: re"):
        FlowStage(of_flow(tmp_path, frames=42))
    open_recordings(tmp_path / "r", 41, 41)
    record_counter_episodes(
        tmp_path / "h", 2, validation_every=2, length=40, terminal_frame=False, hide_terminal=True
    )
    with pytest.raises(RecordingError, match="no train .* has 41 frames, the longest has 4"):
        open_recordings(tmp_path / "h", 41, 41)


def test_frames_that_do_not_divide(tmp_path: Path) -> None:
    record_counter_episodes(tmp_path / "r", 2, validation_every=2)
    deep = TokenizerConfig([8] * 5, [8] * 5, 4)
    settings = TokenizerTrainingConfig(str(tmp_path / "r"), plan(tmp_path), deep)
    with pytest.raises(RecordingError, match="frames of 32 x 48 do not divide by 32, as 5 encoder"):
        TokenizerStage(settings)


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    record_counter_episodes(tmp_path / "r", 2, validation_every=2)
    with pytest.raises(DeviceError, match="unknown device 'gpu'"):
        TokenizerStage(of_tokenizer(tmp_path, device="gpu"))


def test_dynamics_of_another_game(tmp_path: Path) -> None:
    record_counter_episodes(tmp_path / "r", 2, validation_every=2, length=40)
    save_weights(tmp_path / "tokenizer", Tokenizer(SIZES), SIZES)
    settings = of_flow(tmp_path, model=DynamicsConfig(4, 4, 6, 2, 5, 32, 2, 2, 4))
    encode(EncodeConfig(settings.recordings, settings.tokenizer, settings.latents), progress=False)
    with pytest.raises(CheckpointError, match="model is for latents .* width 5; the recordings ha"):
        FlowStage(settings)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rewards_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    spec = dataset_spec()
    spec.save(tmp_path / "r")
    writer = ShardWriter(tmp_path / "r", spec, "w00")
    for seed, split in ((3, "validation"), (4, "train")):
        frames = np.zeros((6, 32, 48, 3), np.uint8)
        quiet = np.zeros(5, bool)
        writer.add(Episode(frames, np.zeros(5, int), np.zeros(5), quiet, quiet, seed, split=split))
    # Nobody records such rewards any more, but old recordings may hold them.
    path = next((tmp_path / "r").glob("shard-*")) / "rewards.bin"
    rewards = np.fromfile(path, np.float32)
    rewards[7] = value
    rewards.tofile(path)
    save_weights(tmp_path / "tokenizer", Tokenizer(SIZES), SIZES)
    paths = [str(tmp_path / name) for name in ("r", "tokenizer", "latents")]
    encode(EncodeConfig(*paths), progress=False)
    with pytest.raises(RecordingError, match=f"seed 4 has the reward {value} at step 2: mend"):
        HeadsStage(HeadsTrainingConfig(*paths, plan(tmp_path), width=8, frames=4))


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (
            TokenizerTrainingConfig,
            {"hard_fraction": 0.0},
            "hard_fraction must be above 0 and at most 1",
        ),
        (TokenizerTrainingConfig, {"edge_weight": -1.0}, "edge_weight must be at least 0"),
        (FlowTrainingConfig, {"frames": 1}, "frames must be at least 2"),
        (FlowTrainingConfig, {"history_level": 1.5}, "history_level must be from 0 to 1"),
        (FlowTrainingConfig, {"level_shift": 0.0}, "level_shift must be above 0"),
        (HeadsTrainingConfig, {"end_share": 1.0}, "end_share must be"),
        (HeadsTrainingConfig, {"dropout": 1.0}, "dropout must be"),
        (HeadsTrainingConfig, {"frames": 0}, "at least 1"),
        (HeadsTrainingConfig, {"latent_noise": -0.1}, "latent_noise must be at least 0"),
    ],
)
def test_settings_out_of_range(
    tmp_path: Path, make: Any, wrong: dict[str, Any], message: str
) -> None:
    paths = ["r"] if make is TokenizerTrainingConfig else ["r", "t", "l"]
    with pytest.raises(ValueError, match=message):
        make(*paths, plan(tmp_path), **wrong)
