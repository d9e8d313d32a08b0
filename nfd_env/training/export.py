"""The last stage: finished networks, starts, a clip and their provenance become a world folder."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nfd_env import __version__, config
from nfd_env.config import check_ranges, config_class
from nfd_env.data.episode import kind_of
from nfd_env.data.shards import EpisodeReference, RecordedDataset, RecordingError
from nfd_env.data.windows import Places, encoded_into
from nfd_env.files import found_file
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.state import Context
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.low_rank import with_low_rank
from nfd_env.models.rounding import FEWEST_BITS, MOST_BITS, Rounded, round_weights
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import (
    CheckpointError,
    Origin,
    load_weights,
    read_origin,
)
from nfd_env.sources.keys import check_controls
from nfd_env.sources.source import PRESENTATION, SourceConfig
from nfd_env.spaces import ActionCodec, space_from_dict
from nfd_env.worlds.clip import Clip
from nfd_env.worlds.format import (
    DISPLAYS,
    NETWORKS,
    WorldSpec,
    check_fit,
    check_origins,
    owned_world,
    save_world,
)

_HELD_OUT = 16  # starts that tell what rounding costs


@config_class
class ExportConfig:
    """Which finished networks become a world, and what it says of itself.

    Attributes:
        name: the world's name.
        modulation_rank: see ``nfd_env.models.low_rank.with_low_rank``; 0 keeps the full matrix.
        folder: the world folder to write.
        recordings: the data-set folder.
        tokenizer: run folder of the tokenizer.
        dynamics: run folder of the dynamics.
        heads: run folder of the heads.
        configs: the config files behind the runs, copied into the provenance.
        hazard_odds: > 0, factor on the odds of the termination head's hazard. Heads are trained on
            recorded frames, and see an end coming less surely in generated ones; choose it so that
            a hit kills as often in the world as in the game.
        sampling: the world's default sampling.
        teacher: run folder of the flow model behind a distilled ``dynamics``, to ship both; "" for
            none.
        teacher_sampling: the teacher's default sampling.
        bits: those of tokenizer, dynamics, heads and teacher that are stored in fewer than 16 bits
            a weight, and in how many, from 4 to 8, e.g. {dynamics: 8}; the error that this makes is
            written into the provenance.
        starts: recorded moments that episodes start from, at most 100,000, drawn evenly from all
            training frames.
        beginnings: how many of them are beginnings of episodes instead.
        start_frames: frames each of them brings along.
        start_margin: frames that a recorded episode must still go on for after a start.
        clip_frames: length of the held-out clip for ``nfd demo``.
        max_episode_steps: see ``WorldSpec``.
        display: see ``WorldSpec``.
        title: see ``WorldSpec``.
        description: see ``WorldSpec``.
        scores: see ``WorldSpec``.
        presentation: names and keys of actions, display aspect and frame rate, in place of those
            that the recordings say.
    """

    name: str
    folder: str
    recordings: str
    tokenizer: str
    dynamics: str
    heads: str
    configs: list[str] = field(default_factory=list)
    hazard_odds: float = 1.0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    modulation_rank: int = 0
    starts: int = 96
    beginnings: int = 24
    start_frames: int = 4
    start_margin: int = 16
    clip_frames: int = 740
    max_episode_steps: int = 0
    teacher: str = ""
    teacher_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=18))
    bits: dict[str, int] = field(default_factory=dict)
    display: str = DISPLAYS[0]
    title: str = ""
    description: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    presentation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the ranges and the names of networks."""
        some = "[1, inf)"
        check_ranges(self, clip_frames=some, start_frames=some, start_margin=some)
        check_ranges(self, starts="[1, 100000]")  # all of them are loaded with the world
        check_ranges(self, hazard_odds="(0, inf)", beginnings=f"[0, {self.starts}]")
        check_ranges(self, modulation_rank="[0, inf)", max_episode_steps="[0, inf)")
        if self.display not in DISPLAYS:
            raise ValueError(f"display must be {' or '.join(DISPLAYS)}, got {self.display!r}")
        others = set(self.presentation) - set(PRESENTATION)
        if others:
            raise ValueError(
                f"presentation knows {', '.join(PRESENTATION)}, got {sorted(others)[0]!r}"
            )
        told = {"env_id": self.name, **self.presentation}
        config.from_mapping(SourceConfig, told, "presentation", foreign=True)
        check_bits(self.bits)
        if "teacher" in self.bits and not self.teacher:
            raise ValueError("bits names the teacher, but there is none")


def check_bits(bits: Mapping[str, int]) -> None:
    """Raise ValueError unless ``bits`` is networks and the bits that their weights can have."""
    unknown = set(bits) - set(NETWORKS)
    if unknown:
        raise ValueError(f"bits knows {', '.join(NETWORKS)}, got {sorted(unknown)[0]!r}")
    for name, number in bits.items():
        if type(number) is not int or not FEWEST_BITS <= number <= MOST_BITS:
            raise ValueError(
                f"bits of {name} must be a whole number from {FEWEST_BITS} to {MOST_BITS}, "
                f"got {number!r}"
            )


