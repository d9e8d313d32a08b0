"""A few distillation steps from a barely trained teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfd_env.data.shards import RecordedDataset
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.layers import sinusoid
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, load_weights, save_weights
from nfd_env.training.adversarial import AdversarialConfig, hinge
from nfd_env.training.continuous import smooth_levels
from nfd_env.training.distill import DistillStage, DistillTrainingConfig
from nfd_env.training.distill_validation import energy
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.flow import FlowStage, FlowTrainingConfig
from nfd_env.training.loop import TrainConfig, train
from tests.counter_env import record_counter_episodes

pytest.importorskip("tensorboard")

MODEL = DynamicsConfig(4, 4, 6, 2, 3, 32, 2, 2, 4, recent=2, local_width=8, local_blocks=1)
Make = Callable[..., DistillTrainingConfig]


def run(folder: Path, steps: int, **kwargs: Any) -> TrainConfig:
    values = {
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "precision": "fp32",
        "ema_decay": 0.9,
        "validate_every": 1000,
        **kwargs,
    }
    return TrainConfig(folder=str(folder), steps=steps, **values)


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory, recordings: Path) -> FlowTrainingConfig:
    """A tokenizer with standardised latents, and a teacher trained for a moment."""
    torch.manual_seed(0)  # whatever ran before: some tokenizers leave a student little to learn
    folder = tmp_path_factory.mktemp("distill")
    tokenizer, path = Tokenizer(TokenizerConfig([8, 8, 8], [8, 8, 8], 4)), folder / "tok"
    frames = torch.from_numpy(np.concatenate([e.frames for e in RecordedDataset(recordings)]))
    tokenizer.normalise.momentum = None  # the mean of all batches, here of one
    with torch.no_grad():
        tokenizer.encode_frames(frames)
    save_weights(path, tokenizer, tokenizer.config)
    settings = FlowTrainingConfig(
        str(recordings),
        str(path),
        str(folder / "latents"),
        run(folder / "flow", 60, learning_rate=3e-3),
        MODEL,
        frames=6,
    )
    encode(EncodeConfig(str(recordings), str(path), str(folder / "latents")), progress=False)
    train(FlowStage(settings), settings.train, progress=False)
    return settings


@pytest.fixture
def make(flow: FlowTrainingConfig, tmp_path: Path) -> Make:
    def settings(steps: int = 30, **kwargs: Any) -> DistillTrainingConfig:
        training = {k: kwargs.pop(k) for k in ("folder", "validate_every") if k in kwargs}
        values: dict[str, Any] = {
            "teacher": f"{flow.train.folder}/model.safetensors",
            "train": run(training.pop("folder", tmp_path / "run"), steps, **training),
            "frames": 6,
            "tangent_warmup": 10,
            "rollouts": 4,
            "long_rollout": 8,
            "reference_steps": 0,
            **kwargs,
        }
        return DistillTrainingConfig(flow.recordings, flow.tokenizer, flow.latents, **values)

    return settings


def measured(stage: DistillStage, discrete: bool, key: str = "") -> float:
    """The mean loss, or a logged value, on fixed batches, at the tangent's full weight."""
    values = []
    steps = stage.network.steps.clone()
    stage.network.steps.fill_(10**6)
    stage.network.eval()
    for seed in range(4):
        batch = stage.batch(np.random.default_rng(seed), 32)
        torch.manual_seed(seed)
        with torch.no_grad():
            loss, logs = stage.loss(stage.network, batch._replace(discrete=discrete))
        values.append(float(logs[key] if key else loss))
    stage.network.steps.copy_(steps)
    return float(np.mean(values))


def test_discrete_time(make: Make) -> None:
    settings = make(40, discrete_steps=40, grid_doublings=1)
    stage = DistillStage(settings)
    before = measured(stage, True)
    metrics = train(stage, settings.train, progress=False)
    assert measured(stage, True) < 0.8 * before
    assert int(stage.network.steps) == 40
    assert {"steps1_error_8", "steps2_spread", "steps4_frechet", "steps1_texture"} <= metrics.keys()
    assert np.isfinite(list(metrics.values())).all()
    assert set(stage.lower_is_better) <= metrics.keys() and "steps1_standing_32" in metrics
    student = load_weights(f"{settings.train.folder}/model.safetensors", Dynamics, DynamicsConfig)
    assert student.config == MODEL
    assert (Path(settings.train.folder) / "samples" / "0000040.png").exists()


def test_continuous_time(make: Make) -> None:
    settings = make(120)
    stage = DistillStage(settings)
    before = measured(stage, False, "tangent")
    train(stage, settings.train, progress=False)
    after = measured(stage, False, "tangent")
    assert after < 0.9 * before


