"""Rounds: an agent learns in the world, plays the real game, and the world is trained on.

What is recorded by chance shows little of where good players go. From the second round on, the
native PPO is trained in the world of the round before, the real game is recorded with it, and the
networks go on from their weights on all that was recorded so far.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nfd_env import config
from nfd_env.data.collect import PolicyConfig
from nfd_env.data.shards import EpisodeReference, RecordedDataset
from nfd_env.files import atomic_write, found_file, writing
from nfd_env.learning.ppo import Position, rollout, update
from nfd_env.learning.train import TrainPPOConfig, make_env, make_policy
from nfd_env.models.weights import CheckpointError, fingerprint_of
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.plan import Plan, merged
from nfd_env.recipe.steps import as_begun
from nfd_env.training.encode import STAMP

STAGES = (
    "record",
    "inverse_dynamics",
    "tokenizer",
    "encode",
    "flow",
    "heads",
    "distill",
    "world",
    "report",
)
LATER = ("agent", "record", "tokenizer", "encode", "flow", "heads", "distill", "world")
"""Stages of a later round; with its number behind their names, as in "flow_2"."""

_ONCE = ("inverse_dynamics", "report")  # stages that a run has once, however many rounds
_LATER_MINUTES = 2 / 3  # of a later round, to one of the first: it begins from trained weights
_LATER_RATE = 0.5  # of the flow model's learning rate: what it knows is to be kept

# One who plays as well as the agent can, and who now and then leaves its path, as people do. The
# rest is random play, under the very same conditions, to compare its returns with.
_MISTAKES = 0.05  # probability a step of beginning a random stretch
_AGENT_POLICY = "nfd_env.players.frames:AgentPolicy"
_SHARES = {"mistakes": 0.6, "agent": 0.25, "random": 0.15}

_ENVS, _ENVS_GPU = 16, 128
_ROLLOUT = 32  # decisions of each environment between updates
_DECISIONS_A_SECOND = 8.0  # as often as people decide
_FEWEST_UPDATES, _MOST_UPDATES = 4, 1000
_FEWEST_ENVS = 4


def stages(rounds: int) -> tuple[str, ...]:
    """All stages in their order, with so many rounds."""
    later = [f"{stage}_{number}" for number in range(2, rounds + 1) for stage in LATER]
    return (*STAGES[:-1], *later, STAGES[-1])


def split(name: str) -> tuple[str, int]:
    """Turn "flow_2" into "flow" and 2, "flow" into "flow" and 1."""
    stage, _, number = name.rpartition("_")
    return (stage, int(number)) if stage and number.isdigit() else (name, 1)


@dataclass(frozen=True)
class Round:
    """One round of a game's training: where its parts lie, and its share of the budget.

    Attributes:
        game: the game file.
        number: of the round, from 1 on.
    """

    game: GameConfig
    number: int = 1

    def at(self, number: int) -> Round:
        """Another round of the same game."""
        return replace(self, number=number)

    @property
    def before(self) -> Round:
        """The one before."""
        return self.at(self.number - 1)

    @property
    def minutes(self) -> float:
        """The part of the budget that is its own."""
        shares = [1.0] + [_LATER_MINUTES] * (self.game.rounds - 1)
        return self.game.minutes * shares[self.number - 1] / sum(shares)

    @property
    def here(self) -> GameConfig:
        """The game file as its trainings take it: their folder, recordings and minutes."""
        if self.game.rounds == 1:
            return self.game
        folder, recordings = self.game.run_folder, self.game.recordings
        if self.number > 1:
            folder = folder / f"round_{self.number}"
            recordings = str(folder / "all_recordings")
        return replace(self.game, folder=str(folder), recordings=recordings, minutes=self.minutes)

    @property
    def recordings(self) -> RecordedDataset:
        """What its trainings take."""
        return RecordedDataset(self.here.recordings_place)

    @property
    def own_recordings(self) -> Path:
        """What is recorded in it."""
        if self.number == 1:
            return Path(self.game.recordings_place).expanduser()
        return self.game.run_folder / f"round_{self.number}" / "recordings"

    @property
    def plan(self) -> Path:
        """Where its plan is stored."""
        return self.here.run_folder / "plan.yaml"

    @property
    def world(self) -> Path:
        """Where its world goes: that of the last one is the run's."""
        if self.number == self.game.rounds:
            return self.game.world_folder
        return self.game.run_folder / f"round_{self.number}" / "world"

    def key(self, stage: str) -> str:
        """The name of one of its stages."""
        return stage if self.number == 1 or stage in _ONCE else f"{stage}_{self.number}"

    def weights(self, stage: str) -> Path:
        """The file that one of its stages leaves."""
        folder = self.game.run_folder if stage in _ONCE else self.here.run_folder
        return folder / stage / f"{'agent' if stage == 'agent' else 'model'}.safetensors"

    def has_weights(self, stage: str) -> bool:
        """Whether they are there; anything else in their place is a CheckpointError."""
        return found_file(self.weights(stage), CheckpointError)

    def digest(self, stage: str) -> str:
        """The identity of these weights; not of the file: equal ones may differ in its header."""
        path = self.weights(stage)
        if not self.has_weights(stage):
            raise ValueError(f"{path}: no such weights; run stage {self.key(stage)} first")
        return fingerprint_of(path)

    def played_by_agent(self) -> GameConfig:
        """The game file as a later one records it."""
        kwargs = {"agent": str(self.weights("agent")), "world": str(self.before.world)}
        return replace(
            self.here,
            recordings="",
            seed=(self.game.seed + self.number - 1) % 2**63,  # other episodes than before
            policies=[
                PolicyConfig(_AGENT_POLICY, _SHARES["mistakes"], kwargs, _MISTAKES),
                PolicyConfig(_AGENT_POLICY, _SHARES["agent"], kwargs),
                PolicyConfig("random_held", _SHARES["random"], {"low": 1, "high": 12}),
            ],
        )