def export(settings: ExportConfig) -> Path:
    """Write the world folder that ``settings`` describes, all or nothing; returns it.

    Raises:
        CheckpointError: when a stage has not been finished, or its weights were not made from the
            other stages' or from such recordings.
        FolderInUseError: when another process is writing the same world.
        RecordingError: when the recordings are missing or their episodes too short for a start.
    """
    folder = Path(settings.folder).expanduser().resolve()
    with owned_world(folder):  # what is in the way is said before the work begins
        pass
    paths = {
        name: Path(getattr(settings, name)).expanduser() / "model.safetensors"
        for name in NETWORKS
        if getattr(settings, name)
    }
    tokenizer = load_weights(paths["tokenizer"], Tokenizer, TokenizerConfig)
    dynamics = load_weights(paths["dynamics"], Dynamics, DynamicsConfig)
    heads = load_weights(paths["heads"], Heads, HeadsConfig)
    with torch.no_grad():
        heads.output.bias[0] += math.log(settings.hazard_odds)
    teacher = None
    if settings.teacher:
        teacher = load_weights(paths["teacher"], Dynamics, DynamicsConfig)
    origins = {n: found for n, path in paths.items() if (found := read_origin(path)) is not None}
    recordings = RecordedDataset(settings.recordings)
    told = recordings.spec
    size = list(told.frame_shape[:2])
    spec = world_spec(settings, size, told.fps, told.action_space, told.source)
    # Before the starts are encoded: parts that do not belong together are refused at once.
    check_fit(folder, spec, tokenizer, dynamics, heads, teacher)
    check_origins(folder, spec, origins, paths)
    _check_recordings(recordings, origins)
    space = space_from_dict(recordings.spec.action_space)
    space.seed(0)
    codec = ActionCodec(space)
    provenance = _provenance(settings, recordings) | {"hazard_odds": settings.hazard_odds}
    if settings.modulation_rank:
        examples = torch.from_numpy(np.stack([np.asarray(space.sample()) for _ in range(64)]))
        encoded = torch.cat((codec.encode(examples), torch.zeros(1, codec.width)))
        ranks: dict[str, Any] = {"rank": settings.modulation_rank}
        dynamics, ranks["relative_error"] = with_low_rank(
            dynamics, encoded, settings.modulation_rank
        )
        if teacher is not None:
            teacher, ranks["teacher_relative_error"] = with_low_rank(
                teacher, encoded, settings.modulation_rank
            )
        provenance["modulation_rank"] = ranks
    starts = [
        _start(tokenizer, codec, episode, first, settings.start_frames)
        for episode, first in _moments(recordings.split("train"), settings)
    ]
    networks = {"tokenizer": tokenizer, "dynamics": dynamics, "heads": heads, "teacher": teacher}
    rounded, errors = round_networks(networks, settings.bits, starts)
    if settings.bits:
        provenance["bits"] = errors
    return save_world(
        folder,
        spec,
        tokenizer,
        dynamics,
        heads,
        starts,
        provenance,
        teacher,
        rounded,
        origins,
        _clip(recordings, settings.clip_frames),
    )


def world_spec(
    settings: ExportConfig,
    frame_size: list[int],
    fps: float,
    action_space: dict[str, Any],
    source: Mapping[str, Any] | None = None,
) -> WorldSpec:
    """What the world will say of itself.

    Args:
        settings: of the stage.
        frame_size: [H, W] of what was recorded.
        fps: frames a second at which it was.
        action_space: see ``space_to_dict``.
        source: plain values of the ``SourceConfig`` it is of; None to check only what
            ``settings`` say.

    Raises:
        ValueError: when no world could say so.
    """
    spec = WorldSpec(
        name=settings.name,
        frame_size=frame_size,
        fps=settings.presentation.get("fps") or fps,
        action_space=action_space,
        source=config.from_mapping(
            SourceConfig,
            {**(source or {"env_id": settings.name}), **settings.presentation},
            "source",
            foreign=True,
        ),
        sampling=settings.sampling,
        teacher=settings.teacher_sampling if settings.teacher else None,
        max_episode_steps=settings.max_episode_steps,
        display=settings.display,
        title=settings.title,
        description=settings.description,
        recordings=settings.recordings,
        scores=settings.scores,
    )
    space = space_from_dict(action_space)
    check_controls(space, spec.source.action_names, spec.source.keys)
    return spec


def _check_recordings(recordings: RecordedDataset, origins: Mapping[str, Origin]) -> None:
    """Refuse networks that were trained on frames or actions of another kind."""
    mine = recordings.spec.fingerprint
    for name, origin in origins.items():
        if origin.made_from.get("recordings", mine) != mine:
            raise CheckpointError(
                f"the {name} was trained on recordings of other frames or actions than those in "
                f"{recordings.folder}"
            )


