"""``nfd bench --compare``: what the ring, few steps and speculation are worth, in one run.

The measurements take turns, a short slice each, so that whatever else the machine is doing hits all
of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.benchmark import acceptance_rate, describe_device, make_env
from nfd_env.evaluation.plain import PlainModel
from nfd_env.evaluation.refilled import RefilledModel
from nfd_env.evaluation.streams import HELD, ActionStream
from nfd_env.evaluation.tables import table
from nfd_env.inference.world_model import WorldModel
from nfd_env.precision import multiplies_bf16
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
    "they were trained), torch's own nn.Linear, nn.RMSNorm and convolutions, "
    "scaled_dot_product_attention over the concatenated keys and values; for every frame one pass "
    "over the window's finished frames, which fills the cache, and then one pass a step; in fp32, "
    "and in bf16 where the processor multiplies it. The faster of them is what "
    '"over plain refilled" relates to. Refilled: the '
    "same passes through this package's transformer (adaLN once a frame, at the world's own rank, "
    "norms folded into it, linear layers packed). Ring: keys and values are kept, and the pass "
    "that adds those of a frame is also the first step of the next one. On a GPU only steps with "
    "a ring are replayed as CUDA graphs."
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Frames/s of all environments together, latency of an env step, what became of drafts.

    ``acceptance`` is the share of the drafted frames that were used, ``frames_without_a_pass``
    that of all frames which cost nothing for this reason; None without speculation.
    """

    frames_per_second: float
    p50_ms: float
    p95_ms: float
    drafted: int | None = None
    acceptance: float | None = None
    frames_without_a_pass: float | None = None


@dataclass(frozen=True, kw_only=True)
class ComparedRow(Figures):
    """One way of drawing frames; ``over_`` what: how many times as fast it is as that."""

    steps: int
    cache: str
    dynamics: str
    speculative_frames: int
    stream: str
    sampler: str
    over_plain_refilled: float = float("nan")
    over_refilled: float = float("nan")
    over_no_speculation: float | None = None


@dataclass(frozen=True, kw_only=True)
class FrameSkipRow(Figures):
    """A frame skip in ``passes`` joint draws of ``frames_per_pass`` frames."""

    frames_per_pass: int
    passes: int
    over_one_by_one: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the figures of a comparison have in common; ``seconds`` were spent on each."""

    world: str
    device: str
    torch: str
    threads: int
    precision: str
    num_envs: int
    obs_type: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison(Conditions):
    """What ``compare`` found; ``agent`` gave the actions of the stream of this name."""

    agent: str | None
    rows: list[ComparedRow]


@dataclass(frozen=True, kw_only=True)
class FrameSkipComparison(Conditions):
    """What ``compare_frame_skip`` found."""

    frame_skip: int
    sampling_steps: int
    rows: list[FrameSkipRow]


class Runner:
    """An env driven by a stream of actions, and the seconds that each of its steps took."""

    def __init__(
        self, env: NFDVectorEnv, stream: str, agent: str | None = None, trust: bool = False
    ) -> None:
        """Reset the env; what it does until its window is full is not counted."""
        self.env, self._stream = env, ActionStream(stream, env, agent, trust=trust)
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

    def figures(self) -> Figures:
        """What was measured."""
        frames = self.env.num_envs * self.env.frame_skip * len(self.times)
        p50, p95 = (float(np.percentile(self.times, p) * 1e3) for p in (50, 95))
        figures = Figures(frames_per_second=frames / sum(self.times), p50_ms=p50, p95_ms=p95)
        if self.env.speculative_frames == 1:
            return figures
        drafted, accepted, dropped = (self._counts() - self._before).tolist()
        return replace(
            figures,
            drafted=drafted,
            acceptance=acceptance_rate(accepted, dropped),
            frames_without_a_pass=accepted / frames,
        )

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
    trust: bool = False,
) -> Comparison:
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
        trust: see there.

    Raises:
        ValueError: on a number out of range, or an agent that cannot be loaded, before anything is
            measured.
    """
    kept = world.model.dynamics.config.window - 1
    # Emulated, a product in bf16 takes a hundred times as long: no baseline that anyone would use.
    left_out = {"ring"} if multiplies_bf16(world.model.device) else {"ring", "plain bf16"}
    ways = [(BASELINE_STEPS, cache, 1, "") for cache in CACHES if cache not in left_out]
    ways += [(count, "ring", 1, "") for count in steps]
    ways += [
        (count, "ring", n, stream)
        for count in steps
        if count <= FEW
        for n in speculative_frames
        if n <= kept
        for stream in HELD
    ]
    both = world.spec.teacher is not None
    envs = [
        make_env(
            world,
            num_envs,
            obs_type,
            dynamics=("student" if count <= FEW else "teacher") if both else world.dynamics,
            sampling_steps=count,
            speculative_frames=n,
        )
        for count, _, n, _ in ways
    ]
    ActionStream("agent", envs[0], agent, trust=trust)  # or refuse it now
    runners = []
    for (_, cache, _, stream), env in zip(ways, envs, strict=True):
        env.model = _with_cache(env.model, cache)
        runners.append(Runner(env, stream or "held keys", agent, trust))
    take_turns([r.step for r in runners], seconds)
    rows = [
        ComparedRow(
            **asdict(runner.figures()),
            steps=count,
            cache=cache,
            dynamics=runner.env.world.dynamics,
            speculative_frames=n,
            stream=stream,
            sampler=runner.env.sampling.sampler,
        )
        for (count, cache, n, stream), runner in zip(ways, runners, strict=True)
    ]
    about = conditions(world, num_envs, seconds, obs_type)
    return Comparison(**asdict(about), agent=agent, rows=_related(rows))


