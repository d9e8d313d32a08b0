"""Reading actions back: the right action of the right frames, and what the figures mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.evaluation.clips import ActionReport, format_actions, measure_actions
from nfd_env.evaluation.inverse_dynamics import (
    InverseDynamics,
    InverseDynamicsConfig,
    InverseDynamicsStage,
    InverseDynamicsTrainingConfig,
    load_inverse_dynamics,
    score,
    scores,
)
from nfd_env.inference.state import Context
from nfd_env.inference.world_model import WorldModel
from nfd_env.models.weights import CheckpointError
from nfd_env.recipe.gates import action_gates
from nfd_env.spaces import space_to_dict
from nfd_env.training.loop import TrainConfig, train
from nfd_env.worlds.load import load_world
from tests.clients.action_spaces import ACTION_SPACES
from tests.counter_env import move, paint, read

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


def columns(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values).T


def test_f1_and_r2_by_hand() -> None:
    taken, made = columns([0, 0, 1, 1]).long(), columns([0, 1, 1, 1]).long()
    assert score(spaces.Discrete(3), taken, made) == pytest.approx((2 / 3 + 0.8) / 2)
    assert score(spaces.Discrete(3), taken, taken) == 1
    # Only keys that were ever held count.
    keys = columns([1, 0, 1, 0], [0, 0, 0, 0]).long()
    other = columns([1, 1, 0, 0], [1, 0, 0, 0]).long()
    assert score(spaces.MultiBinary(2), keys, other) == pytest.approx(0.5)
    numbers = columns([0.0, 1.0, 2.0], [5.0, 5.0, 5.0])
    box = spaces.Box(-9, 9, (2,))
    assert score(box, numbers, numbers) == 1
    assert score(box, numbers, columns([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])) == 0
    assert np.isnan(score(box, numbers[:1], numbers[:1]))


def test_each_part_of_an_action_has_a_figure() -> None:
    space = spaces.MultiDiscrete([2, 2])
    taken, made = columns([0, 1, 0, 1], [0, 1, 0, 1]), columns([0, 1, 0, 1], [1, 1, 1, 1])
    assert scores(space, taken, made) == pytest.approx([1, 1 / 3])
    assert score(space, taken, made) == pytest.approx(2 / 3)
    known, never = scores(spaces.MultiBinary(2), columns([1, 1], [0, 0]), columns([1, 1], [1, 0]))
    assert known == 1 and np.isnan(never)
    row = [0.9, 0.95, 1.0, 0.5, 0.5]
    report = ActionReport("F1", *row, relative=0.9, windows=4, horizon=6, parts=[row, row])
    assert "part 1" in format_actions(report)


@pytest.mark.parametrize("values", ACTION_SPACES.values(), ids=ACTION_SPACES.keys())
def test_what_is_encoded_is_read(values: dict[str, Any]) -> None:
    network = InverseDynamics(InverseDynamicsConfig(values, [32, 48], channels=4))
    network.space.seed(0)
    actions = torch.from_numpy(np.stack([network.space.sample() for _ in range(40)]))
    labels = network.labels(network.codec.encode(actions))
    assert score(network.space, labels, labels) == pytest.approx(1)
    frames = torch.randint(0, 256, (3, 6, 32, 48, 3), dtype=torch.uint8)
    assert network.read(frames).shape == (3, labels.shape[1])


class Perfect(InverseDynamics):
    """Reads the counter env's action off two frames."""

    def read(self, frames: torch.Tensor) -> torch.Tensor:
        with np.errstate(all="ignore"):
            counters = np.stack([_counter(window) for window in frames.numpy()])
        asked = self.config.asked
        moved = counters[:, asked + 1] - counters[:, asked] + 1
        return torch.from_numpy(moved.clip(0, 2))[:, None]


def _counter(frames: np.ndarray) -> np.ndarray:
    cells = frames[:, 4::8, 4::8, 0].reshape(len(frames), -1) > 127
    return cells[:, :8].astype(np.int64) @ 2 ** np.arange(8)


def settings(recordings: Path, folder: Path, **kwargs: Any) -> InverseDynamicsTrainingConfig:
    loop = TrainConfig(str(folder), 6, 8, 1e-3, validate_every=3, precision="fp32")
    given = {"channels": 4, "validation_windows": 50, **kwargs}
    return InverseDynamicsTrainingConfig(str(recordings), loop, **given)


