"""``nfd bench --compare``: what the ring, few steps and speculation are worth, in one run.

The measurements take turns, a short slice each, so that whatever else the machine is doing hits all
of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.benchmark import acceptance_rate, describe_device
from nfd_env.evaluation.plain import PlainModel
from nfd_env.evaluation.refilled import RefilledModel
from nfd_env.evaluation.streams import HELD, ActionStream
from nfd_env.evaluation.tables import table
from nfd_env.inference.world_model import WorldModel
from nfd_env.worlds.load import World

BASELINE_STEPS = 18  # of DPM-Solver++, arXiv 2506.01380
STEPS = (18, 8, 4, 2, 1)
FEW = 4  # most steps that a student is measured with, and speculation is measured at
CACHES = {
    "plain fp32": "plain PyTorch fp32, refilled",
    "plain bf16": "plain PyTorch bf16, refilled",
    "refilled": "refilled",
    "ring": "ring",
}
_BASELINES = (
    "Plain PyTorch, refilled: the same weights in the transformer as code of the paper's lineage "
    "has it, run eagerly: adaLN's 6d^2 linear for every token of every block (full matrices, as "
    "they were trained), torch's own nn.Linear and nn.RMSNorm, scaled_dot_product_attention over "
    "the concatenated keys and values; for every frame one pass over the window's finished frames, "
    "which fills the cache, and then one pass a step. The faster of its two number formats is what "
    '"over plain refilled" relates to. Refilled: the same passes through this package\'s '
    "transformer (adaLN once a frame, at the world's own rank, norms folded into it, linear layers "
    "packed). Ring: keys and values are kept, and the pass that adds those of a frame is also the "
    "first step of the next one. On a GPU only steps with a ring are replayed as CUDA graphs."
)


class Runner:
    """An env driven by a stream of actions, and the seconds that each of its steps took."""

    def __init__(self, env: NFDVectorEnv, stream: str, agent: str | None = None) -> None:
        """Reset the env; what it does until its window is full is not counted."""
        self.env, self._stream = env, ActionStream(stream, env, agent)
        self._observation, self._info = env.reset(seed=0)
        self._ended: np.ndarray | None = None
        self.times: list[float] = []
        for _ in range(env.model.dynamics.config.window + 2):
            self.step()
        self._before, self.times = self._counts(), []

    def step(self) -> float:
        """One env step; returns its seconds, without those that the stream took."""
        actions = self._stream.next(self._observation, self._ended)
        begin = time.perf_counter()
        self._observation, _, terminated, truncated, self._info = self.env.step(actions)
        took = time.perf_counter() - begin
        self._ended = terminated | truncated
        self.times.append(took)
        return took

    def figures(self) -> dict[str, Any]:
        """Frames/s of all environments together, latency, and what became of the drafts."""
        frames = self.env.num_envs * self.env.frame_skip * len(self.times)
        figures: dict[str, Any] = {
            "frames_per_second": frames / sum(self.times),
            **{f"p{p}_ms": float(np.percentile(self.times, p) * 1e3) for p in (50, 95)},
        }
        if self.env.speculative_frames > 1:
            drafted, accepted, dropped = (self._counts() - self._before).tolist()
            figures["drafted"] = drafted
            figures["acceptance"] = acceptance_rate(accepted, dropped)
            figures["frames_without_a_pass"] = accepted / frames
        return figures

    def _counts(self) -> np.ndarray:
        counts = self._info.get("speculation")
        if counts is None:
            return np.zeros(3, np.int64)
        return np.array([counts[k].sum() for k in ("drafted", "accepted", "dropped")])


def take_turns(steps: Sequence[Callable[[], float]], seconds: float, rounds: int = 10) -> None:
    """Call each function for ``seconds`` in all, in ``rounds`` slices that take turns.

    Args:
        steps: functions that return the seconds that they took; each is called at least once a
            round.
        seconds: for each function.
        rounds: slices of each; every round begins with another function.
    """
    for turn in range(rounds):
        first = turn % len(steps)
        for step in (*steps[first:], *steps[:first]):
            left = seconds / rounds
            while left > 0:
                left -= step()


def compare(
    world: World,
    steps: Sequence[int] = STEPS,
    speculative_frames: Sequence[int] = (2, 4),
    num_envs: int = 1,
    seconds: float = 5.0,
    obs_type: str = "rgb",
    agent: str | None = None,
) -> dict[str, Any]:
    """Frames/s with a refilled cache, with the ring, with fewer steps, and with speculation.

    The refilled cache is measured twice: under this package's transformer and under a plain one,
    see ``nfd_env.evaluation.refilled`` and ``nfd_env.evaluation.plain``.

    Args:
        world: a loaded world; where it has a student and a teacher, up to 4 steps are the
            student's (consistency sampler), more the teacher's (DPM-Solver++). Speculation is
            measured at up to 4 steps.
        steps: denoising steps to measure.
        speculative_frames: numbers n of frames to draw jointly.
        num_envs: environments stepped together.
        seconds: time spent on each figure.
        obs_type: "rgb", or "latent" to leave decoding out.
        agent: of the stream "agent", see ``ActionStream``.

    Returns:
        Nested plain values, see ``format_comparison``.
    """
    kept = world.model.dynamics.config.window - 1
    rows = [_row(world, BASELINE_STEPS, cache) for cache in CACHES if cache != "ring"]
    rows += [_row(world, count) for count in steps]
    rows += [
        _row(world, count, frames=n, stream=stream)
        for count in steps
        if count <= FEW
        for n in speculative_frames
        if n <= kept
        for stream in HELD
    ]
    runners = []
    for row in rows:
        env = _env(
            world,
            num_envs,
            obs_type,
            dynamics=row["dynamics"],
            sampling_steps=row["steps"],
            speculative_frames=row["speculative_frames"],
        )
        row["sampler"] = env.sampling.sampler
        env.model = _with_cache(env.model, row["cache"])
        runners.append(Runner(env, row["stream"] or "held keys", agent))
    take_turns([r.step for r in runners], seconds)
    for row, runner in zip(rows, runners, strict=True):
        row |= runner.figures()
    _relate(rows)
    return _about(world, num_envs, seconds, obs_type) | {"agent": agent, "rows": rows}


def compare_frame_skip(
    world: World,
    frame_skip: int = 4,
    sampling_steps: int | None = None,
    num_envs: int = 1,
    seconds: float = 5.0,
    obs_type: str = "rgb",
) -> dict[str, Any]:
    """Frames/s of ``frame_skip`` frames a step, drawn one after the other or jointly.

    Args:
        world: a loaded world.
        frame_skip: frames of one action, >= 2.
        sampling_steps: None for the world's default.
        num_envs: environments stepped together.
        seconds: time spent on each figure.
        obs_type: "rgb" or "latent".

    Returns:
        Nested plain values, see ``format_frame_skip``.

    Raises:
        ValueError: when there is nothing to compare.
    """
    kept = world.model.dynamics.config.window - 1
    joint = [n for n in range(1, min(frame_skip, kept) + 1) if frame_skip % n == 0]
    if len(joint) < 2:
        raise ValueError(f"a frame skip of {frame_skip} cannot be drawn in fewer passes")
    envs = [
        _env(
            world,
            num_envs,
            obs_type,
            dynamics=world.dynamics,
            sampling_steps=sampling_steps,
            speculative_frames=n,
            frame_skip=frame_skip,
        )
        for n in joint
    ]
    runners = [Runner(env, "random") for env in envs]
    take_turns([r.step for r in runners], seconds)
    rows = [
        {"frames_per_pass": n, "passes": frame_skip // n} | runner.figures()
        for n, runner in zip(joint, runners, strict=True)
    ]
    for row in rows:
        row["over_one_by_one"] = row["frames_per_second"] / rows[0]["frames_per_second"]
    about = _about(world, num_envs, seconds, obs_type)
    steps = envs[0].sampling.steps
    return about | {"frame_skip": frame_skip, "sampling_steps": steps, "rows": rows}


def _row(
    world: World, steps: int, cache: str = "ring", frames: int = 1, stream: str = ""
) -> dict[str, Any]:
    both = world.spec.teacher is not None
    dynamics = ("student" if steps <= FEW else "teacher") if both else world.dynamics
    return {
        "steps": steps,
        "cache": cache,
        "dynamics": dynamics,
        "speculative_frames": frames,
        "stream": stream,
    }


def _with_cache(model: WorldModel, cache: str) -> WorldModel:
    if cache.startswith("plain"):
        return PlainModel(model, torch.float32 if cache == "plain fp32" else torch.bfloat16)
    return RefilledModel(model) if cache == "refilled" else model


def _relate(rows: list[dict[str, Any]]) -> None:
    """Say how many times as fast each row is as the baselines."""
    rates = [(row["cache"], row["steps"], row["frames_per_second"]) for row in rows]
    plain = max(rate for cache, _, rate in rates if cache.startswith("plain"))
    refilled = next(rate for cache, _, rate in rates if cache == "refilled")
    ring: dict[int, float] = {}
    for row in rows:
        rate = row["frames_per_second"]
        row["over_plain_refilled"], row["over_refilled"] = rate / plain, rate / refilled
        if row["speculative_frames"] > 1:
            row["over_no_speculation"] = rate / ring[row["steps"]]
        elif row["cache"] == "ring":
            ring[row["steps"]] = rate


def _env(world: World, num_envs: int, obs_type: str, **kwargs: Any) -> NFDVectorEnv:
    return NFDVectorEnv(
        world.folder,
        num_envs,
        device=world.model.device,
        precision=world.model.precision,
        obs_type=obs_type,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        **kwargs,
    )


def _about(world: World, num_envs: int, seconds: float, obs_type: str) -> dict[str, Any]:
    return {
        "world": world.spec.name,
        "device": describe_device(world.model.device),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "precision": world.model.precision,
        "num_envs": num_envs,
        "obs_type": obs_type,
        "seconds": seconds,
    }


def _heading(report: dict[str, Any]) -> str:
    return (
        f"{report['world']} on {report['device']}, torch {report['torch']}, "
        f"{report['threads']} threads, {report['precision']}, {report['num_envs']} env(s), "
        f"{'frames decoded' if report['obs_type'] == 'rgb' else 'latents, not decoded'}; "
        f"{report['seconds']:g} s a figure, all in turn"
    )


def format_comparison(report: dict[str, Any]) -> str:
    """The report of ``compare`` as Markdown."""
    plain, drafting = [], []
    for row in report["rows"]:
        rate, latency = f"{row['frames_per_second']:.1f}", f"{row['p50_ms']:.1f}"
        latency += f" / {row['p95_ms']:.1f}"
        name = f"{row['steps']} ({row['dynamics']}, {row['sampler']})"
        ratios = [f"{row[over]:.1f}×" for over in ("over_plain_refilled", "over_refilled")]
        if row["speculative_frames"] == 1:
            plain.append([name, CACHES[row["cache"]], rate, latency, *ratios])
            continue
        drafting.append(
            [
                name,
                str(row["speculative_frames"]),
                row["stream"],
                rate,
                latency,
                f"{row['acceptance']:.2f}" if row["drafted"] else "none drafted",
                f"{row['frames_without_a_pass']:.2f}",
                f"{row['over_no_speculation']:.2f}×",
                *ratios,
            ]
        )
    over = ["over plain refilled", "over refilled"]
    columns = ["steps", "cache", "frames/s", "p50 / p95 ms", *over]
    lines = [_heading(report), "", table(columns, plain), "", _BASELINES]
    if drafting:
        columns = ["steps", "n", "actions", "frames/s", "p50 / p95 ms", "acceptance"]
        columns += ["frames without a pass", "over none", *over]
        who = report["agent"] or "random actions held for 1 to 20 frames, as in recordings"
        lines += [
            "",
            "Speculation: n frames are drawn jointly for the current action. Held keys: each "
            f"action for 5 to 20 frames. Agent: {who}. Random: a new action every frame.",
            "",
            table(columns, drafting),
        ]
    return "\n".join(lines)


def format_frame_skip(report: dict[str, Any]) -> str:
    """The report of ``compare_frame_skip`` as Markdown."""
    rows = [
        [
            str(row["frames_per_pass"]),
            str(row["passes"]),
            f"{row['frames_per_second']:.1f}",
            f"{row['p50_ms']:.1f} / {row['p95_ms']:.1f}",
            f"{row['over_one_by_one']:.2f}×",
        ]
        for row in report["rows"]
    ]
    columns = ["frames drawn jointly", "joint draws a step", "frames/s", "p50 / p95 ms a step"]
    return "\n".join(
        [
            f"{_heading(report)}; {report['frame_skip']} frames an env step, "
            f"{report['sampling_steps']} sampling steps",
            "",
            table([*columns, "over one by one"], rows),
        ]
    )
