"""A world on disk, and how it is found and loaded.

A world is a folder::

    world.yaml               what it is: spaces, frame rate, source, sampling
    tokenizer.safetensors    the networks, each with its config in the header
    dynamics.safetensors
    teacher.safetensors      optional: the flow model that the dynamics was distilled from
    heads.safetensors
    starts.safetensors       latents and actions of recorded moments that episodes start from
    provenance.yaml          data, commands, seeds, wall time and metrics behind the weights
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import torch
import yaml
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nfd_env import config
from nfd_env.devices import resolve_device
from nfd_env.inference.world_model import CONSISTENCY, Context, SamplingConfig, WorldModel
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.packing import keep_freed_memory, pack_convolutions, pack_linears
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, load_weights, save_weights
from nfd_env.precision import fastest_precision
from nfd_env.sources.source import SourceConfig, make_source
from nfd_env.spaces import ActionCodec, space_from_dict

SHIPPED = Path(__file__).parent
FORMAT = 1


class UnknownWorldError(CheckpointError):
    """There is no such world."""


@dataclass(frozen=True)
class WorldSpec:
    """What ``world.yaml`` says.

    Attributes:
        name: the world's name.
        frame_size: [H, W] of a frame in pixels.
        fps: native frames a second.
        action_space: see ``nfd_env.spaces.space_to_dict``.
        source: the real environment that was recorded.
        sampling: the default sampling.
        teacher: the teacher's sampling, where the folder holds one.
        max_episode_steps: episodes are truncated there; 0 for never.
        format: version of the folder's layout.
    """

    name: str
    frame_size: list[int]
    fps: float
    action_space: dict[str, Any]
    source: SourceConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    teacher: SamplingConfig | None = None
    max_episode_steps: int = 0
    format: int = FORMAT


@dataclass(frozen=True)
class World:
    """A loaded world.

    Attributes:
        folder: where it was loaded from.
        spec: what it is.
        model: its networks.
        action_space: of one environment.
        codec: checks and encodes actions.
        starts: the recorded moments that episodes start from.
        dynamics: which dynamics ``model`` has: "student", the distilled one; "teacher", the flow
            model it was distilled from; "flow" in a world that has no other.
    """

    folder: Path
    spec: WorldSpec
    model: WorldModel
    action_space: spaces.Space
    codec: ActionCodec
    starts: list[Context]
    dynamics: str


def shipped_worlds() -> list[str]:
    """Names of the worlds that come with the package."""
    return sorted(p.parent.name for p in SHIPPED.glob("*/world.yaml"))


def find_world(world: str | os.PathLike[str]) -> Path:
    """The folder of a world given by path or by shipped name.

    Raises:
        UnknownWorldError: naming the shipped worlds.
    """
    path = Path(world)
    if (path / "world.yaml").is_file():
        return path
    shipped = SHIPPED / _folder_name(str(world))
    if (shipped / "world.yaml").is_file():
        return shipped
    if path.is_dir():
        raise UnknownWorldError(f"{path} is no world folder: it has no world.yaml")
    raise UnknownWorldError(
        f"unknown world {str(world)!r}: neither a folder nor a shipped world "
        f"({', '.join(shipped_worlds()) or 'none are shipped'})"
    )


def load_world(
    world: str | os.PathLike[str],
    device: str | torch.device = "auto",
    precision: str = "auto",
    dynamics: str | None = None,
) -> World:
    """Load a world; loading the same one again in a process returns the same weights.

    Args:
        world: a world folder, or the name of a shipped world.
        device: see ``nfd_env.devices.resolve_device``.
        precision: "fp32", "bf16", or "auto": bf16 where this machine multiplies bf16 matrices at
            least twice as fast. Weights, activations and the cache are kept in it; latents and the
            heads stay fp32.
        dynamics: "student", "teacher" (with its own sampling, loaded when it is first asked for),
            or "flow", see ``World``; None for the world's default.

    Raises:
        UnknownWorldError: when there is no such world.
        ValueError: on an unknown precision or dynamics, or one that the world does not have.
        CheckpointError: when a file is missing, damaged or does not belong to the others.
        DeviceError: when the device is not there.
    """
    folder = find_world(world).resolve()
    changed = tuple(sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir()))
    resolved = resolve_device(device)
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers alone
        if precision == "auto":
            precision = fastest_precision(resolved, advantage=2.0)
        loaded = _load(folder, changed, resolved, precision)
        default = loaded.world
        if dynamics in (None, default.dynamics):
            return default
        has = [default.dynamics, *(["teacher"] if default.spec.teacher else [])]
        if dynamics not in has:
            raise ValueError(
                f"dynamics={dynamics!r} was asked for, {default.spec.name} has: {', '.join(has)}"
            )
        return loaded.teacher


class _Loaded:
    """A world with its default dynamics, and with its teacher once that is asked for."""

    def __init__(self, world: World, device: torch.device, precision: str) -> None:
        self.world, self._device, self._precision = world, device, precision

    @functools.cached_property
    def teacher(self) -> World:
        """The same world, sharing all but the dynamics."""
        world = self.world
        path = world.folder / "teacher.safetensors"
        dynamics = load_weights(path, Dynamics, DynamicsConfig)
        mine, other = (
            (c.latent_shape, c.action_width) for c in (dynamics.config, world.model.dynamics.config)
        )
        if mine != other:
            raise CheckpointError(f"{world.folder}: teacher and student do not fit together")
        _prepare(dynamics, self._device, self._precision)
        assert world.spec.teacher is not None
        model = WorldModel(world.model.tokenizer, dynamics, world.model.heads, world.spec.teacher)
        return replace(world, model=model, dynamics="teacher")


@functools.lru_cache(maxsize=8)
def _load(
    folder: Path, changed: tuple[tuple[str, int], ...], device: torch.device, precision: str
) -> _Loaded:
    spec = read_spec(folder)
    tokenizer = load_weights(folder / "tokenizer.safetensors", Tokenizer, TokenizerConfig)
    dynamics = load_weights(folder / "dynamics.safetensors", Dynamics, DynamicsConfig)
    heads = load_weights(folder / "heads.safetensors", Heads, HeadsConfig)
    space = space_from_dict(spec.action_space)
    codec = ActionCodec(space)
    shape = dynamics.config.latent_shape
    factor = tokenizer.config.downsampling
    expected = (
        tokenizer.config.latent_channels,
        spec.frame_size[0] // factor,
        spec.frame_size[1] // factor,
    )
    latent_size = shape[0] * shape[1] * shape[2]
    if shape != expected or heads.config.latent_size != latent_size:
        raise CheckpointError(f"{folder}: tokenizer, dynamics and heads do not fit together")
    if dynamics.config.action_width != codec.width or heads.config.action_width != codec.width:
        raise CheckpointError(f"{folder}: the networks were trained for another action space")
    for network in (tokenizer, heads):
        network.to(device).requires_grad_(False)
    if precision == "bf16":
        tokenizer.to(torch.bfloat16)
    pack_convolutions(tokenizer)
    if device.type == "cpu":
        keep_freed_memory()
    _prepare(dynamics, device, precision)
    model = WorldModel(tokenizer, dynamics, heads, spec.sampling)
    starts = [
        replace(start, latents=start.latents.float(), actions=start.actions.float())
        for start in load_starts(folder / "starts.safetensors", shape, codec.width)
    ]
    kind = "student" if spec.sampling.sampler == CONSISTENCY else "flow"
    world = World(folder, spec, model, space, codec, starts, kind)
    return _Loaded(world, device, precision)


def _prepare(dynamics: Dynamics, device: torch.device, precision: str) -> None:
    """Make ready for inference."""
    dynamics.to(device).requires_grad_(False)
    dynamics.fold_norms()
    if precision == "bf16":
        dynamics.to(torch.bfloat16)
    pack_linears(dynamics.modulation, rows=2)
    pack_linears(dynamics, rows=2 * dynamics.config.tokens)


def read_spec(folder: Path) -> WorldSpec:
    """``world.yaml`` of a world folder.

    Raises:
        CheckpointError: when it is damaged or of a newer format.
    """
    try:
        spec = config.load(WorldSpec, folder / "world.yaml")
    except config.ConfigError as error:
        raise CheckpointError(str(error)) from None
    if spec.format != FORMAT:
        raise CheckpointError(
            f"{folder}: world format {spec.format}, this nfd_env reads format {FORMAT}"
        )
    return spec


def make_real(world: str | os.PathLike[str], **kwargs: Any) -> gymnasium.Env:
    """The real game behind a world, with the world's observations, actions and frame rate.

    Args:
        world: a world folder, or the name of a shipped world.
        kwargs: further arguments of the real environment.

    Raises:
        UnknownWorldError: when there is no such world.
        SourceError: when the real game is not installed; says what to install.
    """
    return make_source(read_spec(find_world(world)).source, **kwargs)


def load_starts(path: str | os.PathLike[str], shape: tuple[int, ...], width: int) -> list[Context]:
    """The recorded moments in a file of ``save_starts``, such as a world's starts.safetensors.

    Args:
        path: the file.
        shape: (C, h, w) of a latent of the world that is to start from them.
        width: of its encoded actions.

    Returns:
        Contexts as they are stored, in half precision.

    Raises:
        CheckpointError: when the file is missing, damaged or of another world.
    """
    try:
        tensors = load_file(path)
        latents, actions = tensors["latents"], tensors["actions"]
        # Worlds written before there was a choice start at beginnings only.
        beginning = tensors.get("beginning", torch.ones(len(latents))).bool().tolist()
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})") from None
    fits = latents.shape[2:] == shape and actions.shape == (*latents.shape[:2], width)
    if not (fits and len(latents) == len(beginning) and latents.numel()):
        raise CheckpointError(f"{path}: holds start frames of another world")
    return [Context(*start) for start in zip(latents, actions, beginning, strict=True)]


def save_starts(path: str | os.PathLike[str], starts: list[Context]) -> None:
    """Write contexts of equal length for ``load_starts``, in half precision."""
    save_file(
        {
            "latents": torch.stack([s.latents for s in starts]).half().contiguous(),
            "actions": torch.stack([s.actions for s in starts]).half().contiguous(),
            "beginning": torch.tensor([s.beginning for s in starts], dtype=torch.uint8),
        },
        path,
    )


def save_world(
    folder: str | Path,
    spec: WorldSpec,
    tokenizer: Tokenizer,
    dynamics: Dynamics,
    heads: Heads,
    starts: list[Context],
    provenance: Mapping[str, Any],
    teacher: Dynamics | None = None,
    int8: Collection[str] = (),
) -> None:
    """Write a world folder, all or nothing, with fp16 weights.

    Args:
        folder: replaced when it already holds a world.
        spec: what it is.
        tokenizer: encodes and decodes frames.
        dynamics: draws frames.
        heads: reward and termination.
        starts: contexts of equal length.
        provenance: plain values: data, commands, seeds, wall times, metrics.
        teacher: the flow model behind a distilled ``dynamics``; goes with ``spec.teacher``.
        int8: names of the networks that are stored in one byte a weight instead of two.
    """
    assert (teacher is None) == (spec.teacher is None), "a teacher and its sampling go together"
    folder = Path(folder)
    if folder.is_dir() and not (folder / "world.yaml").exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is in the way: it is not empty and holds no world")
    temporary = folder.with_name(f".{folder.name}.writing")
    replaced = folder.with_name(f".{folder.name}.replaced")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    networks = {"tokenizer": tokenizer, "dynamics": dynamics, "heads": heads, "teacher": teacher}
    for name, network in networks.items():
        if network is not None:
            path = temporary / f"{name}.safetensors"
            save_weights(path, network, network.config, torch.float16, name in int8)
    save_starts(temporary / "starts.safetensors", starts)
    for name, values in (("world", config.to_dict(spec)), ("provenance", dict(provenance))):
        (temporary / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _folder_name(name: str) -> str:
    """Turn "DoomTakeCover" into "doom_take_cover"; folder names stay as they are."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
