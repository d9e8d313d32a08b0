"""The one file that describes a game: what to record, and how much time to spend on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from nfd_env import config
from nfd_env.data.collect import CollectConfig, PolicyConfig
from nfd_env.named import look_here
from nfd_env.sources.source import SourceConfig

# What the files of the stages began with, when each had one.
_STAGE_SETTINGS = {"train", "model", "latents", "dynamics", "sampling"}

_MOST_ROUNDS = 20  # more is a slip: each takes hours to be worth anything


@config.config_class
class GameConfig:
    """A game file, such as ``nfd init`` writes it; see docs/make_a_world.md.

    Attributes:
        name: the world's name, e.g. "BigFish".
        source: the real game and how its frames become observations.
        folder: the run folder, which recordings, weights, the report and the world go into; "" for
            ``runs/<name>``.
        minutes: wall-clock budget of the whole recipe, from recording to report.
        rounds: how many times the world is trained. From the second time on an agent that was
            trained in the world before plays the real game, and the world goes on from there; what
            is set of frames and steps holds for each round.
        device: "cpu", "cuda" or "auto".
        frames: frames to record; 0 for as many as the budget is worth.
        workers: recording processes; 0 for one a processor core.
        seed: of everything.
        max_episode_steps: recorded episodes are truncated there.
        world_steps: the world's episodes are truncated there; 0 for never.
        validation_every: every n-th episode is held out.
        policies: who plays while it is recorded.
        recording_kwargs: ``gymnasium.make`` arguments for recording only.
        signals: see ``CollectConfig.signals``: what heads may be told beyond the picture.
        recordings: a data set that is there already, instead of recording; "" to record. A folder,
            or several, or addresses in object stores ("s3://..."), separated by commas.
        teacher: whether the world keeps the many-step teacher too.
        small: side in pixels of the smallest thing that matters; 0 to measure it on the recordings.
        inverse_dynamics: settings that are not to be derived, see
            ``InverseDynamicsTrainingConfig``.
        tokenizer: likewise, see ``TokenizerTrainingConfig``.
        flow: likewise, see ``FlowTrainingConfig``.
        heads: likewise, see ``HeadsTrainingConfig``.
        distill: likewise, see ``DistillTrainingConfig``.
        export: likewise, see ``ExportConfig``.
        agent: likewise, see ``nfd_env.learning.train.TrainPPOConfig``; for ``rounds``.
    """

    name: str
    source: SourceConfig
    folder: str = ""
    minutes: float = 60.0
    rounds: int = 1
    device: str = "auto"
    frames: int = 0
    workers: int = 0
    seed: int = 0
    max_episode_steps: int = 2000
    world_steps: int = 0
    validation_every: int = 20
    policies: list[PolicyConfig] = field(default_factory=lambda: [PolicyConfig("random_held")])
    recording_kwargs: dict[str, Any] = field(default_factory=dict)
    signals: str = ""
    recordings: str = ""
    teacher: bool = True
    small: float = 0.0
    inverse_dynamics: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    flow: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    agent: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.name or not all(c.isalnum() or c in "_-" for c in self.name):
            raise ValueError(f"name must consist of letters, digits, _ and -, got {self.name!r}")
        config.check_ranges(self, minutes="(0, 1e6)", rounds=f"[1, {_MOST_ROUNDS}]")
        if self.rounds > 1 and ("," in self.recordings or "://" in self.recordings):
            raise ValueError("later rounds join recordings: with rounds, name one folder on a disk")
        some = "[0, inf)"
        config.check_ranges(self, frames=some, workers=some, world_steps=some, small=some)
        config.check_ranges(self, seed="[0, 2**63)", max_episode_steps="[2, inf)")
        self.collect_config(1)  # which checks what it takes from here

    @property
    def run_folder(self) -> Path:
        """Where everything goes."""
        return Path(self.folder or f"runs/{snake_case(self.name)}").expanduser()

    @property
    def recordings_place(self) -> str:
        """Where the data set is, see ``RecordedDataset``."""
        return self.recordings or str(self.run_folder / "recordings")

    @property
    def world_folder(self) -> Path:
        """The finished world."""
        return self.run_folder / "world"

    def collect_config(self, frames: int) -> CollectConfig:
        """What ``nfd collect`` records, in all ``frames`` frames."""
        return CollectConfig(
            source=self.source,
            folder=self.recordings_place,
            frames=frames,
            policies=self.policies,
            workers=self.workers or os.cpu_count() or 1,
            seed=self.seed,
            max_episode_steps=self.max_episode_steps,
            validation_every=self.validation_every,
            recording_kwargs=self.recording_kwargs,
            signals=self.signals,
        )


def load_game(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    minutes: float | None = None,
    device: str | None = None,
) -> GameConfig:
    """Read a game file.

    Args:
        path: YAML, as ``nfd init`` writes it.
        overrides: ``key.sub=value``, over the file.
        minutes: instead of the file's.
        device: instead of the file's.

    Raises:
        ConfigError: naming the key that is unknown, missing or of the wrong type.
    """
    path = Path(path).expanduser()
    look_here()  # for the game's own modules, as its policies are looked for
    _check_kind(path)
    game = config.load(GameConfig, path, overrides)
    given = {"minutes": minutes, "device": device}
    try:
        return replace(game, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise config.ConfigError(f"{path}: {error}") from None


def _check_kind(path: Path) -> None:
    """Refuse the files of single stages, which games were described by in older versions."""
    found = sorted(_STAGE_SETTINGS & config.read(path).keys())
    if found:
        raise config.ConfigError(
            f"{path}: is the file of one stage ({', '.join(found)}); now one file describes the "
            "game and every stage: begin with `nfd init ENV_ID`, and set what is not to be derived "
            "below the stage's name, such as flow: {train: {steps: 20000}}"
        )


def snake_case(name: str) -> str:
    """Turn "BigFish" into "big_fish"."""
    return "".join(
        f"_{c.lower()}"
        if c.isupper() and i and name[i - 1].isalnum() and not name[i - 1].isupper()
        else c.lower()
        for i, c in enumerate(name)
    ).replace("-", "_")
