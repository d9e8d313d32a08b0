"""The one training loop: EMA, clipping, validation, logging, exact resume.

A stage brings a network, batches and a loss; everything else is here. Batches and noise depend only
on (seed, step), so a run that is killed and started again computes what it would have computed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from nfd_env.precision import autocast, choose_precision
from nfd_env.video import write_png


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the same for every stage.

    Attributes:
        folder: the run's folder: state, logs, sample strips and the finished weights.
        steps: total optimiser steps. Raising it later continues the run.
        batch_size: samples a step.
        learning_rate: peak rate of AdamW.
        warmup_steps: linear warm-up.
        decay_fraction: the last part of ``steps``, over which the rate falls linearly to zero.
        weight_decay: of AdamW, on matrices only.
        ema_decay: of the averaged weights, which are what is validated and saved.
        clip_norm: gradients are clipped to this norm.
        seed: of initialisation, batches and noise.
        precision: "fp32", "bf16" (autocast) or "auto": whichever multiplies matrices faster here.
        compile: use torch.compile.
        validate_every: steps between validations and sample strips.
        checkpoint_seconds: time between checkpoints.
        threads: CPU threads; 0 leaves torch's default.
        device: "cpu" or "cuda".
        keep_best: save the weights of the validation where this metric was lowest; "" saves the
            last ones.
    """

    folder: str
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 200
    decay_fraction: float = 0.3
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    seed: int = 0
    precision: str = "auto"
    compile: bool = False
    validate_every: int = 500
    checkpoint_seconds: float = 120.0
    threads: int = 0
    device: str = "cpu"
    keep_best: str = ""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.precision not in ("fp32", "bf16", "auto"):
            raise ValueError(f"precision must be fp32, bf16 or auto, got {self.precision!r}")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError("steps and batch_size must be at least 1")


class Stage(Protocol):
    """What a training stage tells the loop."""

    @property
    def network(self) -> nn.Module:
        """The network to train."""
        ...

    def batch(self, rng: np.random.Generator, size: int) -> Any:
        """Draw a training batch; all randomness comes from ``rng``."""
        ...

    def loss(self, network: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The scalar loss of ``network`` on ``batch``, and tensors to log."""
        ...

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """Metrics on held-out episodes."""
        ...

    def strip(self, network: nn.Module) -> np.ndarray | None:
        """A picture of what the network does, uint8 RGB (H, W, 3): real above generated."""
        ...

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the finished weights."""
        ...


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no longer a number."""


def train(stage: Stage, settings: TrainConfig, progress: bool = True) -> dict[str, float]:
    """Train ``stage`` to ``settings.steps``, going on from the folder's last checkpoint.

    Returns:
        The last validation metrics.

    Raises:
        TrainingDiverged: when the loss or its gradient becomes NaN or infinite; the weights of the
            last step stay whole.
    """
    from torch.utils.tensorboard import SummaryWriter

    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    folder = Path(settings.folder)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    network = stage.network.to(device)
    averaged = AveragedModel(network, multi_avg_fn=_ema(settings.ema_decay))
    optimiser = torch.optim.AdamW(
        _parameter_groups(network, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
    )
    state_path = folder / "state.pt"
    step = 0
    elapsed, best = 0.0, math.inf
    metrics: dict[str, float] = {}
    kept: dict[str, Any] = {}
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        averaged.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        step, elapsed, metrics = state["step"], state["elapsed"], state["metrics"]
        best, kept = state["best"], state.get("kept", {})
    loss_of = torch.compile(stage.loss, dynamic=False) if settings.compile else stage.loss
    precision = choose_precision(settings.precision, device)
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
    bar = tqdm(
        total=settings.steps, initial=step, disable=not progress, desc=folder.name, mininterval=2
    )
    started = saved = time.monotonic()

    def checkpoint() -> None:
        nonlocal elapsed, started, saved
        now = time.monotonic()
        elapsed, started, saved = elapsed + now - started, now, now
        temporary = state_path.with_suffix(".tmp")
        torch.save(
            {
                "network": network.state_dict(),
                "averaged": averaged.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "elapsed": elapsed,
                "metrics": metrics,
                "best": best,
                "kept": kept,
            },
            temporary,
        )
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, state_path)

    try:
        while step < settings.steps:
            rate = settings.learning_rate * schedule(step, settings)
            for group in optimiser.param_groups:
                group["lr"] = rate
            seed = int(np.random.SeedSequence([settings.seed, step]).generate_state(1)[0])
            torch.manual_seed(seed)
            batch = stage.batch(np.random.default_rng(seed), settings.batch_size)
            network.train()
            with autocast(device, precision):
                loss, logs = loss_of(network, batch)
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"the loss became {value} at step {step}; lower learning_rate and run again "
                    f"(it goes on from {state_path})"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            if not math.isfinite(norm.item()):
                raise TrainingDiverged(
                    f"the gradient became {norm.item()} at step {step}; lower learning_rate and "
                    f"run again (it goes on from {state_path})"
                )
            optimiser.step()
            averaged.update_parameters(network)
            step += 1
            if step % 20 == 0:
                writer.add_scalar("train/loss", value, step)
                writer.add_scalar("train/gradient_norm", norm.item(), step)
                writer.add_scalar("train/learning_rate", rate, step)
                for name, tensor in logs.items():
                    writer.add_scalar(f"train/{name}", float(tensor), step)
                bar.set_postfix({"loss": f"{value:.4f}", **_short(metrics)}, refresh=False)
            bar.update(1)
            if step % settings.validate_every == 0 or step == settings.steps:
                metrics = evaluate(stage, averaged.module, writer, step, folder)
                if settings.keep_best and metrics[settings.keep_best] < best:
                    best = metrics[settings.keep_best]
                    kept = {"step": step, "metrics": metrics}
                    stage.save(averaged.module, folder / "model.safetensors")
                bar.write(f"step {step}: {_short(metrics)}")
                checkpoint()
            elif time.monotonic() - saved > settings.checkpoint_seconds:
                checkpoint()
    finally:
        bar.close()
        writer.close()
    if not settings.keep_best:
        stage.save(averaged.module, folder / "model.safetensors")
    return metrics


def evaluate(
    stage: Stage, network: nn.Module, writer: Any, step: int, folder: Path
) -> dict[str, float]:
    """Validate the averaged weights and write a sample strip, without touching the RNG."""
    network.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        metrics = {name: float(value) for name, value in stage.validate(network).items()}
        picture = stage.strip(network)
    for name, value in metrics.items():
        writer.add_scalar(f"validation/{name}", value, step)
    if picture is not None:
        writer.add_image("samples", picture, step, dataformats="HWC")
        write_png(folder / "samples" / f"{step:07d}.png", picture)
    return metrics


def schedule(step: int, settings: TrainConfig) -> float:
    """Warm-up, constant, then linear decay: the factor on the peak learning rate."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    left = (settings.steps - step) / max(1.0, settings.decay_fraction * settings.steps)
    return min(warm, left, 1.0)


def _ema(decay: float) -> Any:
    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor) -> None:
        n = float(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(averages), list(values), weight)

    return update


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _short(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in metrics.items()}