def compare_frame_skip(
    world: World,
    frame_skip: int = 4,
    sampling_steps: int | None = None,
    num_envs: int = 1,
    seconds: float = 5.0,
    obs_type: str = "rgb",
) -> FrameSkipComparison:
    """Frames/s of ``frame_skip`` frames a step, drawn one after the other or jointly.

    Args:
        world: a loaded world.
        frame_skip: frames of one action, >= 2.
        sampling_steps: None for the world's default.
        num_envs: environments stepped together.
        seconds: time spent on each figure.
        obs_type: "rgb" or "latent".

    Raises:
        ValueError: when there is nothing to compare.
    """
    kept = world.model.dynamics.config.window - 1
    joint = [n for n in range(1, min(frame_skip, kept) + 1) if frame_skip % n == 0]
    if len(joint) < 2:
        raise ValueError(f"a frame skip of {frame_skip} cannot be drawn in fewer passes")
    envs = [
        make_env(
            world,
            num_envs,
            obs_type,
            sampling_steps=sampling_steps,
            speculative_frames=n,
            frame_skip=frame_skip,
        )
        for n in joint
    ]
    runners = [Runner(env, "random") for env in envs]
    take_turns([r.step for r in runners], seconds)
    figures = [runner.figures() for runner in runners]
    rows = [
        FrameSkipRow(
            **asdict(row),
            frames_per_pass=n,
            passes=frame_skip // n,
            over_one_by_one=row.frames_per_second / figures[0].frames_per_second,
        )
        for n, row in zip(joint, figures, strict=True)
    ]
    about, steps = conditions(world, num_envs, seconds, obs_type), envs[0].sampling.steps
    return FrameSkipComparison(
        **asdict(about), frame_skip=frame_skip, sampling_steps=steps, rows=rows
    )


def _with_cache(model: WorldModel, cache: str) -> WorldModel:
    if cache.startswith("plain"):
        return PlainModel(model, torch.float32 if cache == "plain fp32" else torch.bfloat16)
    return RefilledModel(model) if cache == "refilled" else model


def _related(rows: list[ComparedRow]) -> list[ComparedRow]:
    """Say how many times as fast each row is as the baselines."""
    plain = max(row.frames_per_second for row in rows if row.cache.startswith("plain"))
    refilled = next(row.frames_per_second for row in rows if row.cache == "refilled")
    alone = {r.steps: r.frames_per_second for r in rows if r.cache == "ring" and not r.stream}
    return [
        replace(
            row,
            over_plain_refilled=row.frames_per_second / plain,
            over_refilled=row.frames_per_second / refilled,
            over_no_speculation=row.frames_per_second / alone[row.steps] if row.stream else None,
        )
        for row in rows
    ]


def conditions(world: World, num_envs: int, seconds: float, obs_type: str) -> Conditions:
    """What figures that are measured now have in common."""
    return Conditions(
        world=world.spec.name,
        device=describe_device(world.model.device),
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        precision=world.model.precision,
        num_envs=num_envs,
        obs_type=obs_type,
        seconds=seconds,
    )


def heading(report: Conditions) -> str:
    """The same in one line."""
    return (
        f"{report.world} on {report.device}, torch {report.torch}, {report.threads} threads, "
        f"{report.precision}, {report.num_envs} env(s), "
        f"{'frames decoded' if report.obs_type == 'rgb' else 'latents, not decoded'}; "
        f"{report.seconds:g} s a figure, all in turn"
    )


def format_comparison(report: Comparison) -> str:
    """The report of ``compare`` as Markdown."""
    plain, drafting = [], []
    for row in report.rows:
        name = f"{row.steps} ({row.dynamics}, {row.sampler})"
        pace = [f"{row.frames_per_second:.1f}", f"{row.p50_ms:.1f} / {row.p95_ms:.1f}"]
        ratios = [f"{over:.1f}×" for over in (row.over_plain_refilled, row.over_refilled)]
        if not row.stream:
            plain.append([name, CACHES[row.cache], *pace, *ratios])
            continue
        drafts = [
            f"{row.acceptance:.2f}" if row.drafted else "none drafted",
            f"{row.frames_without_a_pass:.2f}",
            f"{row.over_no_speculation:.2f}×",
        ]
        speculated = [name, str(row.speculative_frames), row.stream]
        drafting.append([*speculated, *pace, *drafts, *ratios])
    over = ["over plain refilled", "over refilled"]
    columns = ["steps", "cache", "frames/s", "p50 / p95 ms", *over]
    lines = [heading(report), "", table(columns, plain), "", _BASELINES]
    if drafting:
        columns = ["steps", "n", "actions", "frames/s", "p50 / p95 ms", "acceptance"]
        columns += ["frames without a pass", "over none", *over]
        who = report.agent or "random actions held for 1 to 20 frames, as in recordings"
        lines += [
            "",
            "Speculation: n frames are drawn jointly for the current action. Held keys: each "
            f"action for 5 to 20 frames. Agent: {who}. Random: a new action every frame.",
            "",
            table(columns, drafting),
        ]
    return "\n".join(lines)


def format_frame_skip(report: FrameSkipComparison) -> str:
    """The report of ``compare_frame_skip`` as Markdown."""
    rows = [
        [
            str(row.frames_per_pass),
            str(row.passes),
            f"{row.frames_per_second:.1f}",
            f"{row.p50_ms:.1f} / {row.p95_ms:.1f}",
            f"{row.over_one_by_one:.2f}×",
        ]
        for row in report.rows
    ]
    columns = ["frames drawn jointly", "joint draws a step", "frames/s", "p50 / p95 ms a step"]
    return "\n".join(
        [
            f"{heading(report)}; {report.frame_skip} frames an env step, "
            f"{report.sampling_steps} sampling steps",
            "",
            table([*columns, "over one by one"], rows),
        ]
    )
