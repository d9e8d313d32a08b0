"""``nfd eval-agent``: what an agent scores in the learned world and in the real game."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tyro.conf import Positional

from nfd_env.config import check_ranges, config_class
from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.episodes import Episodes, play_episodes
from nfd_env.evaluation.film import beside
from nfd_env.evaluation.tables import report_json, table, told, told_with_error
from nfd_env.files import atomic_write, check_writable, make_folder
from nfd_env.players.load import behaviour_policy, find_agent, load_player, read_agent_spec
from nfd_env.players.policy import AgentError, AgentSpec
from nfd_env.sources.source import SourceError
from nfd_env.video import write_mp4
from nfd_env.worlds.format import WorldSpec
from nfd_env.worlds.hub import is_address
from nfd_env.worlds.load import UnknownWorldError, find_world, load_world

_LABELS = {"real": "real game", "learned": "learned world"}
_FILM_SECONDS = 60


@config_class(kw_only=True)
class Scoring:
    """Where agents are scored, and for how long; also arguments of commands.

    Attributes:
        world: world folder or shipped world; default: the agent's own, for nfd rank the first
            shipped one.
        episodes: on each side.
        seed: episode i has the environment seed ``seed`` + i.
        max_frames: longest episode in frames; default: the world's own limit, or a minute.
        greedy: take the most probable actions.
        trust: a .zip may run code of its author, and the world's real game import any module.
        num_envs: learned worlds stepped together.
        real_envs: real games beside each other.
        sampling_steps: of the learned world; default: its own.
        dynamics: student or teacher, of a distilled world that comes with both; or a baseline that
            was trained, see nfd train-baseline; default: the world's own.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32 or bf16.
    """

    world: str = ""
    episodes: int = 100
    seed: int = 0
    max_frames: int = 0
    greedy: bool = False
    trust: bool = False
    num_envs: int = 25
    real_envs: int = 8
    sampling_steps: int | None = None
    dynamics: str | None = None
    device: str = "auto"
    precision: str = "auto"


@config_class
class AgentEvaluation(Scoring):
    """Which agent is played, and how; see also ``Scoring``.

    Attributes:
        agent: random (held keys); an agent file (.safetensors, or .zip of Stable-Baselines3,
            DQN:agent.zip where it is not PPO); the name of an agent that comes with a world; or
            module:Class of a behaviour policy. Policies take arguments behind commas, and mistakes:
            random,low=1,high=1 or module:Class,caution=30,mistakes=0.2.
        threshold: report the share of scores above it.
        obs_type: default: the agent's own, or rgb.
        frame_skip: frames an action is repeated for; default: the agent's own, or 1.
        through_tokenizer: show the agent real frames as the world's tokenizer renders them, which
            is how generated frames look.
        real_only: leave the learned world out, for policies that need the real game's internals.
        history_level: of the learned world, see ``NFDVectorEnv``; default: its own.
        temperature: likewise.
    """

    agent: Positional[str]
    threshold: float | None = None
    obs_type: Literal["rgb", "latent", "features"] | None = None
    frame_skip: int | None = None
    through_tokenizer: bool = False
    real_only: bool = False
    history_level: float | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class Scores:
    """What an agent scored on one side.

    Attributes:
        mean: return of an episode.
        standard_error: of ``mean``.
        sd: standard deviation of the returns.
        median: of the returns; so are ``min`` and ``max``.
        min: see there.
        max: see there.
        share_above_threshold: None without a threshold.
        length: mean frames of an episode, with those that were truncated.
        length_error: standard error of ``length``.
        truncated: episodes that were cut off.
        ends_per_1000_frames: how often episodes terminated.
        ends_error: its standard error, as of a Poisson process.
        decisions: of all episodes.
        scores: the return of each episode.
    """

    mean: float
    standard_error: float
    sd: float
    median: float
    min: float
    max: float
    share_above_threshold: float | None
    length: float
    length_error: float
    truncated: int
    ends_per_1000_frames: float
    ends_error: float
    decisions: int
    scores: list[float]

    @classmethod
    def of(cls, played: Episodes, frame_skip: int, threshold: float | None = None) -> Scores:
        """Summarise episodes of ``frame_skip`` frames a decision."""
        scores, lengths = played.scores, played.steps * frame_skip
        frames, ends = int(lengths.sum()), int((~played.truncated).sum())
        return cls(
            mean=float(scores.mean()),
            standard_error=_standard_error(scores),
            sd=float(scores.std(ddof=1)) if len(scores) > 1 else math.nan,
            median=float(np.median(scores)),
            min=float(scores.min()),
            max=float(scores.max()),
            share_above_threshold=None if threshold is None else float((scores > threshold).mean()),
            length=float(lengths.mean()),
            length_error=_standard_error(lengths),
            truncated=int(played.truncated.sum()),
            ends_per_1000_frames=1000 * ends / frames,
            ends_error=1000 * math.sqrt(ends) / frames,
            decisions=int(played.steps.sum()),
            scores=scores.tolist(),
        )


@dataclass(frozen=True)
class Gap:
    """What the learned world promises beyond what the real game gives.

    Attributes:
        mean: difference of the mean returns, learned minus real.
        standard_error: of ``mean``.
        length: difference of the mean lengths in frames.
        length_error: its standard error.
        kolmogorov_smirnov: distance of the two distributions of returns, from 0 to 1.
    """

    mean: float
    standard_error: float
    length: float
    length_error: float
    kolmogorov_smirnov: float

    @classmethod
    def between(cls, learned: Scores, real: Scores) -> Gap:
        """The gap of two sides' scores."""
        left, right = np.sort(learned.scores), np.sort(real.scores)
        grid = np.concatenate((left, right))
        below = [np.searchsorted(x, grid, side="right") / len(x) for x in (left, right)]
        return cls(
            learned.mean - real.mean,
            math.hypot(learned.standard_error, real.standard_error),
            learned.length - real.length,
            math.hypot(learned.length_error, real.length_error),
            float(np.abs(below[0] - below[1]).max()),
        )


