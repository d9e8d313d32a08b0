"""How long a stage's steps and validations take on this machine, before they are planned."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from nfd_env.precision import autocast, choose_precision
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.plan import Plan
from nfd_env.recipe.steps import share_of, with_smaller_batch, with_steps
from nfd_env.training.loop import Stage
from nfd_env.training.optimiser import Optimiser

_TRIED = 2  # samples of a batch by which a stage's speed is known roughly


def timed(
    plan: Plan, game: GameConfig, name: str, stage: Stage, left: float, processes: int = 1
) -> Plan:
    """``plan`` with the batch and the steps of a stage, by its speed.

    Args:
        plan: so far.
        game: the game file.
        name: of the stage.
        stage: ready to train.
        left: seconds that are left for it and the later ones.
        processes: that share a batch; this one is timed with its own part.
    """
    begin = time.monotonic()
    train = getattr(plan, name)["train"]
    validation = validation_seconds(stage, str(train["device"]))
    # A whole batch may take longer than such a budget has; time falls less than the batch does.
    turns = int(train.get("accumulate", 1))
    part = train["batch_size"] // (processes * turns)
    tried = {**train, "batch_size": min(_TRIED, part)}
    most = turns * seconds_per_step(stage, tried) * part / tried["batch_size"]
    seconds = max(1.0, left - (time.monotonic() - begin)) * share_of(name)
    parts = processes * turns
    plan = with_smaller_batch(plan, game, name, seconds - validation, most, parts)
    train = getattr(plan, name)["train"]
    part = train["batch_size"] // parts
    per_step = turns * seconds_per_step(stage, {**train, "batch_size": part})
    return with_steps(plan, game, name, seconds, per_step, validation)


def judge(stage: Stage, device: str, network: nn.Module | None = None) -> dict[str, float]:
    """The held-out metrics of ``network``, or of that of ``stage``; both stay as they are."""
    network = copy.deepcopy(network or stage.network).to(device).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return {name: float(value) for name, value in stage.validate(network).items()}


def validation_seconds(stage: Stage, device: str) -> float:
    """Time of a validation with its strip; ``stage`` stays as it is."""
    network = copy.deepcopy(stage.network).to(device).eval()
    begin = time.perf_counter()
    with torch.random.fork_rng(), torch.no_grad():
        stage.validate(network)
        stage.strip(network)
    return time.perf_counter() - begin


def seconds_per_step(stage: Stage, train: Mapping[str, Any], steps: int = 3) -> float:
    """Median time of a training step, measured on real batches; ``stage`` stays as it is."""
    device = torch.device(str(train["device"]))
    network = copy.deepcopy(stage.network).to(device).train()
    optimiser = Optimiser(network, str(train.get("optimiser", "adamw")), 0.0)
    precision = choose_precision(str(train.get("precision", "auto")), device)
    rng = np.random.default_rng(0)
    times = []
    for _ in range(2 + steps):  # the first ones also pay for memory and kernels
        begin = time.perf_counter()
        batch = stage.batch(rng, int(train["batch_size"]))
        with autocast(device, precision):
            loss, _ = stage.loss(network, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step(1e-6)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:]))