def take_over(latents: Path, place: Path) -> None:
    """Let ``place`` begin with ``latents`` by the same tokenizer, of shards of the same names."""
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        for path in sorted(latents.glob("*.npy")):
            if not (place / path.name).exists():
                (place / path.name).unlink(missing_ok=True)
                link(path, place / path.name)
        shutil.copyfile(latents / STAMP, place / STAMP)


def join(folders: Sequence[Path], joined: Path) -> None:
    """Make ``joined`` a data set of links to the shards of several; the first keep their names.

    Raises:
        FolderError: when it cannot be written to.
    """
    with writing(joined):
        shutil.rmtree(joined, ignore_errors=True)
        joined.mkdir(parents=True)
        for number, folder in enumerate(folders, 1):
            for shard in sorted(folder.glob("shard-*")):
                _, writer, place = shard.name.split("-")
                name = shard.name if number == 1 else f"shard-r{number}_{writer}-{place}"
                link(shard, joined / name)
        with atomic_write(joined / "dataset.yaml") as temporary:  # last: now it is one
            shutil.copyfile(folders[0] / "dataset.yaml", temporary)


def link(target: Path, place: Path) -> None:
    """Make ``place`` stand for ``target``, also where the folder of both is moved elsewhere."""
    where = os.path.relpath(target.resolve(), place.parent.resolve())
    place.symlink_to(where, target_is_directory=target.is_dir())


def later_plan(before: Plan, round: Round) -> Plan:
    """The plan of a later ``round``: the sizes of the one ``before``, whose weights it begins with.

    That one must be decided.
    """
    game = round.game
    folder, data = round.here.run_folder, round.here.recordings_place

    def weights(name: str) -> str:
        return str(round.weights(name))

    def earlier(name: str) -> str:
        return str(Path(getattr(before, name)["train"]["folder"]) / "model.safetensors")

    def begun(name: str, **changes: Any) -> dict[str, Any]:
        values = as_begun(before, game, name)
        train = {**values["train"], "folder": str(folder / name), **changes.pop("train", {})}
        return {**values, "recordings": data, **changes, "train": train}

    latents = {"tokenizer": weights("tokenizer"), "latents": str(folder / "latents")}
    rate = before.flow["train"]["learning_rate"]
    if round.number == 2 and "learning_rate" not in game.flow.get("train", {}):
        rate *= _LATER_RATE
    return Plan(
        {},
        {},
        {},
        before.inverse_dynamics,
        begun("tokenizer", initial=earlier("tokenizer")),
        begun(
            "flow",
            **latents,
            initial=earlier("flow"),
            initial_motion="",
            train={"learning_rate": rate},
        ),
        # Not from the weights before: which rewards there are may be new.
        begun("heads", **latents),
        begun("distill", **latents, teacher=weights("flow"), student=earlier("distill")),
        {
            **before.export,
            "folder": str(round.world),
            "recordings": data,
            "tokenizer": str(folder / "tokenizer"),
            "dynamics": str(folder / "distill"),
            "heads": str(folder / "heads"),
            "teacher": str(folder / "flow") if game.teacher else "",
        },
    )


def world_identity(folder: Path) -> str:
    """What an agent learns in: the weights and the sampling of a world."""
    parts = {
        name: fingerprint_of(folder / f"{name}.safetensors")
        for name in ("tokenizer", "dynamics", "heads")
    }
    return config.fingerprint({**parts, "sampling": config.read(folder / "world.yaml")["sampling"]})