@pytest.mark.parametrize("window", [2, 5, 6])
def test_the_action_at_the_middle_frame_is_learned(
    recordings: Path, tmp_path: Path, window: int
) -> None:
    stage = InverseDynamicsStage(settings(recordings, tmp_path, window=window))
    frames, target = stage.batch(np.random.default_rng(0), 64)
    network = Perfect(stage.config)
    assert read(frames[0].numpy())[1][0] >= 0  # frames of the counter env
    assert torch.equal(network.read(frames), network.labels(target))


@pytest.mark.parametrize("window", [2, 5, 6])
def test_real_frames_are_read_with_their_own_actions(
    counter_world: Path, recordings: Path, window: int
) -> None:
    world = load_world(counter_world, **CPU)
    space = space_to_dict(world.action_space)
    network = Perfect(InverseDynamicsConfig(space, [32, 48], window))
    report = measure_actions(
        world, RecordedDataset(recordings), network, rollouts=6, horizon=10, progress=False
    )
    assert report.real == 1 and report.metric == "F1"
    # An untrained world does not move the counter, and other moments' actions fit by chance.
    assert report.generated < 0.6 and report.shuffled < 0.6
    assert report.windows == 6 * (10 - window + 1)
    assert "read back from" in format_actions(report)
    with pytest.raises(ValueError, match="horizon at least the window"):
        measure_actions(world, RecordedDataset(recordings), network, horizon=1)


class Obedient:
    """A world's model in which every action does what it does in the counter env."""

    def __init__(self, model: WorldModel) -> None:
        self.device, self.dynamics = model.device, model.dynamics

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        counters = torch.from_numpy(_counter(frames.numpy())).float()
        shape = (len(frames), *self.dynamics.config.latent_shape)
        return counters[:, None, None, None].expand(shape)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        frames = np.zeros((len(latents), 32, 48, 3), np.uint8)
        for frame, counter in zip(frames, latents[:, 0, 0, 0].tolist(), strict=True):
            paint(frame, int(counter), 0, 0)
        return torch.from_numpy(frames)

    def start(self, contexts: list[Context], seeds: list[Any]) -> dict[str, torch.Tensor]:
        return {"latents": torch.stack([context.latents[-1] for context in contexts])}

    def step(self, state: dict[str, torch.Tensor], actions: torch.Tensor) -> Any:
        state["latents"] = state["latents"] + move(actions.argmax(-1))[:, None, None, None]
        return SimpleNamespace(latents=state["latents"])


def test_a_world_that_obeys_is_read_like_the_game_and_its_control_at_chance(
    counter_world: Path, recordings: Path
) -> None:
    world = load_world(counter_world, **CPU)
    network = Perfect(InverseDynamicsConfig(space_to_dict(world.action_space), [32, 48]))
    world = replace(world, model=Obedient(world.model))
    report = measure_actions(
        world, RecordedDataset(recordings), network, rollouts=40, horizon=20, progress=False
    )
    assert (report.generated, report.reencoded, report.relative) == (1, 1, 1)
    assert report.chance == pytest.approx(1 / 3, abs=0.1) == report.shuffled
    assert all(gate.passed for gate in action_gates(report))
    assert report.clips is not None and report.clips.generated == report.clips.reencoded
    short = measure_actions(
        world, RecordedDataset(recordings), network, rollouts=2, horizon=60, progress=False
    )
    assert short.real == 1 and 30 < short.horizon < 44  # as long as the episodes are


def test_episodes_too_short_to_ask_a_world_are_refused(recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"has 46 frames: .* lower inverse_dynamics.window"):
        InverseDynamicsStage(settings(recordings, tmp_path, window=41))


def test_it_trains_and_is_loaded(
    counter_world: Path, recordings: Path, tmp_path: Path, make_world: Any
) -> None:
    stage = InverseDynamicsStage(settings(recordings, tmp_path))
    metrics = train(stage, settings(recordings, tmp_path).train, progress=False)
    assert 0 <= metrics["f1"] <= 1
    path = tmp_path / "model.safetensors"
    network = load_inverse_dynamics(path, load_world(counter_world, **CPU))
    assert network.config == stage.config
    other = make_world(action_space={"type": "MultiBinary", "n": 4})
    with pytest.raises(CheckpointError, match="train it on recordings of this world's game"):
        load_inverse_dynamics(path, load_world(other, **CPU))
