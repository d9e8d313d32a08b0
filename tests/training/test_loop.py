from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nfd_env.training.loop import TrainConfig, TrainingDiverged, schedule, train

pytest.importorskip("tensorboard")


class TinyStage:
    """Noisy regression with everything that a resumed run could get wrong.

    Dropout and noise draw random numbers, batch norm has buffers, validation draws numbers too.
    """

    def __init__(
        self, stop_at: int | None = None, nan_at: int | None = None, steep_at: int | None = None
    ) -> None:
        torch.manual_seed(1)
        self.network = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        )
        self.stop_at, self.nan_at, self.steep_at = stop_at, nan_at, steep_at
        self.step = 0
        self.batches: list[bytes] = []
        self.saved: list[dict[str, Tensor]] = []

    def batch(self, rng: np.random.Generator, size: int) -> Tensor:
        values = rng.normal(size=(size, 4))
        self.batches.append(values.tobytes())
        return torch.from_numpy(values).float()

    def loss(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.step == self.stop_at:
            raise KeyboardInterrupt
        self.step += 1
        target = batch.sum(1, keepdim=True) + 0.1 * torch.randn(len(batch), 1)
        loss = (network(batch) - target).square().mean()
        if self.step - 1 == self.nan_at:
            loss = loss * torch.nan
        if self.step - 1 == self.steep_at:  # sqrt is 0 at 0 and infinitely steep
            loss = loss + (0 * loss).sqrt()
        return loss, {"size": batch.abs().mean()}

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        assert not network.training
        x = torch.randn(64, 4)
        with torch.no_grad():
            return {"mse": float((network(x) - x.sum(1, keepdim=True)).square().mean())}

    def strip(self, network: nn.Module) -> np.ndarray | None:
        picture = np.zeros((4, 6, 3), np.uint8)
        picture[..., 0] = 255
        return picture

    def save(self, network: nn.Module, path: Path) -> None:
        self.saved.append({k: v.clone() for k, v in network.state_dict().items()})
        save_file(network.state_dict(), path)


def settings(folder: Path, **kwargs: Any) -> TrainConfig:
    values = {
        "folder": str(folder),
        "steps": 30,
        "batch_size": 8,
        "learning_rate": 0.05,
        "warmup_steps": 5,
        "precision": "fp32",
        "validate_every": 10,
        **kwargs,
    }
    return TrainConfig(**values)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "state.pt", weights_only=True)


def assert_same(left: Any, right: Any, where: str = "") -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys()
        for key in left:
            if key != "elapsed":
                assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list):
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert left == right, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(TinyStage(), settings(folder), progress=False)
    return folder


@pytest.mark.parametrize("stop_at", [10, 17, 29])
def test_an_interrupted_run_goes_on_exactly(whole: Path, tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(TinyStage(stop_at), settings(tmp_path), progress=False)
    assert state(tmp_path)["step"] == stop_at // 10 * 10
    torch.manual_seed(77)
    metrics = train(TinyStage(), settings(tmp_path), progress=False)
    assert_same(weights(tmp_path), weights(whole))
    assert_same(state(tmp_path), state(whole))
    assert metrics == state(whole)["metrics"]


def test_checkpoints_by_the_clock_are_exact_too(whole: Path, tmp_path: Path) -> None:
    often = settings(tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(TinyStage(13), often, progress=False)
    assert state(tmp_path)["step"] == 13
    train(TinyStage(), often, progress=False)
    assert_same(state(tmp_path), state(whole))


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    stages = {name: TinyStage() for name in "abc"}
    train(stages["a"], settings(tmp_path / "a", steps=6), progress=False)
    np.random.seed(5)
    train(stages["b"], settings(tmp_path / "b", steps=6), progress=False)
    train(stages["c"], settings(tmp_path / "c", steps=6, seed=1), progress=False)
    assert stages["a"].batches == stages["b"].batches
    assert len({*stages["a"].batches, *stages["c"].batches}) == 12


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, count = torch.save, 0

    def killed(value: Any, path: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            buffer = io.BytesIO()
            save(value, buffer)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            raise KeyboardInterrupt
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(TinyStage(), settings(tmp_path), progress=False)
    assert state(tmp_path)["step"] == 10
    train(TinyStage(), settings(tmp_path), progress=False)
    assert_same(state(tmp_path), state(whole))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"nan_at": 14}, "the loss became nan at step 14"),
        ({"steep_at": 14}, "the gradient became nan at step 14"),
    ],
)
def test_a_loss_or_gradient_that_is_no_number_stops_the_run(
    tmp_path: Path, stage: dict[str, int], message: str
) -> None:
    with pytest.raises(TrainingDiverged, match=message):
        train(TinyStage(**stage), settings(tmp_path), progress=False)
    last = state(tmp_path)
    assert last["step"] == 10
    assert all(v.isfinite().all() for v in last["network"].values())
    assert not (tmp_path / "model.safetensors").exists()