def agent_settings(
    game: GameConfig, folder: Path, world: Path, device: str, recordings: RecordedDataset | None
) -> dict[str, Any]:
    """Settings of ``TrainPPOConfig``, but for what ``decide_agent`` adds.

    Args:
        game: the game file.
        folder: the training's.
        world: to train in.
        device: of everything.
        recordings: of the game; None to look at what the game file sets.

    Raises:
        ConfigError: when that sets what is decided here.
    """
    wrong = [key for key in ("folder", "world", "real", "device") if key in game.agent]
    if wrong:
        raise config.ConfigError(f"agent.{wrong[0]}: is decided by the recipe; leave it out")
    fps = recordings.spec.fps if recordings else game.source.fps or 30.0
    skip = int(np.clip(round(fps / _DECISIONS_A_SECOND), 1, 4))
    skip = game.agent.get("frame_skip", skip)
    scale = reward_scale(recordings, _ROLLOUT * skip) if recordings else 1.0
    envs = _ENVS_GPU if device.startswith("cuda") else _ENVS
    values: dict[str, Any] = {
        "folder": str(folder),
        "world": str(world),
        "decisions": _FEWEST_UPDATES * _ROLLOUT * envs,
        "num_envs": envs,
        "frame_skip": skip,
        # A world is the less true the longer it runs on its own.
        "horizon_frames": (_ROLLOUT + 1) * skip,
        "fresh_rollouts": True,
        "seed": game.seed,
        "device": device,
        "ppo": {
            "rollout_steps": _ROLLOUT,
            "minibatch_size": _ROLLOUT * envs // 2,
            "learning_rate": 7e-4,
            "discount": 0.98,
            "use_hazard": True,
            "reward_scale": scale,
        },
    }
    return merged(values, game.agent)


def built_agent(values: Mapping[str, Any]) -> TrainPPOConfig:
    """The settings, checked.

    Raises:
        ConfigError: naming the setting.
    """
    return config.from_mapping(TrainPPOConfig, values, "agent")


def decide_agent(values: dict[str, Any], own: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """``values`` with as many decisions as there are seconds for, by a few that are timed.

    Args:
        values: of ``agent_settings``.
        own: those that the game file sets.
        seconds: to be spent.
    """
    if "decisions" in own:
        return values
    settings = built_agent(values)
    env = make_env(settings)
    try:
        policy, optimiser = make_policy(env, settings)
        observation, info = env.reset(seed=0)
        position = Position.start(observation, settings.frame_stack, info.get("context"))
        times = []
        for _ in range(2):  # the first also pays for memory
            begin = time.perf_counter()
            batch, position = rollout(env, policy.act, position, 2, policy.look, policy.playable)
            update(policy, optimiser, batch, replace(settings.ppo, minibatch_size=batch.numel()))
            times.append((time.perf_counter() - begin) / batch.numel())
        a_decision = times[-1]
    finally:
        env.close()
    envs, steps = settings.num_envs, settings.ppo.rollout_steps
    given = own.get("ppo") or {}
    if not {"num_envs"} & own.keys() and not {"minibatch_size", "rollout_steps"} & given.keys():
        most = int(seconds / (_FEWEST_UPDATES * steps * a_decision))
        envs = int(np.clip(most, _FEWEST_ENVS, envs))
        ppo_values = {**values["ppo"], "minibatch_size": steps * envs // 2}
        values = {**values, "num_envs": envs, "ppo": ppo_values}
    updates = int(np.clip(seconds / (envs * steps * a_decision), _FEWEST_UPDATES, _MOST_UPDATES))
    return {**values, "decisions": updates * envs * steps}


def reward_scale(recordings: RecordedDataset, frames: int) -> float:
    """What brings the rewards of about so many frames to the order of 1; 1 where there are none."""
    sums = [
        float(part.sum())
        for episode in recordings
        for part in np.array_split(episode.rewards, max(1, len(episode) // frames))
    ]
    typical = float(np.sqrt(np.mean(np.square(sums))))
    return float(f"{1 / typical:.3g}") if typical > 1e-6 else 1.0


@dataclass(frozen=True)
class Played:
    """What somebody has scored in the real game.

    Attributes:
        mean: return of an episode.
        error: standard error of the mean; NaN of a single episode.
        episodes: that were played.
    """

    mean: float
    error: float
    episodes: int

    @classmethod
    def of(cls, episodes: Sequence[EpisodeReference]) -> Played:
        """Of the returns of ``episodes``."""
        returns = np.array([episode.total_reward for episode in episodes], float)
        if not len(returns):
            return cls(float("nan"), float("nan"), 0)
        error = returns.std(ddof=1) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
        return cls(float(returns.mean()), float(error), len(returns))

    def __str__(self) -> str:
        """The mean with its error."""
        return f"{self.mean:.4g} ± {self.error:.2g} ({self.episodes} episodes)"


def returns(recordings: RecordedDataset) -> dict[str, Played]:
    """Of a later round's own recordings: the agent's returns, with and without mistakes, random."""
    episodes: dict[str, list[EpisodeReference]] = {name: [] for name in _SHARES}
    for episode in recordings:
        agent = episode.policy.split(":")[1].startswith(_AGENT_POLICY.split(":")[1])
        name = "mistakes" if "+mistakes" in episode.policy else "agent" if agent else "random"
        episodes[name].append(episode)
    return {name: Played.of(found) for name, found in episodes.items()}