def _moments(
    episodes: Sequence[EpisodeReference], settings: ExportConfig
) -> list[tuple[EpisodeReference, int]]:
    """Where the starts lie: episodes and the number of each start's first frame."""
    # Places for the first frame, so that margin frames follow the last one.
    window = settings.start_frames + settings.start_margin
    usable = [e for e in episodes if len(e) + 1 >= window]
    if not usable:
        raise RecordingError(
            f"no training episode has {window} frames, as start_frames and start_margin ask for"
        )
    rng = np.random.default_rng(0)
    order = rng.permutation(len(usable))
    beginnings = [(usable[i], 0) for i in np.resize(order, settings.beginnings)]
    everywhere = Places((len(e) + 1 for e in usable), window)
    places = np.sort(rng.choice(len(everywhere), settings.starts - len(beginnings)))
    found = (everywhere.find(place) for place in places)
    return beginnings + [(usable[number], first) for number, first in found]


@torch.inference_mode()
def round_networks(
    networks: Mapping[str, Any], bits: Mapping[str, int], starts: Sequence[Context]
) -> tuple[dict[str, Rounded], dict[str, dict[str, float]]]:
    """Round those of ``networks`` that ``bits`` names, so that they do well with ``starts``.

    Returns:
        Their weights in few bits. And for each the bits, and relative errors (root mean square) of
        its weights and of what it makes of the last starts, which were not used in rounding where
        there are enough: the velocity of frames at all levels, the decoded picture, or the heads'
        logits.
    """

    def relative(made: Tensor, true: Tensor) -> float:
        return float((made - true).norm() / true.norm())

    def flat(state: nn.Module) -> Tensor:
        return torch.cat([p.flatten() for p in state.parameters()])

    latents = torch.stack([s.latents for s in starts]).float()
    actions = torch.stack([s.actions for s in starts]).float()
    generator = torch.Generator().manual_seed(0)
    levels = torch.rand(latents.shape[:2], generator=generator)
    levels[::3] = 1.0  # which every frame is begun from
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, levels[..., None, None, None])

    def output(network: Any, which: slice) -> Tensor:
        if isinstance(network, Dynamics):
            return network(noisy[which], levels[which], actions[which])
        if isinstance(network, Tokenizer):
            return network.decode(latents[which].flatten(0, 1))
        state = network.initial_state(len(latents[which]))
        return network(latents[which], actions[which], state)[0]

    held_out = slice(-_HELD_OUT, None)
    seen = slice(0, -_HELD_OUT if len(starts) >= 2 * _HELD_OUT else None)
    rounded, errors = {}, {}
    for name, number in bits.items():
        network = networks[name]
        rounded[name] = round_weights(network, number, lambda network: output(network, seen))
        made = rounded[name].applied(network)
        errors[name] = {
            "bits": number,
            "weights": relative(flat(made), flat(network)),
            "output": relative(output(made, held_out), output(network, held_out)),
        }
    return rounded, errors


@torch.inference_mode()
def _start(
    tokenizer: Tokenizer, codec: ActionCodec, episode: EpisodeReference, first: int, frames: int
) -> Context:
    stop = first + frames
    latents = tokenizer.encode_frames(torch.from_numpy(episode.frames[first:stop].copy()))
    return Context(latents, encoded_into(episode, codec, first, frames), first == 0)


def _clip(recordings: RecordedDataset, frames: int) -> Clip:
    """A held-out episode, the longest but for ``frames``, with its actions."""
    held_out = recordings.split("validation")
    if not len(held_out):
        raise RecordingError(
            f"{recordings.folder} has no held-out episode: record more, or lower validation_every"
        )
    episode = max(held_out, key=lambda e: min(len(e), frames))
    count = min(len(episode), frames)
    return Clip(episode.frames[: count + 1], episode.actions[:count])


def _provenance(settings: ExportConfig, recordings: RecordedDataset) -> dict[str, Any]:
    policies: dict[str, dict[str, float]] = {}
    for episode in recordings:
        whose = f"{episode.split} {kind_of(episode.policy)}"
        row = policies.setdefault(whose, {"episodes": 0, "frames": 0, "return": 0.0})
        row["episodes"] += 1
        row["frames"] += len(episode) + 1
        row["return"] += episode.total_reward
    for row in policies.values():
        row["mean_return"] = round(row.pop("return") / row["episodes"], 1)
    stages = {}
    for stage in NETWORKS:
        if not getattr(settings, stage):
            continue
        path = Path(getattr(settings, stage)).expanduser() / "state.pt"
        if not found_file(path, CheckpointError):
            raise CheckpointError(f"{path}: missing, so nothing is known of this stage's training")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            weights = state.get("kept") or {"step": state["step"], "metrics": state["metrics"]}
            stages[stage] = {
                "steps": state["step"],
                "weights_of_step": weights["step"],
                "wall_seconds": round(state["elapsed"]),
                "validation": {k: round(float(v), 5) for k, v in weights["metrics"].items()},
            }
        except Exception as error:  # torch names no type for what a damaged file makes it raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(f"{path}: damaged, or of another program: {reason}") from None
    return {
        "made": time.strftime("%Y-%m-%d"),
        "nfd_env": __version__,
        "torch": str(torch.__version__),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "recordings": {
            "source": recordings.spec.source,
            "frames": recordings.frame_count,
            "episodes": len(recordings),
            "policies": policies,
        },
        "stages": stages,
        "configs": {Path(path).name: config.read(path) for path in settings.configs},
    }
