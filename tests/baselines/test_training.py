"""``nfd train-baseline``: both parts are trained in a finished run, and go on after a stop."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nfd_env.baselines.commands import _plan
from nfd_env.baselines.discrete import DiscreteTokenizer, DiscreteTokenizerConfig
from nfd_env.baselines.stages import (
    DiscreteTokenizerStage,
    DiscreteTrainingConfig,
    TokenDynamicsStage,
    TokenDynamicsTrainingConfig,
)
from nfd_env.cli import main
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import load_weights, save_weights
from nfd_env.recipe.game import load_game
from nfd_env.recipe.plan import Plan
from nfd_env.recipe.records import StageRecord, write_records, write_yaml
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.loop import TrainConfig, train
from tests.counter_env import record_counter_episodes

pytest.importorskip("tensorboard")


def loop(folder: Path, steps: int, **values: Any) -> TrainConfig:
    base = {"batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2, "precision": "fp32"}
    return TrainConfig(str(folder), steps, **{**base, "ema_decay": 0.5, **values})


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short episodes: token after token, a validation's rollouts take long."""
    folder = tmp_path_factory.mktemp("recordings")
    record_counter_episodes(folder, episodes=8, validation_every=4, length=16)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recordings: Path, endless_world: Path) -> Path:
    """What a training of a world leaves, with that world's random tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(endless_world, folder / "world")
    (folder / "tokenizer").mkdir()
    weights = folder / "tokenizer" / "model.safetensors"
    shutil.copy(endless_world / "tokenizer.safetensors", weights)
    encode(EncodeConfig(str(recordings), str(weights), str(folder / "latents")), progress=False)
    schooled = {"batch_size": 4, "learning_rate": 3e-3}
    model = {"latent_height": 4, "latent_width": 6, "width": 32, "layers": 1, "heads": 2}
    plan = Plan(
        {},
        {},
        {},
        tokenizer={"hard_weight": 0.5, "hard_fraction": 0.05, "train": schooled},
        flow={"model": {**model, "window": 4}, "frames": 4, "rollouts": 2, "train": schooled},
    )
    write_yaml(folder / "plan.yaml", asdict(plan))
    done = StageRecord("", finished=True, seconds=0.6)
    write_records(folder, {"tokenizer": done, "flow": done})
    game = {"name": "Counter", "folder": str(folder), "recordings": str(recordings)}
    game |= {"source": {"env_id": "tests/Counter-v0"}, "device": "cpu"}
    (folder / "game.yaml").write_text(yaml.safe_dump(game))
    return folder


@pytest.fixture
def tokenizer_settings(run: Path, recordings: Path, tmp_path: Path) -> DiscreteTrainingConfig:
    weights = str(run / "tokenizer" / "model.safetensors")
    settings = loop(tmp_path / "tokenizer", 12)
    return DiscreteTrainingConfig(str(recordings), weights, settings, 1, [4, 3, 3], 8, 1)


def test_the_world_s_tokenizer_stays_as_it_is(tokenizer_settings: DiscreteTrainingConfig) -> None:
    stage = DiscreteTokenizerStage(tokenizer_settings)
    frozen = stage.network.tokenizer
    assert not isinstance(frozen, torch.Tensor)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    batch = stage.batch(np.random.default_rng(0), 16)
    first = stage.loss(stage.network, batch)[0].item()
    metrics = train(stage, tokenizer_settings.train, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert stage.loss(stage.network, batch)[0].item() < first
    assert 0 < metrics["used"] <= 1 and "psnr" in metrics
    path = Path(tokenizer_settings.train.folder) / "model.safetensors"
    made = load_weights(path, DiscreteTokenizer, DiscreteTokenizerConfig)
    assert not any("tokenizer" in name for name in made.state_dict())


def test_going_on_computes_what_would_have_been_computed(
    tokenizer_settings: DiscreteTrainingConfig, run: Path, recordings: Path, tmp_path: Path
) -> None:
    train(DiscreteTokenizerStage(tokenizer_settings), tokenizer_settings.train, progress=False)

    def made(name: str, *steps: int) -> TokenDynamicsStage:
        """``steps``: where the training stops, and goes on as a new process would."""
        for stop in steps:
            settings = TokenDynamicsTrainingConfig(
                str(recordings),
                str(run / "tokenizer" / "model.safetensors"),
                str(run / "latents"),
                loop(tmp_path / name, stop, decay_fraction=1e-9, validate_every=100),
                discrete=str(Path(tokenizer_settings.train.folder) / "model.safetensors"),
                width=32,
                layers=1,
                heads=2,
                window=4,
                frames=4,
                rollouts=2,
            )
            stage = TokenDynamicsStage(settings)
            metrics.append(train(stage, settings.train, progress=False))
        return stage

    metrics: list[dict[str, float]] = []
    whole, parts = made("whole", 14), made("parts", 6, 14)
    for mine, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        assert torch.equal(mine, other)
    vocabulary = whole.config.vocabulary
    assert metrics[0]["nats"] < np.log(vocabulary)  # better than knowing nothing
    assert metrics[0]["nats_parallel"] < np.log(vocabulary)
    assert {"error_1", "error_over_frozen_8", "spread"} <= metrics[0].keys()
    assert metrics[0] == metrics[2]
    picture = whole.strip(whole.network)
    assert picture.shape[0] == 2 * 3 * 32  # two episodes, each real and drawn in both orders


def test_the_command(run: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    arguments = ["train-baseline", str(folder / "game.yaml"), f"folder={folder}"]
    assert main([*arguments, "--dynamics-minutes", "0.02", "--into-world"]) == 0
    shown = capsys.readouterr().out
    assert "tokenizer: " in shown and "M parameters" in shown
    assert f"nfd eval {folder}/world --against" in shown

    def read() -> dict[str, Any]:
        return yaml.safe_load((folder / "autoregressive" / "plan.yaml").read_text())

    assert read()["minutes"] == {"tokenizer": 0.01, "dynamics": 0.02}
    env = NFDVectorEnv(folder / "world", 2, "cpu", dynamics="autoregressive_parallel")
    frame, _ = env.reset(seed=0)
    assert frame.shape == (2, 32, 48, 3) and env.step(np.zeros(2, int))[0].shape == frame.shape
    # The world takes its copy along.
    shutil.rmtree(folder / "autoregressive" / "dynamics")
    shutil.copytree(folder / "world", tmp_path / "elsewhere")
    NFDVectorEnv(tmp_path / "elsewhere", 1, "cpu", dynamics="autoregressive").reset(seed=0)
    # Again, with the minutes and the steps that were decided on.
    plan = read()
    assert main(arguments) == 0
    assert read() == plan and "anew" not in capsys.readouterr().out
    # More minutes: more steps, and what was trained goes on. Another tokenizer: all is made anew.
    game = load_game(folder / "game.yaml", [f"folder={folder}"])
    own = folder / "autoregressive"
    longer = _plan(game, own, {"tokenizer": 0.01, "dynamics": 2.0})
    assert longer.seconds_per_step.keys() == {"tokenizer"} and longer.dynamics == plan["dynamics"]
    assert (own / "tokenizer").exists() and not capsys.readouterr().out
    other = Tokenizer(TokenizerConfig([8, 8, 8], [8, 8, 8], 4))
    save_weights(folder / "tokenizer" / "model.safetensors", other, other.config, kind="tokenizer")
    assert _plan(game, own, longer.minutes).seconds_per_step == {}
    assert "made anew" in capsys.readouterr().out and not (own / "tokenizer").exists()


@pytest.mark.parametrize(
    ("records", "arguments", "reason"),
    [
        (("tokenizer",), [], "its flow stage is not finished"),
        (
            ("tokenizer", "flow"),
            ["--tokenizer-minutes", "0"],
            "--tokenizer-minutes must be above 0",
        ),
    ],
)
def test_a_run_that_is_not_so_far(
    run: Path, tmp_path: Path, capsys: Any, records: Any, arguments: list[str], reason: str
) -> None:
    done = StageRecord("", finished=True, seconds=60.0)
    write_records(tmp_path, dict.fromkeys(records, done))
    overrides = [str(run / "game.yaml"), f"folder={tmp_path}"]
    assert main(["train-baseline", *overrides, *arguments]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "autoregressive").exists()
