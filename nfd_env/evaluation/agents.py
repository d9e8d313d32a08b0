"""``nfd eval-agent``: what an agent scores in the learned world and in the real game."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from nfd_env.data.policies import BehaviourPolicy, make_policy
from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.named import import_named
from nfd_env.sources.source import SourceError
from nfd_env.video import caption, enlarge, write_mp4
from nfd_env.worlds.load import load_world

LOADER = "agents.load:load_agent"
_FILES = (".safetensors", ".zip")
_LABELS = {"real": "real game", "learned": "learned world"}


class Player(Protocol):
    """Chooses the actions of a batch of environments."""

    def reset(self, n: int, seed: int | None = None) -> None:
        """New episodes begin in ``n`` environments; ``seed`` makes the choices repeatable."""
        ...

    def act(self, observations: Any, first: Any = None) -> Any:
        """Actions (n, ...) for observations (n, ...).

        ``first``, bool (n,), says whose observation is the first of a new episode.
        """
        ...


class PolicyPlayer:
    """A behaviour policy of the recordings, one instance an environment; see ``Player``."""

    def __init__(self, policies: list[BehaviourPolicy], env: Any) -> None:
        """Play ``env``, a real or learned vector env of frames, one policy an environment."""
        self._policies = policies
        if isinstance(env, NFDVectorEnv):
            # All that a learned world has to show a policy is its action space.
            spaces = [copy.deepcopy(env.single_action_space) for _ in policies]
            self._envs: list[Any] = [SimpleNamespace(action_space=space) for space in spaces]
        else:
            self._envs = env.envs
        self.reset(len(policies))  # what it cannot play shows now

    def reset(self, n: int, seed: int | None = None) -> None:
        """See ``Player``."""
        self._rng = np.random.default_rng(seed)
        self._begin(range(n))

    def act(self, observations: Any, first: Any = None) -> Any:
        """See ``Player``."""
        if first is not None:
            self._begin(int(row) for row in np.flatnonzero(first))
        return np.stack(
            [np.asarray(p.act(o)) for p, o in zip(self._policies, observations, strict=True)]
        )

    def _begin(self, rows: Any) -> None:
        for row in rows:
            try:
                self._policies[row].reset(self._envs[row], self._rng.spawn(1)[0])
            except AttributeError as error:
                if isinstance(self._envs[row], SimpleNamespace):
                    raise ValueError(
                        f"the policy cannot play the learned world: it wants more of the game than "
                        f"its frames and action space ({error}); --real-only scores it in the "
                        "real game alone"
                    ) from None
                raise


@dataclass(frozen=True)
class Episodes:
    """Whole episodes of one environment.

    Attributes:
        scores: float64 (N,), sums of rewards.
        steps: int64 (N,), decisions.
        truncated: bool (N,), cut off at the limit.
        film: uint8 (H, W, 3) frames of the first episode, one a decision.
    """

    scores: np.ndarray
    steps: np.ndarray
    truncated: np.ndarray
    film: list[np.ndarray]


def play_episodes(
    env: Any,
    player: Player,
    episodes: int,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    see: Callable[[Any], Any] | None = None,
    film: int = 0,
    progress: str = "",
) -> Episodes:
    """Play ``episodes`` whole episodes, number i with the environment seed ``seed`` + i.

    Args:
        env: a real or learned vector env with SAME_STEP autoreset and episodes that end. When most
            of its environments have no more to do, only the others go on (``take``).
        player: chooses the actions.
        episodes: how many.
        seed: of the first episode, and of the player.
        options: of every reset.
        see: what the player sees of an observation; None for all of it.
        film: frames of the first episode to keep.
        progress: label of a progress bar; "" for none.
    """
    count = env.num_envs
    scores, steps = np.zeros(episodes), np.zeros(episodes, np.int64)
    truncations = np.zeros(episodes, bool)
    seats = np.arange(count)  # which of the player's environments each row of ``env`` is
    # An environment whose work is done plays on unscored (-1) until the batch shrinks.
    playing = np.where(seats < episodes, seats, -1)
    waiting = iter(range(count, episodes))
    observation, _ = env.reset(seed=seed, options=dict(options or {}))
    player.reset(count, seed)
    shown, first = observation, None  # for the player, one a seat

    def picture() -> np.ndarray:
        return torch.as_tensor(env.frames([0])[0]).cpu().numpy()

    filmed = [picture()] if film else []
    with _bar(episodes, progress) as bar:
        while (playing >= 0).any():
            shown = _put(shown, seats, observation)
            actions = player.act(see(shown) if see else shown, first)[seats]
            observation, *outcome, _ = env.step(actions)
            reward, terminated, truncated = (torch.as_tensor(x).cpu().numpy() for x in outcome)
            ended, active = terminated | truncated, playing >= 0
            first = np.zeros(count, bool)
            first[seats] = ended
            scores[playing[active]] += reward[active]
            steps[playing[active]] += 1
            truncations[playing[active]] = (truncated & ~terminated)[active]
            if playing[0] == 0 and not ended[0] and len(filmed) < film:
                filmed.append(picture())
            seeds: list[int | None] = [None] * len(seats)
            for row in np.flatnonzero(ended & active):
                playing[row] = next(waiting, -1)
                if playing[row] >= 0:
                    seeds[row] = seed + int(playing[row])
            bar.set_postfix(decisions=int(steps.sum()), refresh=False)
            bar.update(int((ended & active).sum()))
            again = np.array([s is not None for s in seeds])
            if again.any():
                observation, _ = env.reset(
                    seed=seeds, options={**(options or {}), "reset_mask": again}
                )
            rows = np.flatnonzero(playing >= 0)
            if 0 < len(rows) <= len(seats) // 2:
                env, observation = env.take(rows), observation[rows]
                seats, playing = seats[rows], playing[rows]
    return Episodes(scores, steps, truncations, filmed)


def _put(shown: Any, seats: np.ndarray, observation: Any) -> Any:
    """``shown`` with these rows in place of its own, which a player may have kept."""
    if len(seats) == len(shown):
        return observation
    shown = shown.clone() if isinstance(shown, torch.Tensor) else shown.copy()
    shown[seats] = observation
    return shown


def _bar(episodes: int, label: str) -> tqdm[Any]:
    """A bar that moves between ends of episodes too, and does not flood a log."""
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=episodes,
        desc=label,
        disable=not label,
        unit="episode",
        miniters=0,
        mininterval=seconds,
        maxinterval=seconds,
    )


def evaluate_agent(
    agent: str,
    world: str = "DoomTakeCover",
    episodes: int = 100,
    seed: int = 0,
    folder: str | Path | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    sampling_steps: int | None = None,
    num_envs: int = 25,
    real_envs: int = 8,
    max_frames: int = 2100,
    threshold: float = 750.0,
    obs_type: str | None = None,
    frame_skip: int | None = None,
    dynamics: str | None = None,
    history_level: float | None = None,
    temperature: float | None = None,
    greedy: bool = False,
    through_tokenizer: bool = False,
    real_only: bool = False,
    agent_kwargs: Mapping[str, Any] | None = None,
    loader: str = LOADER,
    progress: bool = True,
) -> dict[str, Any]:
    """Play an agent in a learned world and in the real game behind it.

    Both sides have the same crop and resize, observation type, frame skip, actions and length of
    an episode. Episodes of the learned world begin at its recorded beginnings, as real ones do.

    Args:
        agent: "random" (held keys); a file of ours (``.safetensors``) or of Stable-Baselines3
            (``.zip``, which may run code of its author when it is loaded); or "module:Class" of a
            behaviour policy.
        world: a world folder or a shipped name.
        episodes: on each side.
        seed: episode i has the environment seed ``seed`` + i.
        folder: where the report ``eval_agent.json`` and the film ``eval_agent.mp4`` of the first
            episodes go; None for neither.
        device: see ``nfd_env.devices.resolve_device``.
        precision: see ``nfd_env.worlds.load.load_world``.
        sampling_steps: of the learned world; None for its default.
        num_envs: learned worlds stepped together.
        real_envs: real games run beside each other.
        max_frames: an episode is truncated there on either side.
        threshold: the share of scores above it is reported; 750 counts as solving TakeCover.
        obs_type: "rgb", "latent" or "features"; None for what the agent's file says, or "rgb".
        frame_skip: frames an action is repeated for; None for what the agent's file says, or 1.
        dynamics: of the learned world, see ``NFDVectorEnv``; so are the next two.
        history_level: see there.
        temperature: see there.
        greedy: take the most probable action, where the agent would draw one.
        through_tokenizer: show the agent real frames as the world's tokenizer renders them, which
            is how generated frames look.
        real_only: leave the learned world out.
        agent_kwargs: arguments of a behaviour policy.
        loader: "module:function", called with (file, vector env or None, greedy) for an agent's
            file; returns a ``Player`` with a ``spec`` that has ``obs_type`` and ``frame_skip``.
        progress: show progress bars.

    Returns:
        Nested plain values, see ``format_report``. ``learned`` and ``real`` hold the scores;
        ``real`` is None, and ``missing`` says why, where the real game cannot be made.

    Raises:
        ValueError: when the agent cannot be loaded, was trained for something else, or cannot take
            the observations.
        SourceError: with ``real_only``, when the real game cannot be made.
    """
    for name, value in (("episodes", episodes), ("max_frames", max_frames)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    is_file = agent.endswith(_FILES)
    if is_file:
        if obs_type is None and frame_skip is None:
            spec = _load(loader, agent, None, greedy).spec
            obs_type, frame_skip = spec.obs_type, spec.frame_skip
    elif obs_type not in (None, "rgb"):
        raise ValueError(
            f"{agent} acts on frames and cannot take obs_type={obs_type!r}: leave it away"
        )
    obs_type, frame_skip = obs_type or "rgb", frame_skip or 1
    common: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "obs_type": obs_type,
        "frame_skip": frame_skip,
        "max_episode_steps": math.ceil(max_frames / frame_skip),
    }
    # What does not look at frames (random keys) spares the learned world drawing them.
    sees = is_file or getattr(_policy(agent, agent_kwargs), "needs_frames", True)
    loaded = load_world(world, device, precision)
    fps = loaded.spec.fps / frame_skip
    film = round(60 * fps) if folder is not None else 0

    def player(env: Any) -> Player:
        if is_file:
            return _load(loader, agent, env, greedy)
        return PolicyPlayer([_policy(agent, agent_kwargs) for _ in range(env.num_envs)], env)

    def tokenized(observation: np.ndarray) -> np.ndarray:
        frames = torch.from_numpy(observation)
        return loaded.model.decode(loaded.model.encode(frames)).cpu().numpy()

    report: dict[str, Any] = {
        "world": loaded.spec.name,
        "agent": agent,
        "episodes": episodes,
        "seed": seed,
        "obs_type": obs_type,
        "frame_skip": frame_skip,
        "max_frames": max_frames,
        "threshold": threshold,
        "through_tokenizer": through_tokenizer,
        "learned": None,
        "real": None,
        "missing": "",
    }
    envs: dict[str, Any] = {}
    try:
        try:
            needs = {} if is_file else getattr(_policy(agent, agent_kwargs), "real_kwargs", {})
            envs["real"] = RealVectorEnv(world, min(real_envs, episodes), **common, **needs)
        except SourceError as error:
            if real_only:
                raise
            report["missing"] = str(error)
        if not real_only:
            envs["learned"] = NFDVectorEnv(
                world,
                min(num_envs, episodes),
                sampling_steps=sampling_steps,
                dynamics=dynamics,
                history_level=history_level,
                temperature=temperature,
                autoreset_mode="SameStep",
                **{**common, "obs_type": obs_type if sees else "latent"},
            )
            report["dynamics"] = envs["learned"].world.dynamics
            report["sampling"] = asdict(envs["learned"].model.sampling)
        # Whatever the agent cannot play is found out before anything is played.
        players = {side: player(env) for side, env in envs.items()}
        played = {
            side: play_episodes(
                env,
                players[side],
                episodes,
                seed,
                {"start": "beginning"} if side == "learned" else None,
                tokenized if side == "real" and through_tokenizer and obs_type == "rgb" else None,
                film,
                _LABELS[side] * progress,
            )
            for side, env in envs.items()
        }
    finally:
        for env in envs.values():
            env.close()
    for side, made in played.items():
        report[side] = _summary(made, frame_skip, threshold)
    if len(played) == 2:
        report["gap"] = _gap(report["learned"], report["real"])
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Before the film, which takes a while.
        (Path(folder) / "eval_agent.json").write_text(json.dumps(report, indent=2))
        aspect = loaded.spec.source.display_aspect
        path = Path(folder) / "eval_agent.mp4"
        report["video"] = str(write_mp4(path, _side_by_side(played, aspect), fps))
    return report


def load_player(agent: str, env: Any, greedy: bool = False, loader: str = LOADER) -> Player:
    """The ``Player`` of an agent for ``env``; see ``evaluate_agent`` for arguments and errors.

    What a player from a file was trained on is not compared with ``env``.
    """
    if agent.endswith(_FILES):
        return _load(loader, agent, None, greedy)
    return PolicyPlayer([_policy(agent, None) for _ in range(env.num_envs)], env)


def _load(loader: str, agent: str, env: Any, greedy: bool) -> Any:
    try:
        load = import_named(loader)
    except ValueError as error:
        raise ValueError(
            f"the loader of agents {error}: run this command from the folder of a clone, where "
            "agents/ lies, or name your own --loader"
        ) from None
    try:
        return load(agent, env, greedy)
    except ValueError as error:
        hint = (
            "" if env is not None else " (--obs-type and --frame-skip say what the file does not)"
        )
        raise ValueError(f"{error}{hint}") from None


def _policy(name: str, kwargs: Mapping[str, Any] | None) -> BehaviourPolicy:
    return make_policy("random_held" if name == "random" else name, dict(kwargs or {}))


def _summary(played: Episodes, frame_skip: int, threshold: float) -> dict[str, Any]:
    scores = played.scores
    ends = int((~played.truncated).sum())
    frames = int(played.steps.sum()) * frame_skip
    sd = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
    return {
        "mean": float(scores.mean()),
        "standard_error": sd / math.sqrt(len(scores)),
        "sd": sd,
        "median": float(np.median(scores)),
        "min": float(scores.min()),
        "max": float(scores.max()),
        "share_above_threshold": float((scores > threshold).mean()),
        "truncated": int(played.truncated.sum()),
        "ends_per_1000_frames": 1000 * ends / frames,
        "ends_standard_error": 1000 * math.sqrt(ends) / frames,  # of a Poisson process
        "decisions": int(played.steps.sum()),
        "scores": scores.tolist(),
    }


def _gap(learned: Mapping[str, Any], real: Mapping[str, Any]) -> dict[str, float]:
    """What the learned world promises beyond what the real game gives."""
    left, right = np.sort(learned["scores"]), np.sort(real["scores"])
    grid = np.concatenate((left, right))
    below = [np.searchsorted(x, grid, side="right") / len(x) for x in (left, right)]
    return {
        "mean": learned["mean"] - real["mean"],
        "standard_error": math.hypot(learned["standard_error"], real["standard_error"]),
        "kolmogorov_smirnov": float(np.abs(below[0] - below[1]).max()),
    }


def _side_by_side(played: Mapping[str, Episodes], aspect: float) -> Iterator[np.ndarray]:
    """The first episodes beside each other; the one that ends first stands still."""
    shown: dict[str, np.ndarray] = {}
    for frames in zip_longest(*(episodes.film for episodes in played.values())):
        panels: list[np.ndarray] = []
        for (side, episodes), frame in zip(played.items(), frames, strict=True):
            text = _LABELS[side]
            if frame is None:
                text += f": ended, score {episodes.scores[0]:g}"
            else:
                shown[side] = enlarge(frame, 192, aspect)
            panels.append(caption(shown[side], text))
            panels.append(np.full((panels[0].shape[0], 8, 3), 255, np.uint8))
        joined = np.concatenate(panels[:-1], 1)
        yield joined[: joined.shape[0] // 2 * 2, : joined.shape[1] // 2 * 2]


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table and what it means."""
    lines = [
        f"{report['agent']} in {report['world']}: {report['episodes']} episodes, seeds from "
        f"{report['seed']}, {report['obs_type']} observations, frame skip "
        f"{report['frame_skip']}, at most {report['max_frames']} frames an episode",
        "",
        f"| | mean ± s.e. | sd | median | min | max | above {report['threshold']:g} | "
        "ends in 1,000 frames |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side, label in _LABELS.items():
        row = report[side]
        if row is not None:
            lines.append(
                f"| {label} | {row['mean']:.4g} ± {row['standard_error']:.2g} | {row['sd']:.3g} | "
                f"{row['median']:.4g} | {row['min']:.4g} | {row['max']:.4g} | "
                f"{row['share_above_threshold']:.0%} | {row['ends_per_1000_frames']:.2f} ± "
                f"{row['ends_standard_error']:.2g} |"
            )
    lines.append("")
    if "gap" in report:
        gap = report["gap"]
        lines.append(
            f"gap, learned minus real: {gap['mean']:+.4g} ± {gap['standard_error']:.2g} in the "
            f"mean; Kolmogorov-Smirnov distance {gap['kolmogorov_smirnov']:.2f}"
        )
    if report["missing"]:
        lines.append(
            "NO REAL SCORE: the real game could not be played, so what the learned world says is "
            f"unchecked. {report['missing']}"
        )
    if "video" in report:
        lines.append(f"film of the first episodes: {report['video']}")
    return "\n".join(lines)
