"""A world on disk.

A world is a folder::

    world.yaml               what it is: spaces, frame rate, source, sampling
    tokenizer.safetensors    the networks, each with its config and origin in the header
    dynamics.safetensors
    teacher.safetensors      optional: the flow model that the dynamics was distilled from
    heads.safetensors
    starts.safetensors       latents and actions of recorded moments that episodes start from
    clip.mp4                 optional: a held-out recording to play along with ...
    clip.safetensors         ... and its actions
    provenance.yaml          data, commands, seeds, wall time and metrics behind the weights
    ASSET_LICENSES.md        optional, written by hand: licences of the game's art
    checksums.json           SHA-256 of each of them
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from nfd_env import config
from nfd_env.files import Ownership, make_folder
from nfd_env.inference.sampling import CONSISTENCY, SamplingConfig
from nfd_env.inference.state import Context
from nfd_env.models.dynamics import Dynamics
from nfd_env.models.heads import Heads
from nfd_env.models.rounding import Rounded
from nfd_env.models.tokenizer import Tokenizer
from nfd_env.models.weights import (
    CheckpointError,
    Origin,
    fingerprint_network,
    save_weights,
)
from nfd_env.sources.source import SourceConfig
from nfd_env.sources.spec import check_fps
from nfd_env.spaces import ActionCodec, check_described, space_from_dict
from nfd_env.worlds.checksums import verify, write_checksums
from nfd_env.worlds.clip import Clip, save_clip
from nfd_env.worlds.starts import save_starts

FORMAT = 1
AGENTS = "agents"  # sub-folder of agents that were trained in the world
NETWORKS = ("tokenizer", "dynamics", "heads", "teacher")
DISPLAYS = ("smooth", "pixelated")

_LARGEST_FRAME = 4096  # pixels a side
_MOST_STEPS = 1000  # of sampling: a frame would take minutes
_LONGEST_NAME = 100
_LONGEST_WINDOW = 4096  # frames: the keys and values of more would fill any memory
_BRIEFLY = 0.5  # seconds; a reader that puts back what a killed writer left owns the world so long
# What a file that has lost its end would lack; everything else has a default.
_REQUIRED = ("name", "frame_size", "fps", "action_space", "source", "sampling", "format")
_SAMPLING = ("steps", "sampler", "shift", "history_level", "temperature")


@config.config_class
class WorldSpec:
    """What ``world.yaml`` says.

    Attributes:
        name: the world's name.
        frame_size: [H, W] of a frame in pixels.
        fps: native frames a second.
        action_space: see ``nfd_env.spaces.space_to_dict``.
        source: the real environment that was recorded.
        sampling: the default sampling.
        teacher: the teacher's sampling, where the world was distilled.
        max_episode_steps: frames (the real environment's steps) after which episodes are truncated;
            0 for never. An env with a ``frame_skip`` gets there in fewer steps of its own.
        display: how a small frame is enlarged for a person: "smooth" or "pixelated".
        title: for people; "" for the name.
        description: for people, a few sentences.
        recordings: data-set folder that the world was made from, on its maker's machine; "" for
            unknown.
        scores: who played -> mean return of an episode of the real game.
        format: version of the folder's layout.
    """

    name: str
    frame_size: list[int]
    fps: float
    action_space: dict[str, Any]
    source: SourceConfig
    sampling: SamplingConfig
    teacher: SamplingConfig | None = None
    max_episode_steps: int = 0
    display: str = DISPLAYS[0]
    title: str = ""
    description: str = ""
    recordings: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 < len(self.name) <= _LONGEST_NAME and self.name.isprintable()):
            raise ValueError(f"name must have 1 to {_LONGEST_NAME} printable characters")
        if set("/\\") & set(self.name) or self.name in (".", ".."):
            raise ValueError(f"name must not look like a path, got {self.name!r}")
        sides = self.frame_size
        if len(sides) != 2 or not all(1 <= side <= _LARGEST_FRAME for side in sides):
            raise ValueError(
                f"frame_size must be [height, width] from 1 to {_LARGEST_FRAME}, got {sides}"
            )
        check_fps("fps", self.fps)
        actions, names = self.action_space.get("n"), self.source.action_names
        # Other spaces have names for parts of an action.
        if self.action_space.get("type") == "Discrete" and len(names) > int(actions or 0):
            raise ValueError(f"there are {len(names)} action_names for {actions} actions")
        if self.max_episode_steps < 0:
            raise ValueError(f"max_episode_steps must be at least 0, got {self.max_episode_steps}")
        if self.display not in DISPLAYS:
            raise ValueError(f"display must be {' or '.join(DISPLAYS)}, got {self.display!r}")
        for key, sampling in (("sampling", self.sampling), ("teacher", self.teacher)):
            if sampling is not None and sampling.steps > _MOST_STEPS:
                raise ValueError(f"{key}.steps must be at most {_MOST_STEPS}, got {sampling.steps}")
        check_described(self.action_space)

    @property
    def dynamics(self) -> str:
        """What the world's own dynamics is: "student" or "flow"."""
        return "student" if self.sampling.sampler == CONSISTENCY else "flow"


def read_spec(folder: Path) -> WorldSpec:
    """``world.yaml`` of a world folder.

    Raises:
        CheckpointError: when it is damaged, incomplete or of a newer format.
    """
    verify(folder, "world.yaml")
    path = folder / "world.yaml"
    try:
        values = config.read(path)
        if values.get("format", FORMAT) != FORMAT:
            raise CheckpointError(
                f"{folder}: world format {values['format']}, this nfd_env reads format {FORMAT}"
            )
        parts: list[tuple[str, Any, Sequence[str]]] = [("", values, _REQUIRED)]
        parts += [(f"{k}.", values.get(k), _SAMPLING) for k in ("sampling", "teacher")]
        missing = [
            prefix + key
            for prefix, part, keys in parts
            if isinstance(part, dict)
            for key in keys
            if key not in part
        ]
        if missing:
            raise config.ConfigError(f"{path}: incomplete: it lacks {', '.join(missing)}")
        return config.from_mapping(WorldSpec, values, str(path), foreign=True)
    except config.ConfigError as error:
        raise CheckpointError(str(error)) from None


def save_world(
    folder: str | os.PathLike[str],
    spec: WorldSpec,
    tokenizer: Tokenizer,
    dynamics: Dynamics,
    heads: Heads,
    starts: Sequence[Context],
    provenance: Mapping[str, Any],
    teacher: Dynamics | None = None,
    rounded: Mapping[str, Rounded] | None = None,
    origins: Mapping[str, Origin] | None = None,
    clip: Clip | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write a world folder, all or nothing, with fp16 weights.

    At every moment the folder, or ".<name>.replaced" beside it, which the next load or save puts
    back, is a whole world.

    Args:
        folder: replaced when it already holds a world.
        spec: what it is.
        tokenizer: encodes and decodes frames.
        dynamics: draws frames.
        heads: reward and termination.
        starts: contexts of equal length.
        provenance: plain values: data, commands, seeds, wall times, metrics.
        teacher: the flow model behind a distilled ``dynamics``; goes with ``spec.teacher``.
        rounded: of the networks that are stored in fewer than 16 bits a weight.
        origins: where each network comes from, see ``nfd_env.models.weights.read_origin``; None
            for networks that were not trained, or not from files.
        clip: a held-out recording.
        beside: writes what else is to lie in the folder that it is given; None keeps the agents
            and licences that the replaced world had.

    Returns:
        The folder.

    Raises:
        CheckpointError: when the parts do not belong together, or the folder holds something else.
        FolderInUseError: when another process is writing the same world.
    """
    folder = Path(folder).expanduser().resolve()  # what a link leads to is replaced, not the link
    networks: dict[str, nn.Module] = {
        "tokenizer": tokenizer,
        "dynamics": dynamics,
        "heads": heads,
        **({"teacher": teacher} if teacher is not None else {}),
    }
    if (teacher is None) != (spec.teacher is None):
        raise CheckpointError(f"{folder}: a teacher and its sampling go together")
    if not starts:
        raise CheckpointError(f"{folder}: a world needs starts")
    check_fit(folder, spec, tokenizer, dynamics, heads, teacher)
    if origins is None:
        origins = _made_together(spec, networks)
    check_origins(folder, spec, origins, networks)
    with owned_world(folder, _BRIEFLY):
        temporary, replaced = _temporary(folder), _replaced(folder)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name, network in networks.items():
                save_weights(
                    temporary / f"{name}.safetensors",
                    network,
                    network.config,
                    torch.float16,
                    (rounded or {}).get(name),
                    **vars(origins[name]),
                )
            save_starts(temporary / "starts.safetensors", starts)
            if clip is not None:
                save_clip(temporary, clip, spec.fps)
            for name, values in (("world", config.to_dict(spec)), ("provenance", provenance)):
                text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
                (temporary / f"{name}.yaml").write_text(text, encoding="utf-8")
            (beside or partial(_keep, folder))(temporary)
            write_checksums(temporary)
            read_spec(temporary)  # what cannot be read must not replace what can
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(temporary, folder)
        finally:
            _put_back(folder)
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _keep(folder: Path, temporary: Path) -> None:
    """Take over what the world of ``folder`` has that is not written with it."""
    if (folder / AGENTS).is_dir():  # they know which world they fit, and are refused else
        shutil.copytree(folder / AGENTS, temporary / AGENTS)
    for path in folder.glob("*LICENSE*"):  # of the game's art, written by hand
        if path.is_file():
            shutil.copy(path, temporary)


@contextmanager
def owned_world(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Own the world ``folder`` for writing, and end what a killed owner has left.

    Args:
        folder: of a world, or of none yet.
        wait: seconds to wait for another owner to end.

    Raises:
        CheckpointError: when something else is in the way.
        FolderInUseError: when another process owns it.
        FolderError: when there cannot be written.
    """
    ownership = Ownership(make_folder(folder.parent), folder.name, wait)
    try:
        _put_back(folder)
        if folder.is_dir() and not (folder / "world.yaml").exists() and any(folder.iterdir()):
            raise CheckpointError(f"{folder} is in the way: it is not empty and holds no world")
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is in the way: it is a file")
        yield
    finally:
        ownership.release()


def _put_back(folder: Path) -> None:
    """End what a ``save_world`` that was killed, or failed, has left."""
    replaced, temporary = _replaced(folder), _temporary(folder)
    if not replaced.is_dir():
        return
    if not folder.exists():
        os.replace(replaced, folder)
    else:
        # By another name first: what is called "replaced" is always whole.
        shutil.rmtree(temporary, ignore_errors=True)
        os.replace(replaced, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def was_replaced(folder: Path) -> bool:
    """Whether the world of ``folder`` lies in ".<name>.replaced" only, see ``save_world``."""
    return bool(folder.name) and not folder.exists() and _replaced(folder).is_dir()


def check_fit(
    folder: Path,
    spec: WorldSpec,
    tokenizer: Tokenizer,
    dynamics: Dynamics,
    heads: Heads,
    teacher: Dynamics | None = None,
) -> None:
    """Refuse networks whose sizes differ.

    Raises:
        CheckpointError: naming ``folder``.
    """
    factor = tokenizer.config.downsampling
    height, width = spec.frame_size
    shape = (tokenizer.config.latent_channels, height // factor, width // factor)
    if (
        height % factor
        or width % factor
        or dynamics.config.latent_shape != shape
        or heads.config.latent_size != math.prod(shape)
    ):
        raise CheckpointError(f"{folder}: tokenizer, dynamics and heads do not fit together")
    if any(d is not None and d.config.window > _LONGEST_WINDOW for d in (dynamics, teacher)):
        raise CheckpointError(f"{folder}: a window of more than {_LONGEST_WINDOW} frames")
    actions = ActionCodec(space_from_dict(spec.action_space)).width
    if dynamics.config.action_width != actions or heads.config.action_width != actions:
        raise CheckpointError(f"{folder}: the networks were trained for another action space")
    if teacher is not None and (
        teacher.config.latent_shape != shape or teacher.config.action_width != actions
    ):
        raise CheckpointError(f"{folder}: teacher and student do not fit together")


def check_origins(
    folder: Path, spec: WorldSpec, origins: Mapping[str, Origin], names: Collection[str]
) -> None:
    """Refuse networks that were not made from each other.

    Args:
        folder: named in the errors.
        spec: what the world is.
        origins: of the networks, by their names.
        names: of the networks whose origin must be there.

    Raises:
        CheckpointError: naming the parts that do not belong together.
    """
    for name in names:
        if name not in origins:
            raise CheckpointError(
                f"{folder}: the weights of the {name} do not say what they were made from; train "
                "that stage again with this version"
            )
        if origins[name].kind != kind_of(name, spec):
            raise CheckpointError(
                f"{folder}: the {name} must be a {kind_of(name, spec)} to be sampled by "
                f"{spec.sampling.sampler}, got a {origins[name].kind}"
            )
    wanted = [(name, "tokenizer") for name in ("dynamics", "heads", "teacher")]
    if spec.dynamics == "student":
        wanted.append(("dynamics", "teacher"))
    for name, source in wanted:
        if name in names and source in names:
            made_from = origins[name].made_from.get(source)
            if made_from != origins[source].fingerprint:
                raise CheckpointError(
                    f"{folder}: the {name} was not made with this {source}; train that stage again"
                )
    games = {name: origins[name].made_from.get("recordings") for name in names}
    known = {game for game in games.values() if game}
    if len(known) > 1:
        raise CheckpointError(
            f"{folder}: {', '.join(games)} were made from recordings of different frames or actions"
        )


def _made_together(spec: WorldSpec, networks: Mapping[str, nn.Module]) -> dict[str, Origin]:
    prints = {name: fingerprint_network(network) for name, network in networks.items()}
    inputs = {k: v for k, v in prints.items() if k in ("tokenizer", "teacher")}
    return {name: Origin(kind_of(name, spec), own, inputs) for name, own in prints.items()}


def kind_of(name: str, spec: WorldSpec) -> str:
    """The kind of weights that the network ``name`` of a world has."""
    return {"dynamics": spec.dynamics, "teacher": "flow"}.get(name, name)


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.writing")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
