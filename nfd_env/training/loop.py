"""The one training loop: EMA, clipping, validation, logging, exact resume.

A stage brings a network, batches and a loss; everything else is here. Batches and noise depend only
on (seed, step), so a run that is killed and started again computes what it would have computed.
They do not depend either on how many processes work on a batch, or in how many parts: see
``nfd_env.parts``.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nfd_env.config import check_ranges, config_class
from nfd_env.devices import resolve_device
from nfd_env.files import owned_folder, writing
from nfd_env.models.weights import CheckpointError
from nfd_env.parts import WHOLE, Part, working_on
from nfd_env.precision import autocast, choose_precision
from nfd_env.progress import progress_bar
from nfd_env.stopping import StopRequest, stopping
from nfd_env.training.checkpoints import Checkpoints
from nfd_env.training.divergence import LossWatch, TrainingDiverged
from nfd_env.training.optimiser import OPTIMISERS, Optimiser
from nfd_env.training.ranks import ALONE, Ranks
from nfd_env.training.run_log import RunLog, open_log
from nfd_env.training.sharing import (
    local,
    number,
    own_shares,
    shared_loss,
    whole,
    without_exchange,
)

_LOG_EVERY = 20  # steps


@config_class
class TrainConfig:
    """How to train; the same for every stage.

    Attributes:
        folder: the run's folder: state, logs, sample strips and the finished weights.
        steps: total optimiser steps. Raising it later continues the run.
        batch_size: samples a step, those of all processes and parts together.
        accumulate: parts in which each process works its samples off, one after the other; for
            batches that memory does not hold.
        shard_above: where several processes train more parameters than this, each keeps a share of
            weights, averages and the optimiser's state (FSDP2), and not a copy.
        learning_rate: peak rate.
        optimiser: "adamw", or "muon" for the matrices of a transformer's blocks, see ``Optimiser``.
        warmup_steps: linear warm-up.
        decay_fraction: in (0, 1], the last part of ``steps``, over which the rate falls linearly to
            zero.
        weight_decay: on matrices only.
        ema_decay: in [0, 1), of the averaged weights, which are what is validated and saved.
        clip_norm: gradients are clipped to this norm.
        seed: of initialisation, batches and noise.
        precision: "fp32", "bf16" (autocast) or "auto", see ``choose_precision``.
        compile: use torch.compile.
        validate_every: steps between validations and sample strips.
        checkpoint_seconds: time between checkpoints.
        threads: CPU threads; 0 leaves torch's default.
        device: see ``nfd_env.devices.resolve_device``.
        keep_best: save the weights of the validation where this metric was lowest; "" saves the
            last ones.
    """

    folder: str
    steps: int
    batch_size: int
    learning_rate: float
    optimiser: str = "adamw"
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
    accumulate: int = 1
    shard_above: int = 200_000_000

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.precision not in ("fp32", "bf16", "auto"):
            raise ValueError(f"precision must be fp32, bf16 or auto, got {self.precision!r}")
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser must be adamw or muon, got {self.optimiser!r}")
        if not self.folder:
            raise ValueError("train.folder must name a folder")
        check_ranges(
            self,
            steps="[1, inf)",
            batch_size="[1, inf)",
            learning_rate="(0, inf)",
            accumulate="[1, inf)",
            shard_above="[0, inf)",
            warmup_steps="[0, inf)",
            decay_fraction="(0, 1]",
            weight_decay="[0, inf)",
            ema_decay="[0, 1)",
            clip_norm="(0, inf)",
            seed="[0, 2**63)",
            validate_every="[1, inf)",
            checkpoint_seconds="[0, inf]",
            threads="[0, inf)",
        )
        self.check_parts()

    def check_parts(self, ranks: Ranks = ALONE) -> None:
        """Refuse a batch that processes and parts cannot share equally.

        Raises:
            ValueError: saying what would fit.
        """
        parts = ranks.count * self.accumulate
        if self.batch_size % parts:
            fits = -(-self.batch_size // parts) * parts
            raise ValueError(
                f"batch_size must be a multiple of {parts} ({ranks.count} processes, accumulate="
                f"{self.accumulate}), got {self.batch_size}: give {fits}, or start another number "
                "of processes"
            )


class Stage(Protocol):
    """What a training stage tells the loop."""

    @property
    def network(self) -> nn.Module:
        """The network to train."""
        ...

    @property
    def lower_is_better(self) -> Collection[str]:
        """Those of the metrics of ``validate`` that ``keep_best`` may name."""
        ...

    def batch(self, rng: np.random.Generator, size: int, part: Part = WHOLE) -> Any:
        """Draw a training batch, of which ``part`` is read; all randomness comes from ``rng``."""
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


Progress = Callable[[int, int], None]
"""Called as (steps done, steps in all)."""


def train(
    stage: Stage,
    settings: TrainConfig,
    progress: bool = True,
    on_step: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train ``stage`` to ``settings.steps``, going on from the folder's last checkpoint.

    INT, TERM and HUP let the running step end and save first, see ``stopping``.

    Args:
        stage: what to train.
        settings: how.
        progress: show a bar and the metrics.
        on_step: called at the beginning and after every step.
        ranks: the processes that call this together; only the first one validates and writes.

    Returns:
        The last validation metrics; nothing where this is not the first process.

    Raises:
        TrainingDiverged: when the loss or its gradient becomes NaN or infinite, or the loss
            explodes; the folder is then back at an earlier, sound state.
        FolderInUseError: when another process trains in the folder.
        CheckpointError: when the folder's state is damaged or of another network.
        FolderError: when the folder cannot be written to.
        ValueError: when ``keep_best`` names no metric of the stage.
        DeviceError: when the device is not there.
        PrecisionError: when it cannot compute in the precision.
        RanksError: when another process is lost.
    """
    settings.check_parts(ranks)
    names = stage.lower_is_better
    if settings.keep_best and settings.keep_best not in names:
        allowed = ", ".join(sorted(names)) or "'', as this stage has no metric of its kind"
        raise ValueError(f"keep_best must be one of {allowed}; got {settings.keep_best!r}")
    device = resolve_device(settings.device)
    precision = choose_precision(settings.precision, device)
    folder = Path(settings.folder).expanduser()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with (
        owned_folder(folder) if ranks.first else nullcontext(),
        stopping() as stop,
        ranks.losing_none(stop),
    ):
        run = _Run(stage, settings, device, folder, ranks)
        with (
            open_log(folder, run.step) if ranks.first else nullcontext() as log,
            progress_bar(
                None, folder.name, progress, total=settings.steps, initial=run.step
            ) as bar,
        ):
            run.to_the_end(precision, stop, log, bar, on_step or (lambda step, total: None))
        if settings.keep_best and ranks.first and math.isinf(run.best):
            raise ValueError(
                f"keep_best={settings.keep_best!r} was never a finite number, so that no weights "
                "were kept: set it to '' or to another metric, and run again"
            )
        if not settings.keep_best:
            averaged = run.whole_average()
            if averaged is not None:
                with writing(folder):
                    stage.save(averaged, folder / "model.safetensors")
    return run.metrics


