"""Worlds found and loaded, once a process."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium import spaces

from nfd_env.devices import resolve_device
from nfd_env.files import FolderError, found_file
from nfd_env.inference.packing import keep_freed_memory, pack_convolutions, pack_linears
from nfd_env.inference.state import Context
from nfd_env.inference.world_model import WorldModel
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, load_weights, neutral_torch, read_origin
from nfd_env.named import look_here
from nfd_env.precision import choose_precision
from nfd_env.sources.source import make_source
from nfd_env.spaces import ActionCodec, space_from_dict
from nfd_env.worlds.checksums import sha256, verify
from nfd_env.worlds.format import (
    WorldSpec,
    check_fit,
    check_origins,
    owned_world,
    read_spec,
    was_replaced,
)
from nfd_env.worlds.hub import fetched_world, is_address
from nfd_env.worlds.rivals import rival, rivals_of
from nfd_env.worlds.starts import load_starts
from nfd_env.worlds.trust import check_trusted

SHIPPED = Path(__file__).parent

_ID = re.compile(r"(?:nfd_env:)?NFD/(\w+)-v0")  # of the env of a shipped world

_MOST_LOADED = 8  # worlds kept in memory
_PATIENCE = 10.0  # seconds to wait for another process to put a world into its place
_NETWORKS = ("tokenizer", "dynamics", "heads")


class UnknownWorldError(CheckpointError):
    """There is no such world."""


@dataclass(frozen=True)
class World:
    """A loaded world. Nothing of it changes, so that copies within a process are the world itself.

    A pickle holds its folder and its fingerprint instead of its weights, see ``load_again``.

    Attributes:
        folder: where it was loaded from.
        spec: what it is.
        model: its networks.
        action_space: of one environment.
        codec: checks and encodes actions.
        starts: the recorded moments that episodes start from.
        dynamics: which dynamics ``model`` has: "student", the distilled one; "teacher", the flow
            model it was distilled from; "flow" in a world that has no other; or a rival, see
            ``nfd_env.worlds.rivals``.
        fingerprint: of its networks, the same for student and teacher, wherever the folder lies.
    """

    folder: Path
    spec: WorldSpec
    model: WorldModel
    action_space: spaces.Space
    codec: ActionCodec
    starts: list[Context]
    dynamics: str
    fingerprint: str

    @property
    def loaded(self) -> tuple[Any, ...]:
        """Arguments of ``load_again``."""
        model = self.model
        # As it was decided here: elsewhere "auto" could mean something else.
        how = str(model.device), model.precision, self.dynamics
        return self.folder, *how, self.fingerprint

    def __copy__(self) -> World:
        """See the class."""
        return self

    def __deepcopy__(self, memo: Any) -> World:
        """See the class."""
        return self

    def __reduce__(self) -> Any:
        """See the class; what ``dataclasses.replace`` has put into it goes along as it is."""
        there = load_again(*self.loaded)
        own = {n: v for n, v in vars(self).items() if v is not getattr(there, n)}
        own = {n: v for n, v in own.items() if n not in ("folder", "dynamics", "fingerprint")}
        return _unpickled, (own, *self.loaded)


def load_again(folder: Path, device: str, precision: str, dynamics: str, wanted: str) -> World:
    """The world that was loaded from ``folder`` before, perhaps by another process.

    Raises:
        CheckpointError: when another one lies there now; else see ``load_world``.
    """
    world = load_world(folder, device, precision, dynamics)
    if world.fingerprint != wanted:
        raise CheckpointError(
            f"{folder}: another world lies there than when this was copied or pickled, which "
            "keeps a world's folder and not its weights; make the env or world anew"
        )
    return world


def _unpickled(own: dict[str, Any], *loaded: Any) -> World:
    world = load_again(*loaded)
    return replace(world, **own) if own else world


def shipped_worlds() -> list[str]:
    """Names of the worlds that come with the package."""
    found = (path.parent.name for path in SHIPPED.glob("*/world.yaml"))
    return sorted(name for name in found if name[0] != ".")  # which is a save in the making


def find_world(world: str | os.PathLike[str]) -> Path:
    """The folder of a world given by path (``~`` too), shipped name or id, or ``hf://owner/name``.

    The folder of a run is that of the world which it has made.

    A world whose writer was killed in the middle of replacing it is put back first. One on the
    hub is fetched when it has not been yet.

    Raises:
        UnknownWorldError: naming the shipped worlds.
        HubError: when a world on the hub is not to be had.
        TypeError: when ``world`` is no text and no path.
    """
    text = os.fspath(world)
    if is_address(text):
        return fetched_world(text)
    path = Path(text).expanduser()
    try:
        while True:
            seen = _identity(path)
            if was_replaced(path):
                _recover(path)
            folder = path.is_dir()
            if folder and found_file(path / "world.yaml", UnknownWorldError):
                return path
            made = path / "world"
            if folder and (made.is_dir() or was_replaced(made)):
                return find_world(made)
            if seen == _identity(path):  # else another process has just replaced it
                break
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UnknownWorldError(f"unknown world {text!r}: {error.strerror}") from None
    known, env_id = shipped_worlds(), _ID.fullmatch(text)
    name = _folder_name(env_id[1] if env_id else text)
    if name in known:
        return SHIPPED / name
    if env_id and name == "world":
        raise UnknownWorldError(f"{text} is an env of any world: name the world or its folder here")
    if folder:
        raise UnknownWorldError(
            f"{path} is no world folder (it has no world.yaml), nor a run that has made a world"
        )
    raise UnknownWorldError(
        f"unknown world {text!r}: neither a folder nor a shipped world "
        f"({', '.join(known) or 'none are shipped'})"
    )


def load_world(
    world: str | os.PathLike[str],
    device: str | torch.device = "auto",
    precision: str = "auto",
    dynamics: str | None = None,
) -> World:
    """Load a world; loading the same one again in a process returns the same weights.

    Torch's random numbers and defaults are neither used nor changed. Any thread may load.

    Args:
        world: a world folder, the name of a shipped world, or ``hf://owner/name[@revision]``.
        device: see ``nfd_env.devices.resolve_device``.
        precision: "fp32", "bf16", or "auto", see ``choose_precision``. Weights, activations and the
            cache are kept in it; latents and the heads stay fp32.
        dynamics: "student", "teacher" (with its own sampling, loaded when it is first asked for),
            "flow", or a rival, see ``World``; None for the world's default.

    Raises:
        UnknownWorldError: when there is no such world.
        ValueError: on an unknown precision or dynamics, or one that the world does not have.
        CheckpointError: when a file is missing, damaged or does not belong to the others.
        DeviceError: when the device is not there.
    """
    resolved = resolve_device(device)
    precision = choose_precision(precision, resolved)
    while True:
        folder = find_world(world).resolve()
        files = None
        try:
            files = _files(folder)
            with neutral_torch():
                return _cached(folder, files, resolved, precision).with_dynamics(dynamics)
        except (CheckpointError, OSError):
            if _files(find_world(world).resolve()) == files:  # not replaced meanwhile
                raise


class _Loaded:
    """A world with its default dynamics, and with its teacher once that is asked for."""

    def __init__(self, world: World, device: torch.device, precision: str) -> None:
        self._world, self._device, self._precision = world, device, precision
        self._teacher: World | None = None
        self._rivals: dict[Any, World] = {}

    def with_dynamics(self, name: str | None) -> World:
        """See ``load_world``."""
        world = self._world
        if name in (None, world.dynamics):
            return world
        rivals = rivals_of(world.folder)
        has = [world.dynamics, *(["teacher"] if world.spec.teacher else []), *rivals]
        if name not in has:
            raise ValueError(
                f"dynamics={name!r} was asked for, {world.spec.name} has: {', '.join(has)}"
            )
        if name in rivals:
            # They may have been trained on since.
            stamps = ((file, *_stamp(file)) for file in rivals[name])
            key = name, *stamps
            if key not in self._rivals:
                model = rival(name).load(name, world, self._precision)
                self._rivals[key] = replace(world, model=model, dynamics=name)
            return self._rivals[key]
        if self._teacher is None:
            self._teacher = self._load_teacher()
        return self._teacher

    def _load_teacher(self) -> World:
        world, spec = self._world, self._world.spec
        path = world.folder / "teacher.safetensors"
        if not found_file(path, CheckpointError):
            raise CheckpointError(f"{path}: this copy of the world has no teacher")
        verify(world.folder, path.name)
        teacher = load_weights(path, Dynamics, DynamicsConfig)
        model = world.model
        check_fit(world.folder, spec, model.tokenizer, model.dynamics, model.heads, teacher)
        _check_origins(world.folder, spec, (*_NETWORKS, "teacher"))
        _prepare(teacher, self._device, self._precision)
        assert spec.teacher is not None
        taught = WorldModel(model.tokenizer, teacher, model.heads, spec.teacher)
        return replace(world, model=taught, dynamics="teacher")


# The last worlds that were loaded; ``neutral_torch`` lets one thread at a time in here.
_loaded: OrderedDict[tuple[Any, ...], _Loaded] = OrderedDict()


def _cached(
    folder: Path, files: Mapping[str, tuple[int, ...]], device: torch.device, precision: str
) -> _Loaded:
    # A teacher that comes or goes leaves the rest as it is.
    relevant = sorted((name, s) for name, s in files.items() if name != "teacher.safetensors")
    key = (folder, tuple(relevant), device, precision)
    if key not in _loaded:
        _loaded[key] = _load(folder, device, precision)
        if len(_loaded) > _MOST_LOADED:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    return _loaded[key]


def _load(folder: Path, device: torch.device, precision: str) -> _Loaded:
    spec = read_spec(folder)
    paths = {name: folder / f"{name}.safetensors" for name in (*_NETWORKS, "starts")}
    verify(folder, *(path.name for path in paths.values()))
    tokenizer = load_weights(paths["tokenizer"], Tokenizer, TokenizerConfig)
    dynamics = load_weights(paths["dynamics"], Dynamics, DynamicsConfig)
    heads = load_weights(paths["heads"], Heads, HeadsConfig)
    check_fit(folder, spec, tokenizer, dynamics, heads)
    _check_origins(folder, spec, _NETWORKS)
    space = space_from_dict(spec.action_space)
    codec = ActionCodec(space)
    starts = [
        replace(start, latents=start.latents.float(), actions=start.actions.float())
        for start in load_starts(paths["starts"], dynamics.config.latent_shape, codec.width)
    ]
    for network in (tokenizer, heads):
        network.to(device).requires_grad_(False)
    if precision == "bf16":
        tokenizer.to(torch.bfloat16)
    pack_convolutions(tokenizer)
    if device.type == "cpu":
        keep_freed_memory()
    _prepare(dynamics, device, precision)
    model = WorldModel(tokenizer, dynamics, heads, spec.sampling)
    sums = "".join(sha256(paths[name]) for name in _NETWORKS)
    fingerprint = hashlib.sha256(sums.encode()).hexdigest()
    world = World(folder, spec, model, space, codec, starts, spec.dynamics, fingerprint)
    return _Loaded(world, device, precision)


def _check_origins(folder: Path, spec: WorldSpec, names: tuple[str, ...]) -> None:
    """Compare the origins of those networks that say theirs: older versions kept none."""
    found = {name: read_origin(folder / f"{name}.safetensors") for name in names}
    origins = {name: origin for name, origin in found.items() if origin is not None}
    check_origins(folder, spec, origins, list(origins))


def _prepare(dynamics: Dynamics, device: torch.device, precision: str) -> None:
    """Make ready for inference."""
    dynamics.to(device).requires_grad_(False)
    dynamics.fold_norms()
    if precision == "bf16":
        dynamics.to(torch.bfloat16)
    pack_convolutions(dynamics, math.inf)
    pack_linears(dynamics.modulation, rows=2)
    pack_linears(dynamics, rows=2 * dynamics.config.tokens)


def make_real(
    world: str | os.PathLike[str], *, trust: bool = False, **kwargs: Any
) -> gymnasium.Env:
    """The real game behind a world, with the world's observations, actions and frame rate.

    Args:
        world: a world folder, the name of a shipped world, or ``hf://owner/name[@revision]``.
        trust: let the world import any module, and name files to its game. Without it, only
            packages of games that are known, and what this process has imported already.
        kwargs: further arguments of the real environment.

    Raises:
        UnknownWorldError: when there is no such world.
        UntrustedWorldError: when it needs ``trust``.
        SourceError: when the real game is not installed; says what to install.
    """
    folder = find_world(world)
    source = read_spec(folder).source
    if trust is not True:  # "no" is none
        check_trusted(source, folder)
    else:
        look_here()
    return make_source(source, **kwargs)


def _files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> time of change, size and inode of the files in a world folder."""
    found = {}
    for path in folder.iterdir():
        try:
            found[path.name] = _stamp(path)
        except OSError:  # a link to nowhere or to itself, or a file that has just been renamed
            continue
    return found


def _stamp(path: Path) -> tuple[int, int, int]:
    """Time of change, size and inode."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _recover(folder: Path) -> None:
    """Put a world back whose writer was killed, or wait for a writer who is at it."""
    try:
        with owned_world(folder, _PATIENCE):
            pass
    except (FolderError, OSError) as error:
        raise UnknownWorldError(
            f"{folder} was being replaced when its writer was stopped; its world lies in "
            f"{folder.with_name(f'.{folder.name}.replaced')} and cannot be put back ({error}): "
            "rename that folder"
        ) from None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the latter: no name of a file
        return None
    return found.st_dev, found.st_ino


def _folder_name(name: str) -> str:
    """Turn "DoomTakeCover" into "doom_take_cover"; folder names stay as they are."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