@dataclass(frozen=True)
class AgentReport:
    """What ``evaluate_agent`` found.

    Attributes:
        world: its name.
        settings: what was asked for; ``obs_type``, ``frame_skip`` and ``max_frames`` are filled in.
        learned: scores in the learned world; None with ``real_only``.
        real: scores in the real game; None where it cannot be made.
        gap: None unless there are both.
        missing: why the real game could not be made; "" where it could.
        dynamics: of the learned world; "" without it.
        sampling: likewise, plain values.
        video: the film's file; "" for none.
    """

    world: str
    settings: AgentEvaluation
    learned: Scores | None
    real: Scores | None
    gap: Gap | None
    missing: str = ""
    dynamics: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    video: str = ""


def longest_episode(spec: WorldSpec) -> int:
    """Frames after which a world's episodes are cut off: its own limit, or a minute."""
    return spec.max_episode_steps or round(60 * spec.fps)


def evaluate_agent(
    settings: AgentEvaluation, folder: str | Path | None = None, progress: bool = True
) -> AgentReport:
    """Play an agent in a learned world and in the real game behind it.

    Both sides have the same crop and resize, observation type, frame skip, actions and length of
    an episode. Episodes of the learned world begin at its recorded beginnings, as real ones do.

    Args:
        settings: whom, where and for how long.
        folder: where the report ``eval_agent.json`` and the film ``eval_agent.mp4`` of the first
            episodes go; None for neither.
        progress: show progress bars.

    Raises:
        ValueError: when the agent cannot be loaded, was trained for something else, or cannot take
            the observations; UntrustedError among them.
        SourceError: with ``real_only``, when the real game cannot be made.
        FolderError: when there cannot be written to ``folder``.
    """
    some = "[1, inf)"
    check_ranges(settings, episodes=some, num_envs=some, real_envs=some, frame_skip=some)
    check_ranges(settings, max_frames="[0, inf)", seed="[0, inf)")
    if folder is not None:
        check_writable(*(Path(folder) / f"eval_agent.{kind}" for kind in ("json", "mp4")))
    agent = find_agent(settings.agent, settings.world or None)
    is_policy = not agent.endswith((".safetensors", ".zip"))
    policy = behaviour_policy(agent) if is_policy else None
    spec = read_agent_spec(agent, None, settings.trust)
    world = _world_of(settings, spec)
    loaded = load_world(world, settings.device, settings.precision)
    if is_policy and settings.obs_type not in (None, "rgb"):
        raise ValueError(
            f"{agent} acts on frames and cannot take obs_type={settings.obs_type!r}: leave it away"
        )
    obs_type = settings.obs_type or (spec.obs_type if spec else "rgb")
    if settings.through_tokenizer and obs_type != "rgb":
        raise ValueError(
            f"{agent} sees obs_type={obs_type!r}, which the tokenizer makes in the real game too: "
            "leave out through_tokenizer, which is for agents that see frames"
        )
    frame_skip = settings.frame_skip or (spec.frame_skip if spec else 1)
    max_frames = settings.max_frames or longest_episode(loaded.spec)
    common: dict[str, Any] = {
        "device": settings.device,
        "precision": settings.precision,
        "obs_type": obs_type,
        "frame_skip": frame_skip,
        "max_episode_steps": math.ceil(max_frames / frame_skip),
    }
    fps = loaded.spec.fps / frame_skip

    def tokenized(observation: np.ndarray) -> np.ndarray:
        return loaded.model.decode(loaded.model.encode(torch.from_numpy(observation))).cpu().numpy()

    envs: dict[str, Any] = {}
    missing = ""
    try:
        try:
            needs = getattr(policy, "real_kwargs", {})
            count = min(settings.real_envs, settings.episodes)
            envs["real"] = RealVectorEnv(world, count, trust=settings.trust, **common, **needs)
        except SourceError as error:
            if settings.real_only:
                raise
            missing = str(error)
        if not settings.real_only:
            # What does not look at frames (random keys) spares the learned world drawing them.
            sees = getattr(policy, "needs_frames", True)
            envs["learned"] = NFDVectorEnv(
                world,
                min(settings.num_envs, settings.episodes),
                sampling_steps=settings.sampling_steps,
                dynamics=settings.dynamics,
                history_level=settings.history_level,
                temperature=settings.temperature,
                autoreset_mode="SameStep",
                **{**common, "obs_type": obs_type if sees else "latent"},
            )
        # Whatever the agent cannot play is found out before anything is played.
        players = {
            side: load_player(agent, env, settings.greedy, settings.trust)
            for side, env in envs.items()
        }
        folder = None if folder is None else make_folder(folder)
        played = {
            side: play_episodes(
                env,
                players[side],
                settings.episodes,
                settings.seed,
                {"start": "beginning"} if side == "learned" else None,
                tokenized if side == "real" and settings.through_tokenizer else None,
                0 if folder is None else round(_FILM_SECONDS * fps),
                _LABELS[side] * progress,
            )
            for side, env in envs.items()
        }
    finally:
        for env in envs.values():
            env.close()
    scores = {side: Scores.of(p, frame_skip, settings.threshold) for side, p in played.items()}
    filled: dict[str, Any] = {"obs_type": obs_type, "frame_skip": frame_skip}
    filled["max_frames"] = frame_skip * math.ceil(max_frames / frame_skip)  # whole steps
    learned = envs.get("learned")
    video = "" if folder is None else str(folder / "eval_agent.mp4")
    report = AgentReport(
        loaded.spec.name,
        replace(settings, world=str(world), **filled),
        scores.get("learned"),
        scores.get("real"),
        Gap.between(scores["learned"], scores["real"]) if len(scores) == 2 else None,
        missing,
        "" if learned is None else learned.world.dynamics,
        {} if learned is None else asdict(learned.sampling),
        video,
    )
    if folder is not None:
        # Before the film, which takes a while. Somebody may have tidied up in the meantime.
        with atomic_write(make_folder(folder) / "eval_agent.json") as path:
            path.write_text(report_json(report), encoding="utf-8")
        write_mp4(video, _film(played, loaded.spec.source.display_aspect), fps)
    return report