class _Run:
    """A training between two checkpoints: everything that changes from step to step."""

    def __init__(
        self,
        stage: Stage,
        settings: TrainConfig,
        device: torch.device,
        folder: Path,
        ranks: Ranks,
    ) -> None:
        """Begin, or go on from what ``folder`` holds."""
        self.stage, self.settings, self.device, self.folder = stage, settings, device, folder
        self.ranks = ranks
        torch.manual_seed(settings.seed)
        self.network = stage.network.to(device)
        self.averaged = AveragedModel(self.network, multi_avg_fn=_ema(settings.ema_decay))
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        self.sharded = ranks.count > 1 and trained > settings.shard_above
        # What the first process puts the shares of the average together in.
        self._whole = copy.deepcopy(self.network) if self.sharded and ranks.first else None
        loss = torch.compile(stage.loss, dynamic=False) if settings.compile else stage.loss
        self.loss = shared_loss(self.network, loss, ranks, self.averaged if self.sharded else None)
        self.optimiser = Optimiser(self.network, settings.optimiser, settings.weight_decay)
        self.watch = LossWatch()
        self.checkpoints = Checkpoints(folder)
        self.step, self.elapsed = 0, 0.0
        self.validated = 0  # the step of the last validation
        self.best, self.kept = math.inf, dict[str, Any]()
        self.metrics: dict[str, float] = {}
        self._load()
        self._started = self._saved = time.monotonic()

    def _load(self) -> None:
        # All of it would perhaps not fit beside the share that a process has.
        where = torch.device("cpu") if self.sharded else self.device
        state = self.checkpoints.read(where)
        if state is None:
            return
        try:
            for module, name in ((self.network, "network"), (self.averaged, "averaged")):
                module.load_state_dict(own_shares(state[name], module.state_dict()))
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.elapsed, self.metrics = (
                state["step"],
                state["elapsed"],
                state["metrics"],
            )
            self.best, self.kept = state["best"], state.get("kept", {})
            self.validated = state.get("validated", self.step)
            if "watch" in state:
                self.watch.load_state_dict(state["watch"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.checkpoints.path}: is not a state of this training "
                f"({str(error).splitlines()[0]}): name another train.folder, or set the sizes back "
                "to those that it began with"
            ) from None

    def _checkpoint(self) -> None:
        now = time.monotonic()
        self.elapsed += now - self._started
        self._started = self._saved = now
        if not (self.ranks.first or self.sharded):
            return
        parts = {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        if self.sharded:
            parts = whole(parts, self.ranks.first)
        if not self.ranks.first:
            return
        self.checkpoints.write(
            {
                **parts,
                "step": self.step,
                "elapsed": self.elapsed,
                "metrics": self.metrics,
                "validated": self.validated,
                "best": self.best,
                "kept": self.kept,
                "watch": self.watch.state_dict(),
            }
        )

    def to_the_end(
        self, precision: str, stop: StopRequest, log: RunLog | None, bar: Any, on_step: Progress
    ) -> None:
        """Train, validate and store until all steps are done; see ``train``."""
        s = self.settings
        on_step(self.step, s.steps)
        while True:
            due = self.step > 0 and (self.step % s.validate_every == 0 or self.step >= s.steps)
            late = time.monotonic() - self._saved > s.checkpoint_seconds
            # Everybody stops, or helps to store, at the same step.
            asked, late = self.ranks.largest(stop.signal, late and self.ranks.first)
            stop.take(asked)
            if due and self.validated < self.step:
                # Validation is long, and a stop in it is to cost nothing but itself.
                self._checkpoint()
                with stop.at_once():
                    self._validate(log)
                if self.ranks.first:
                    bar.write(f"step {self.step}: {_short(self.metrics)}")
                self._checkpoint()
            elif asked or late:
                self._checkpoint()
            if asked:
                stop.obey()
            if self.step >= s.steps:
                return
            try:
                loss, logs = self._train_step(precision)
            except TrainingDiverged as error:
                if not self.ranks.first:
                    raise
                raise TrainingDiverged(self._go_back(str(error))) from None
            if self.step % _LOG_EVERY == 0:
                means = self.ranks.mean([float(value) for value in logs.values()])
                if log is not None:
                    values = dict(zip(logs, means, strict=True))
                    log.scalars("train", {"loss": loss, **values}, self.step)
                bar.set_postfix({"loss": f"{loss:.4f}", **_short(self.metrics)}, refresh=False)
            bar.update(1)
            on_step(self.step, s.steps)

    def _train_step(self, precision: str) -> tuple[float, dict[str, Any]]:
        """One step of the optimiser; returns the loss and what to log."""
        s, step, network = self.settings, self.step, self.network
        rate = s.learning_rate * schedule(step, s)
        seed = int(np.random.SeedSequence([s.seed, step]).generate_state(1)[0])
        network.train()
        self.optimiser.zero_grad()
        total, logs = 0.0, {}
        for turn in range(s.accumulate):
            processes = self.ranks.count
            part = Part(turn * processes + self.ranks.rank, s.accumulate * processes, processes)
            torch.manual_seed(seed)  # each part takes its rows of what is drawn for all
            batch = self.stage.batch(np.random.default_rng(seed), s.batch_size, part)
            alone = nullcontext() if part.ends_step else without_exchange(self.loss)
            with working_on(part), alone:
                with autocast(self.device, precision):
                    loss, logs = self.loss(batch)
                total = total + loss.detach() / s.accumulate
                (loss / s.accumulate).backward()
        (value,) = self.ranks.mean([float(total)])
        self.watch.see(value, sorted(logs))
        norm = number(nn.utils.clip_grad_norm_(network.parameters(), s.clip_norm))
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient became {norm}")
        self.optimiser.step(rate)
        self.averaged.update_parameters(network)
        self.step += 1
        return value, {**logs, "gradient_norm": norm, "learning_rate": rate}

    def whole_average(self) -> nn.Module | None:
        """The averaged network for the first process, None for the others; all must ask."""
        if self.sharded:
            state = whole(self.averaged.module.state_dict(), self.ranks.first)
            if self._whole is not None:
                self._whole.load_state_dict(state)
            return self._whole
        return self.averaged.module if self.ranks.first else None

    def _validate(self, log: RunLog | None) -> None:
        """Validate the averaged weights, show them, and keep them where they are the best."""
        s, network = self.settings, self.whole_average()
        self.validated = self.step
        if network is None or log is None:
            return
        network.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            metrics = {n: float(v) for n, v in self.stage.validate(network).items()}
            picture = self.stage.strip(network)
        log.scalars("validation", metrics, self.step)
        if picture is not None:
            log.picture(np.ascontiguousarray(picture), self.step)
        if s.keep_best and s.keep_best not in metrics:
            raise ValueError(
                f"keep_best={s.keep_best!r} could not be measured on these held-out episodes: set "
                f"it to '' or to one of {', '.join(sorted(metrics))}"
            )
        if s.keep_best and metrics[s.keep_best] < self.best:
            with writing(self.folder):
                self.stage.save(network, self.folder / "model.safetensors")
            self.best = metrics[s.keep_best]
            self.kept = {"step": self.step, "metrics": metrics}
        self.metrics = metrics

    def _go_back(self, reason: str) -> str:
        """Go back to a sound state; says what happened and what to do."""
        s, step = self.settings, self.step
        back = self.checkpoints.go_back(step, self.device, best=self.best, kept=self.kept)
        where = "it begins again" if back is None else f"it goes on from step {back}"
        return (
            f"{reason} at step {step} of {self.folder}: lower learning_rate (now "
            f"{s.learning_rate:g}) or clip_norm (now {s.clip_norm:g}) and run again ({where}, from "
            "before the loss went wrong)"
        )


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
        torch._foreach_lerp_([local(a) for a in averages], [local(v) for v in values], weight)

    return update


def _short(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in metrics.items()}
