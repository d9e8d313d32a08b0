"""What a run folder says of its stages: what each was made from, how long it took, how it came out.

``run.yaml`` holds a ``StageRecord`` for each; fingerprints are of contents, not of paths.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from nfd_env import config
from nfd_env.data.shards import RecordedDataset
from nfd_env.files import found_file, save_text
from nfd_env.recipe.game import GameConfig


@dataclass
class StageRecord:
    """What ``run.yaml`` says of a stage.

    Attributes:
        made_from: fingerprint of its settings and inputs.
        finished: whether it is.
        steps: that were trained.
        seconds: that it took, all runs together.
        metrics: of its last validation.
        gates: lines of text.
        extra: other plain values, such as the student's sampling steps.
    """

    made_from: str
    finished: bool = False
    steps: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] | None = None
    gates: list[str] | None = None
    extra: dict[str, Any] | None = None


def read_records(folder: Path) -> dict[str, StageRecord]:
    """The records of a run folder; none where nothing was made yet.

    Raises:
        ConfigError: when the file is damaged.
    """
    path = folder / "run.yaml"
    if not found_file(path, config.ConfigError):
        return {}
    return {
        name: config.from_mapping(StageRecord, value, f"{path}: {name}", measured=True)
        for name, value in config.read(path).items()
    }


def write_yaml(path: Path, values: Any) -> None:
    """Write plain values, all or nothing.

    Raises:
        FolderError: when it cannot be written.
    """
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # several times as fast
    save_text(path, yaml.dump(values, Dumper=dumper, sort_keys=False))


def write_records(folder: Path, records: dict[str, StageRecord]) -> None:
    """Write ``run.yaml``; see ``write_yaml``.

    A metric that could not be measured, NaN, is left out, as of episodes that are too short for it.
    """
    written = {}
    for name, record in records.items():
        metrics = record.metrics
        known = metrics and {key: value for key, value in metrics.items() if value == value}
        written[name] = {**asdict(record), "metrics": known}
    write_yaml(folder / "run.yaml", written)


def recorded_by(game: GameConfig) -> dict[str, str]:
    """Fingerprints of the settings that say who plays and for how long, when it is recorded."""
    values = asdict(game)
    names = ("policies", "seed", "max_episode_steps", "validation_every", "recording_kwargs")
    return {name: config.fingerprint({name: values[name]}) for name in names}


def recordings_digest(recordings: RecordedDataset) -> str:
    """A hash of which episodes a data set has; not of every frame, which would take minutes."""
    digest = hashlib.sha256()
    for episode in recordings:
        text = f"{episode.key} {len(episode)} {episode.seed} {episode.total_reward} {episode.split}"
        digest.update(text.encode())
    return digest.hexdigest()


def latent_statistics(folder: Path) -> tuple[float, float]:
    """Largest absolute mean of a channel, and the deviation over all, of encoded recordings."""
    parts = []
    for path in sorted(folder.glob("*.npy")):
        latents = np.load(path, mmap_mode="r")
        parts.append(np.array(latents[:: max(1, len(latents) // 500)], np.float32))
    values = torch.from_numpy(np.concatenate(parts))
    return float(values.mean((0, 2, 3)).abs().max()), float(values.std())
