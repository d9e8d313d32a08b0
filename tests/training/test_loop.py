from __future__ import annotations

import errno
import io
import math
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nfd_env.devices import DeviceError
from nfd_env.files import FolderError, FolderInUseError
from nfd_env.models.weights import CheckpointError
from nfd_env.parts import WHOLE, Part
from nfd_env.training.checkpoints import Checkpoints
from nfd_env.training.divergence import TrainingDiverged
from nfd_env.training.loop import TrainConfig, schedule, train

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

    lower_is_better = ("mse",)

    def batch(self, rng: np.random.Generator, size: int, part: Part = WHOLE) -> Tensor:
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


def settings(path: Path, **kwargs: Any) -> TrainConfig:
    values = {
        "folder": str(path),
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


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"other": 1.0}, "keep_best='mse' could not be measured.*one of other"),
        ({"mse": float("nan")}, "keep_best='mse' was never a finite number"),
    ],
)
def test_a_best_that_cannot_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: dict[str, float], message: str
) -> None:
    stage = TinyStage()
    monkeypatch.setattr(stage, "validate", lambda network: measured)
    with pytest.raises(ValueError, match=message):
        train(stage, settings(tmp_path, steps=20, keep_best="mse"), progress=False)


def test_a_kept_state_is_not_written_twice(tmp_path: Path) -> None:
    train(TinyStage(), settings(tmp_path, steps=20, checkpoint_seconds=0), progress=False)
    (kept, *_) = sorted(tmp_path.glob("candidate-*.pt"))
    checkpoints = Checkpoints(tmp_path)
    state = checkpoints.read(torch.device("cpu"))
    assert state is not None
    kept.unlink()
    checkpoints.write({**state, "step": state["step"] + 1})
    (kept,) = sorted(tmp_path.glob("candidate-*.pt"))
    assert kept.samefile(tmp_path / "state.pt")
    before = kept.read_bytes()
    checkpoints.write({**state, "step": state["step"] + 2})
    assert kept.read_bytes() == before and not kept.samefile(tmp_path / "state.pt")


def test_sample_strips_and_logs(whole: Path) -> None:
    names = sorted(p.name for p in (whole / "samples").iterdir())
    assert names == ["0000010.png", "0000020.png", "0000030.png"]
    assert Image.open(whole / "samples" / names[0]).getpixel((0, 0)) == (255, 0, 0)
    assert list((whole / "tensorboard").iterdir())


def test_schedule(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=100, warmup_steps=10, decay_fraction=0.3)
    rates = np.array([schedule(step, config) for step in range(100)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert (rates[10:70] == 1).all()
    np.testing.assert_allclose(rates[70:], np.arange(30, 0, -1) / 30)
    assert rates.min() > 0


def test_schedule_at_its_limits(tmp_path: Path) -> None:
    plain = settings(tmp_path, steps=10, warmup_steps=0, decay_fraction=1e-9)
    assert all(schedule(step, plain) == 1 for step in range(10))
    short = settings(tmp_path, steps=4, warmup_steps=100, decay_fraction=1.0)
    assert all(0 < schedule(step, short) <= 0.04 for step in range(4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "^steps must be at least 1"),
        ({"batch_size": 0}, "^batch_size must be at least 1"),
        ({"precision": "fp16"}, "precision must be"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0 and finite"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"decay_fraction": 0.0}, "decay_fraction must be above 0 and at most 1, got 0.0"),
        ({"decay_fraction": 1.1}, "decay_fraction must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"ema_decay": 2.0}, "ema_decay must be at least 0 and below 1, got 2.0"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed must be at least 0 and below"),
        ({"validate_every": 0}, "validate_every must be at least 1"),
        ({"checkpoint_seconds": math.nan}, "checkpoint_seconds must be"),
        ({"threads": -1}, "threads must be"),
        ({"folder": ""}, "train.folder must name"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"keep_best": "bogus"}, ValueError, "keep_best must be one of mse; got 'bogus'"),
        ({"device": "gpu"}, DeviceError, "unknown device 'gpu'; use auto, cpu, cuda"),
        ({"device": "cuda"}, DeviceError, "torch sees no CUDA GPU here"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stage = TinyStage()
    with pytest.raises(error, match=message):
        train(stage, settings(tmp_path / "run", **wrong), progress=False)
    assert stage.batches == [] and not (tmp_path / "run").exists()


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train(TinyStage(), settings(tmp_path, steps=3), False, lambda *done: seen.append(done))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    train(TinyStage(), settings(tmp_path, steps=4), False, lambda *done: seen.append(done))
    assert seen[4:] == [(3, 4), (4, 4)]


def test_a_folder_has_one_trainer_at_a_time(tmp_path: Path) -> None:
    class Greedy(TinyStage):
        def batch(self, rng: np.random.Generator, size: int, part: Part = WHOLE) -> Tensor:
            if not self.batches:
                with pytest.raises(FolderInUseError, match=f"is being written by .*{os.getpid()}"):
                    train(TinyStage(), settings(tmp_path), progress=False)
            return super().batch(rng, size, part)

    train(Greedy(), settings(tmp_path), progress=False)
    assert state(tmp_path)["step"] == 30


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "text", "list", "other sizes"])
def test_a_state_that_cannot_be_used_is_named(whole: Path, tmp_path: Path, damage: str) -> None:
    path, stage = tmp_path / "state.pt", TinyStage()
    content = (whole / "state.pt").read_bytes()
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"hello\n"}.get(
        damage, content))  # fmt: skip
    if damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "other sizes":
        stage.network = nn.Sequential(nn.Linear(4, 1))
    before = path.read_bytes()
    with pytest.raises(
        CheckpointError, match=r"state.pt: .*(to begin again|another (train.)?folder)"
    ) as e:
        train(stage, settings(tmp_path), progress=False)
    assert "\n" not in str(e.value)
    assert path.read_bytes() == before


