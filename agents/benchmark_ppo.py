"""Measure the native PPO against Stable-Baselines3's on one world, in one run.

Both train the same network with the same settings, in turn, on environments of the same arguments;
a decision counts when it has been played and learnt from. ``python -m agents.benchmark_ppo``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from agents import train_sb3
from agents.train_sb3 import TrainSB3Config
from nfd_env import config
from nfd_env.devices import resolve_device
from nfd_env.evaluation.benchmark import describe_device
from nfd_env.learning import train
from nfd_env.learning.ppo import Position, gae, ppo_loss, rollout, update
from nfd_env.learning.settings import AgentTrainingConfig
from nfd_env.learning.train import TrainPPOConfig


def as_sb3(settings: TrainPPOConfig) -> TrainSB3Config:
    """The same training for Stable-Baselines3."""
    ppo = settings.ppo
    same = {f.name: getattr(settings, f.name) for f in fields(AgentTrainingConfig)}
    return TrainSB3Config(
        **same,
        reward_scale=ppo.reward_scale,
        ppo={
            "n_steps": ppo.rollout_steps,
            "n_epochs": ppo.epochs,
            "batch_size": ppo.minibatch_size,
            "learning_rate": ppo.learning_rate,
            "gamma": ppo.discount,
            "gae_lambda": ppo.gae_lambda,
            "clip_range": ppo.clip,
            "ent_coef": ppo.entropy,
            "vf_coef": ppo.value_weight,
            "max_grad_norm": ppo.clip_norm,
        },
    )


class NativeRun:
    """Some updates of the native PPO at a time."""

    def __init__(self, settings: TrainPPOConfig) -> None:
        """Make the environments and the network."""
        torch.manual_seed(settings.seed)
        self._settings = settings
        self._env: Any = train.make_env(settings)
        self._policy, self._optimiser = train.make_policy(self._env, settings)
        self._act, self._loss, self._gae = (
            train.compiled(function, settings.compile)
            for function in (self._policy.act, ppo_loss, gae)
        )
        observation, info = self._env.reset(seed=settings.seed)
        self._position = Position.start(observation, settings.frame_stack, info.get("context"))

    def run(self, updates: int) -> None:
        """Roll out and update ``updates`` times."""
        ppo = self._settings.ppo
        for _ in range(updates):
            batch, self._position = rollout(
                self._env,
                self._act,
                self._position,
                ppo.rollout_steps,
                self._policy.look,
                self._policy.playable,
            )
            logs = update(self._policy, self._optimiser, batch, ppo, self._loss, self._gae)
            float(logs["surrogate"])  # waits for the device

    def close(self) -> None:
        """Close the environments."""
        self._env.close()


class SB3Run:
    """Some updates of Stable-Baselines3's PPO at a time."""

    def __init__(self, settings: TrainSB3Config) -> None:
        """Make the environments and the model."""
        self._venv, spec = train_sb3.make_env(settings)
        self._model = train_sb3.make_model(self._venv, spec, settings)
        self._batch = settings.num_envs * self._model.n_steps

    def run(self, updates: int) -> None:
        """Roll out and update ``updates`` times."""
        self._model.learn(updates * self._batch, reset_num_timesteps=False)

    def close(self) -> None:
        """Close the environments."""
        self._venv.close()


def benchmark(
    settings: TrainPPOConfig, updates: int = 2, repeats: int = 3, rgb: bool = True
) -> dict[str, dict[str, float]]:
    """Decisions a second, played and learnt from, of both trainers.

    They take turns, now one and now the other first, so that a change of the machine's speed hits
    both; the first turn of each is a warm-up and not counted.

    Args:
        settings: of both; ``decisions``, ``initial`` and evaluations are ignored.
        updates: updates in a turn.
        repeats: turns.
        rgb: measure both on frames too, which is how Stable-Baselines3 is mostly used.

    Returns:
        For each trainer ``decisions_per_second`` (median), ``lowest`` and ``highest``,
        ``frames_per_second``, and ``ratio``: how many times as fast the native PPO is on the same
        observations, the geometric mean over the turns, with its standard error ``ratio_error``
        (NaN for a single turn).
    """
    made: dict[str, Any] = {}
    for obs_type in dict.fromkeys([settings.obs_type, "rgb"] if rgb else [settings.obs_type]):
        same = replace(settings, obs_type=obs_type, initial="", real=False)
        made[f"native, {obs_type}"] = NativeRun(same)
        made[f"sb3, {obs_type}"] = SB3Run(as_sb3(same))
    rates: dict[str, list[float]] = {name: [] for name in made}
    decisions = updates * settings.num_envs * settings.ppo.rollout_steps
    for turn in range(repeats + 1):
        for name, trainer in list(made.items())[:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            trainer.run(updates)
            if turn:
                rates[name].append(decisions / (time.perf_counter() - begin))
    for trainer in made.values():
        trainer.close()
    ratios = {
        name: np.log(rates[f"native, {name.split(', ')[1]}"]) - np.log(values)
        for name, values in rates.items()
    }
    return {
        name: {
            "decisions_per_second": float(np.median(values)),
            "lowest": min(values),
            "highest": max(values),
            "frames_per_second": float(np.median(values)) * settings.frame_skip,
            "ratio": float(np.exp(ratios[name].mean())),
            "ratio_error": _standard_error(ratios[name]),
        }
        for name, values in rates.items()
    }


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def format_report(report: dict[str, dict[str, float]], settings: TrainPPOConfig) -> str:
    """The figures as a Markdown table."""
    device = describe_device(resolve_device(settings.device))
    lines = [
        f"PPO on {device}, {torch.get_num_threads()} threads: {settings.num_envs} environments, "
        f"frame skip {settings.frame_skip}, rollouts of {settings.ppo.rollout_steps} decisions, "
        f"{settings.ppo.epochs} epochs, minibatches of {settings.ppo.minibatch_size}",
        "",
        "| PPO, observations | decisions/s (lowest to highest) | frames/s | native over it |",
        "|---|---|---|---|",
    ]
    for name, row in report.items():
        ratio = (
            "1" if name.startswith("native") else f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}"
        )
        lines.append(
            f"| {name} | {row['decisions_per_second']:.1f} ({row['lowest']:.1f} to "
            f"{row['highest']:.1f}) | {row['frames_per_second']:.0f} | "
            f"{ratio} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m agents.benchmark_ppo", description=__doc__)
    parser.add_argument("config", help="YAML file of agents.train_ppo")
    parser.add_argument("--updates", type=int, default=1, help="updates in a turn")
    parser.add_argument("--repeats", type=int, default=3, help="counted turns of each")
    parser.add_argument("--no-rgb", action="store_true", help="leave the comparison on frames out")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, over the config file's")
    args = parser.parse_args(arguments)
    if args.updates < 1 or args.repeats < 1:
        parser.error("--updates and --repeats must be at least 1")
    try:
        settings = config.load(TrainPPOConfig, args.config, args.overrides)
        rgb = not args.no_rgb
        report = benchmark(settings, args.updates, args.repeats, rgb)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"benchmark_ppo: {error}", file=sys.stderr)
        return 1
    print(format_report(report, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