def _world_of(settings: AgentEvaluation, spec: AgentSpec | None) -> Path:
    if settings.world:
        return find_world(settings.world)
    # An agent's file must not make us fetch anything.
    if spec is None or not spec.world or is_address(spec.world):
        raise AgentError(f"{settings.agent} does not say which world it plays: name it by --world")
    try:
        return find_world(spec.world)
    except UnknownWorldError:
        raise AgentError(
            f"{settings.agent} was trained in the world {spec.world}, which does not come with the "
            "package: give the world's folder"
        ) from None


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _film(played: Mapping[str, Episodes], aspect: float) -> Iterator[np.ndarray]:
    """The first episodes beside each other; the one that ends first stands still."""
    shown: dict[str, np.ndarray] = {}
    for frames in zip_longest(*(episodes.film for episodes in played.values())):
        panels = []
        for (side, episodes), frame in zip(played.items(), frames, strict=True):
            text = _LABELS[side]
            if frame is None:
                text += f": ended, score {episodes.scores[0]:g}"
            else:
                shown[side] = frame
            panels.append((shown[side], text))
        yield beside(panels, aspect)


def format_report(report: AgentReport) -> str:
    """The report as a Markdown table and what it means."""
    settings = report.settings
    above = [] if settings.threshold is None else [f"above {settings.threshold:g}"]
    columns = ["", "mean ± s.e.", "sd", "median", "min", "max", *above, "frames an episode"]
    rows = []
    for label, row in ((_LABELS["real"], report.real), (_LABELS["learned"], report.learned)):
        if row is None:
            continue
        share = row.share_above_threshold
        cells = [label, told_with_error(row.mean, row.standard_error), told(row.sd, ".3g")]
        cells += [f"{row.median:.4g}", f"{row.min:.4g}", f"{row.max:.4g}"]
        cells += [] if share is None else [f"{share:.0%}"]
        cells.append(told_with_error(row.length, row.length_error, ".0f"))
        rows.append([*cells, f"{row.ends_per_1000_frames:.2f} ± {row.ends_error:.2g}"])
    lines = [
        f"{settings.agent} in {report.world}: {settings.episodes} episodes, seeds from "
        f"{settings.seed}, {settings.obs_type} observations, frame skip {settings.frame_skip}, at "
        f"most {settings.max_frames} frames an episode",
        "",
        table([*columns, "ends in 1,000 frames"], rows),
        "",
    ]
    if report.gap is not None:
        gap = report.gap
        lines.append(
            "gap, learned minus real: "
            f"{told_with_error(gap.mean, gap.standard_error, '+.4g')} in the mean, "
            f"{told_with_error(gap.length, gap.length_error, '+.0f')} frames in the length; "
            f"Kolmogorov-Smirnov distance {gap.kolmogorov_smirnov:.2f}"
        )
    if report.missing:
        lines.append(
            "NO REAL SCORE: the real game could not be played, so what the learned world says is "
            f"unchecked. {report.missing}"
        )
    if report.video:
        lines.append(f"film of the first episodes: {report.video}")
    return "\n".join(lines)