class Signalled(TinyStage):
    """Sends its process a signal, in a step or in the validation after it."""

    def __init__(self, number: int, at: int, validating: bool = False) -> None:
        super().__init__()
        self.number, self.at, self.validating = number, at, validating

    def loss(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        if len(self.batches) == self.at and not self.validating:
            signal.raise_signal(self.number)
        return super().loss(network, batch)

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        if len(self.batches) == self.at and self.validating:
            signal.raise_signal(self.number)
            raise AssertionError("validation went on")
        return super().validate(network)


@pytest.mark.parametrize("validating", [False, True])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, None), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_loses_nothing(
    whole: Path, tmp_path: Path, number: int, status: int | None, validating: bool
) -> None:
    at = 20 if validating else 14
    started_with = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(KeyboardInterrupt if status is None else SystemExit) as stopped:
        train(Signalled(number, at, validating), settings(tmp_path), progress=False)
    assert status is None or stopped.value.code == status  # type: ignore[attr-defined]
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    signal.signal(signal.SIGHUP, started_with)
    assert state(tmp_path)["step"] == at
    stage = TinyStage()
    train(stage, settings(tmp_path), progress=False)
    assert len(stage.batches) == 30 - at
    assert_same(state(tmp_path), state(whole))
    assert_same(weights(tmp_path), weights(whole))


def test_signals_that_were_ignored(tmp_path: Path) -> None:
    """A shell ignores INT for what it runs in the background; nohup means what it does to HUP."""
    before = [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP)]
    try:
        train(Signalled(signal.SIGHUP, 5), settings(tmp_path, steps=8), progress=False)
        with pytest.raises(KeyboardInterrupt):
            train(Signalled(signal.SIGINT, 3), settings(tmp_path, steps=15), progress=False)
        assert state(tmp_path)["step"] == 11
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)


def test_in_another_thread_there_are_no_signals(tmp_path: Path) -> None:
    thread = threading.Thread(
        target=train, args=(TinyStage(), settings(tmp_path, steps=5)), kwargs={"progress": False}
    )
    thread.start()
    thread.join()
    assert state(tmp_path)["step"] == 5


class Exploding(TinyStage):
    """From ``at`` on the loss grows, but stays a number."""

    def __init__(self, at: int, factor: float = 1000.0) -> None:
        super().__init__()
        self.at, self.factor = at, factor

    def loss(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss, logs = super().loss(network, batch)
        return (loss * self.factor if self.step > self.at else loss), logs


@pytest.mark.parametrize("kind", ["explodes", "nan", "steep"])
def test_after_a_divergence_the_folder_is_back_at_a_sound_state(tmp_path: Path, kind: str) -> None:
    stage = {
        "explodes": lambda: Exploding(65),
        "nan": lambda: TinyStage(nan_at=75),
        "steep": lambda: TinyStage(steep_at=75),
    }[kind]()
    plan = settings(tmp_path, steps=100, learning_rate=0.01)
    with pytest.raises(TrainingDiverged, match="lower learning_rate .now 0.01.*run again") as error:
        train(stage, plan, progress=False)
    assert {"explodes": "exploded: its median", "nan": "loss became nan", "steep": "gradient"}[
        kind
    ] in str(error.value)
    last = state(tmp_path)
    # By the time that it is noticed, the newest states are from after it.
    assert 30 <= last["step"] <= 65
    assert f"goes on from step {last['step']}," in str(error.value)
    assert all(v.isfinite().all() for v in last["network"].values())
    assert not (tmp_path / "model.safetensors").exists()
    # The same again: it is back at the same state, and with a lower rate it comes through.
    with pytest.raises(TrainingDiverged):
        train(TinyStage(nan_at=3), plan, progress=False)
    assert state(tmp_path)["step"] == last["step"]
    train(TinyStage(), replace(plan, learning_rate=1e-3), progress=False)
    assert state(tmp_path)["step"] == 100
    assert len(list(tmp_path.glob("*.pt"))) == 3


def test_a_divergence_at_the_beginning_begins_again(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="nan at step 14 .*it begins again"):
        train(TinyStage(nan_at=14), settings(tmp_path), progress=False)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("failing", ["state", "log", "samples", "weights"])
def test_a_full_disk_costs_one_line(
    whole: Path, tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """A file larger than the limit fails as on a full disk."""

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = TinyStage(stop_at=10)
    with pytest.raises(KeyboardInterrupt):
        train(stage, settings(tmp_path), progress=False)
    stored = state(tmp_path)
    with monkeypatch.context() as patch:
        stage = TinyStage()
        if failing == "state":
            patch.setattr(torch, "save", full)
        elif failing == "log":
            from tensorboard.summary.writer.record_writer import RecordWriter

            patch.setattr(RecordWriter, "write", full)
        elif failing == "samples":
            patch.setattr(Image.Image, "save", full)
        else:
            patch.setattr(stage, "save", full)
        with pytest.raises(FolderError, match="cannot be written to .No space left.*make room"):
            train(stage, settings(tmp_path), progress=False)
    assert "Traceback" not in capfd.readouterr().err
    if failing == "state":
        assert_same(state(tmp_path), stored)
    train(TinyStage(), settings(tmp_path), progress=False)
    assert_same(state(tmp_path), state(whole))
    assert not list(tmp_path.glob("*.tmp*"))


def test_torch_says_it_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nx")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FolderError, match="unexpected pos 64 vs 0.: make room"):
        train(TinyStage(), settings(tmp_path), progress=False)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(FolderError, match="run cannot be made: File exists"):
        train(TinyStage(), settings(tmp_path / "run"), progress=False)