def test_a_finished_run_is_not_trained_again(whole: Path) -> None:
    before, stage = weights(whole), TinyStage()
    metrics = train(stage, settings(whole), progress=False)
    assert stage.batches == [] and metrics == state(whole)["metrics"]
    assert_same(weights(whole), before)


def test_more_steps_later(tmp_path: Path) -> None:
    train(TinyStage(), settings(tmp_path, steps=10), progress=False)
    stage = TinyStage()
    train(stage, settings(tmp_path, steps=25), progress=False)
    assert len(stage.batches) == 15 and state(tmp_path)["step"] == 25


def test_it_learns_and_saves_the_averaged_weights(tmp_path: Path) -> None:
    stage = TinyStage()
    before = stage.validate(stage.network.eval())["mse"]
    metrics = train(stage, settings(tmp_path, steps=150, validate_every=150), progress=False)
    assert metrics["mse"] < 0.3 * before
    last = state(tmp_path)
    averaged = {k.removeprefix("module."): v for k, v in last["averaged"].items()}
    averaged.pop("n_averaged")
    assert_same(weights(tmp_path), averaged)
    assert not torch.equal(averaged["0.weight"], last["network"]["0.weight"])


def test_keep_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, scores = TinyStage(), iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(stage, "validate", lambda network: {"mse": next(scores)})
    kept = settings(tmp_path, steps=40, keep_best="mse")
    train(stage, kept, progress=False)
    assert len(stage.saved) == 2
    assert_same(weights(tmp_path), stage.saved[1])
    assert state(tmp_path)["best"] == 1.0
    assert state(tmp_path)["kept"] == {"step": 20, "metrics": {"mse": 1.0}}
    # The best is remembered over a restart.
    again = TinyStage()
    monkeypatch.setattr(again, "validate", lambda network: {"mse": 1.2})
    train(again, replace(kept, steps=50), progress=False)
    assert again.saved == []
    assert state(tmp_path)["kept"]["step"] == 20


def test_sample_strips_and_logs(whole: Path) -> None:
    names = sorted(p.name for p in (whole / "samples").iterdir())
    assert names == ["0000010.png", "0000020.png", "0000030.png"]
    picture = cv2.imread(str(whole / "samples" / names[0]))
    assert picture[0, 0].tolist() == [0, 0, 255]  # red, in OpenCV's order
    assert list((whole / "tensorboard").iterdir())


def test_schedule(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=100, warmup_steps=10, decay_fraction=0.3)
    rates = np.array([schedule(step, config) for step in range(100)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert (rates[10:70] == 1).all()
    np.testing.assert_allclose(rates[70:], np.arange(30, 0, -1) / 30)
    assert rates.min() > 0


def test_schedule_at_its_limits(tmp_path: Path) -> None:
    plain = settings(tmp_path, steps=10, warmup_steps=0, decay_fraction=0.0)
    assert all(schedule(step, plain) == 1 for step in range(10))
    short = settings(tmp_path, steps=4, warmup_steps=100, decay_fraction=1.0)
    assert all(0 < schedule(step, short) <= 0.04 for step in range(4))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"precision": "fp16"}])
def test_settings_out_of_range(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1|precision"):
        settings(tmp_path, **wrong)