def test_discrete_then_continuous(make: Make) -> None:
    stage = DistillStage(make(discrete_steps=3))
    rng = np.random.default_rng(0)
    kinds, warmups = [], []
    for _ in range(9):
        batch = stage.batch(rng, 4)
        loss, logs = stage.loss(stage.network.train(), batch)
        loss.backward()
        kinds.append(batch.discrete)
        warmups.append(float(logs.get("warmup", -1)))
        assert torch.isfinite(loss)
    assert kinds == [True] * 3 + [False] * 6
    assert warmups == pytest.approx([-1, -1, -1, 0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_the_student_starts_as_its_teacher(make: Make) -> None:
    """So the first tangent has no part from their difference, and the judge is not yet trained."""
    stage = DistillStage(make())
    for a, b in zip(stage.network.student.parameters(), stage._teacher.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad and not b.requires_grad


def test_going_on_from_an_earlier_student(make: Make, tmp_path: Path) -> None:
    other = Dynamics(MODEL)
    save_weights(tmp_path / "s.safetensors", other, MODEL)
    stage = DistillStage(make(student=str(tmp_path / "s.safetensors"), fastest_level=0.0))
    for a, b in zip(stage.network.student.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumed_equals_uninterrupted(make: Make, tmp_path: Path) -> None:
    """Across the change from discrete to continuous time."""
    whole = make(8, folder=tmp_path / "whole", discrete_steps=4)
    train(DistillStage(whole), whole.train, progress=False)
    halves = make(8, folder=tmp_path / "halves", discrete_steps=4)
    first = DistillStage(halves)
    batches = iter(range(3))

    def stop(*args: Any) -> Any:
        next(batches)
        return DistillStage.batch(first, *args)

    first.batch = stop  # type: ignore[method-assign]
    with pytest.raises(StopIteration):
        train(first, replace(halves.train, checkpoint_seconds=0.0), progress=False)
    train(DistillStage(halves), halves.train, progress=False)
    ends = [load_weights(f"{s.train.folder}/model.safetensors", Dynamics, DynamicsConfig)
            for s in (whole, halves)]  # fmt: skip
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_adversarial_term_trains_judge_and_student_apart(make: Make, discrete: bool) -> None:
    adversarial = AdversarialConfig(0.5, layers=[0, 1])
    stage = DistillStage(make(adversarial=adversarial, discrete_steps=9 * discrete))
    network, judge = stage.network, stage.network.judge
    assert judge is not None
    batch = stage.batch(np.random.default_rng(0), 4)
    assert batch.adversarial and batch.discrete == discrete

    def gradients(batch) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network.zero_grad()
        network.steps.zero_()
        loss, logs = stage.loss(network, batch)
        loss.backward()
        assert torch.isfinite(loss) and ("judging" in logs) == batch.adversarial
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    both, alone = gradients(batch), gradients(batch._replace(adversarial=False))
    judged = [n for n, _ in network.named_parameters() if "judge" in n and "weight" in n]
    assert len(judged) == 4 and all(both[n].abs().sum() > 0 for n in judged)
    assert not any("judge" in name for name in alone)
    assert any(not torch.equal(both[n], alone[n]) for n in alone)
    assert stage._features._kept is None  # nothing keeps the graph alive
    # The judge's gradient is that of its own hinge loss alone.
    stage.settings = replace(stage.settings, adversarial=replace(adversarial, weight=0.0))
    own = gradients(batch)
    for name, _ in judge.named_parameters():
        torch.testing.assert_close(own[f"judge.{name}"], both[f"judge.{name}"])
    torch.testing.assert_close(own["student.output.weight"], alone["student.output.weight"])


def test_a_judge_learns_to_tell_noise_from_frames(make: Make) -> None:
    stage = DistillStage(make(adversarial=AdversarialConfig(1.0, layers=[0, 1])))
    judge = stage.network.judge
    assert judge is not None
    latents, actions = stage.batch(np.random.default_rng(0), 16)[:2]

    def teacher(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        return stage._teacher.forward_two_copies(
            latents, torch.zeros_like(levels), x, levels, actions
        )

    optimiser = torch.optim.Adam(judge.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        _, judging = hinge(judge, stage._features, teacher, latents, torch.randn_like(latents))
        optimiser.zero_grad()
        judging.backward()
        optimiser.step()
        losses.append(judging.item())
    assert losses[0] == pytest.approx(2, abs=0.5) and np.mean(losses[-5:]) < 1.2


def test_validation_compares_with_the_teacher_once(make: Make) -> None:
    stage = DistillStage(make(reference_steps=2))
    stage.network.eval()
    first = stage.validate(stage.network)
    assert {"teacher_texture", "teacher1_error_1", "teacher2_error_32", "teacher4_energy"} <= set(
        first
    )
    reference = stage._reference
    again = stage.validate(stage.network)
    assert stage._reference is reference and again == first
    # Student and teacher are the same network, so one step of both is the same as well.
    for name in ("error_32", "energy", "frechet"):
        assert first[f"steps1_{name}"] == pytest.approx(first[f"teacher1_{name}"], rel=1e-4)
    # Many steps are compared in single frames only.
    two = DistillStage(make(reference_steps=2))
    assert "teacher_error_1" not in first
    metrics = two.validate(two.network.eval())
    assert metrics["teacher_texture"] == pytest.approx(metrics["teacher2_texture"], rel=1e-5)


def test_long_rollouts_tell_pictures_that_grow_brighter(make: Make) -> None:
    stage = DistillStage(make(reference_steps=1, long_rollout=40))
    real, _ = stage._long
    assert real.shape[1] == 44
    faded = torch.cat((real[:, :-8], 0.5 * real[:, -8:]), 1)
    assert energy(real, real) == 1 and energy(real, faded) == pytest.approx(0.25)
    assert energy(real, 2 * real) == pytest.approx(4.0)


def test_smooth_levels(make: Make, flow: FlowTrainingConfig) -> None:
    """The response is the slow part's, silenced weights stay zero, the slope loses its ripple."""
    path = f"{flow.train.folder}/model.safetensors"
    rough = load_weights(path, Dynamics, DynamicsConfig)
    torch.manual_seed(0)
    levels = torch.linspace(0, 1, 2001)
    with torch.no_grad():
        # A response that is smooth but for a fast ripple on top.
        rough.embed_level[0].weight.zero_()
        rough.embed_level[0].weight[:, 128 + 100].add_(torch.randn(32))  # sin 0.75 s
        even = rough.embed_level[0](sinusoid(levels))
        rough.embed_level[0].weight[:, 3].add_(0.02 * torch.randn(32))  # cos 806 s
        before = rough.embed_level[0](sinusoid(levels))
        smooth_levels(rough, 30.0)
        after = rough.embed_level[0](sinusoid(levels))
    weight = rough.embed_level[0].weight
    silent = (weight == 0).all(0)
    assert silent.sum() == 98 and torch.equal(silent[:128], silent[128:])
    assert (after - even).square().mean() < 0.05 * (before - even).square().mean()
    assert (before - after).diff(dim=0).std() > 5 * after.diff(dim=0).std()
    rough.requires_grad_(True)
    rough.embed_level[0](sinusoid(levels)).sum().backward()
    assert weight.grad is not None
    assert not weight.grad[:, silent].any() and weight.grad[:, ~silent].any()
    with pytest.raises(ValueError, match="no level feature"):
        smooth_levels(rough, 1e-6)


def test_silenced_levels_stay_silent_in_training(make: Make) -> None:
    settings = make(5, discrete_steps=2)
    stage = DistillStage(settings)
    silent = (stage.network.student.embed_level[0].weight == 0).all(0)
    train(stage, settings.train, progress=False)
    student = load_weights(f"{settings.train.folder}/model.safetensors", Dynamics, DynamicsConfig)
    assert silent.sum() == 98 and torch.equal((student.embed_level[0].weight == 0).all(0), silent)


@pytest.mark.parametrize("teacher", ["", "no/such/model.safetensors"])
def test_no_teacher(make: Make, teacher: str) -> None:
    with pytest.raises(
        CheckpointError, match="distilling needs a trained flow model.*train the flow"
    ):
        DistillStage(make(teacher=teacher))


def test_a_teacher_of_something_else(make: Make, flow: FlowTrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a Tokenizer, not a Dynamics"):
        DistillStage(make(teacher=flow.tokenizer))
    wide = replace(MODEL, action_width=5)
    save_weights(tmp_path / "wide", Dynamics(wide), wide)
    with pytest.raises(CheckpointError, match="actions of width 5; .* and 3"):
        DistillStage(make(teacher=str(tmp_path / "wide")))


def test_no_steps(make: Make) -> None:
    with pytest.raises(ValueError, match="^steps must be at least 1"):
        make(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solver": "heun"}, "euler or midpoint"),
        ({"frames": 1}, "frames must be at least 2"),
        ({"weight_bound": 0.5}, "weight_bound must be at least 1"),
        ({"discrete_steps": -1}, "discrete_steps must be at least 0"),
        ({"coarsest_grid": 0}, "coarsest_grid must be at least 1"),
        ({"rollouts": 2}, "rollouts must be at least 3"),
    ],
)
def test_settings_out_of_range(make: Make, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**values)


def test_adversarial_settings_out_of_range(make: Make) -> None:
    for values in ({"weight": -1.0}, {"weight": 1.0, "layers": []}):
        with pytest.raises(ValueError, match="adversarial"):
            AdversarialConfig(**values)
    with pytest.raises(ValueError, match="layers must be from 0 to 1"):
        DistillStage(make(adversarial=AdversarialConfig(1.0, layers=[2])))


def test_recordings_that_are_too_short(make: Make, tmp_path: Path) -> None:
    record_counter_episodes(tmp_path / "r", 4, validation_every=2, length=10)
    short = replace(make(), recordings=str(tmp_path / "r"), latents=str(tmp_path / "l"))
    with pytest.raises(ValueError, match="no validation .* has 12 frames, the longest has 11"):
        DistillStage(short)
    assert not (tmp_path / "l").exists()  # it is said before anything is encoded
