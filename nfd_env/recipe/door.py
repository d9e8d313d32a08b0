"""What can be known before anything is recorded or trained: refused here, in one sentence each."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nfd_env import config
from nfd_env.data.worker import close
from nfd_env.devices import DeviceError, resolve_device
from nfd_env.evaluation.inverse_dynamics import InverseDynamicsTrainingConfig
from nfd_env.files import FolderError, found_file
from nfd_env.learning.train import TrainPPOConfig
from nfd_env.models.dynamics import Dynamics
from nfd_env.models.tokenizer import Tokenizer
from nfd_env.models.weights import CheckpointError
from nfd_env.players.actions import action_head
from nfd_env.recipe import plan as planning
from nfd_env.recipe import rounds
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.grid import PlanError, fitting_size
from nfd_env.recipe.look import Look
from nfd_env.recipe.measure import GameMeasures
from nfd_env.recipe.plan import Plan
from nfd_env.recipe.steps import LEAST_STEPS
from nfd_env.sources.source import make_source
from nfd_env.sources.spec import is_imported
from nfd_env.spaces import ActionCodec
from nfd_env.training.distill import DistillTrainingConfig
from nfd_env.training.export import ExportConfig, world_spec
from nfd_env.training.flow import FlowTrainingConfig
from nfd_env.training.heads import HeadsTrainingConfig
from nfd_env.training.initial import begin_motion, begin_tokenizer, initial_weights
from nfd_env.training.ranks import ALONE, Ranks
from nfd_env.training.tokenizer import TokenizerTrainingConfig

SCHEMAS: dict[str, Any] = {
    "inverse_dynamics": InverseDynamicsTrainingConfig,
    "tokenizer": TokenizerTrainingConfig,
    "flow": FlowTrainingConfig,
    "heads": HeadsTrainingConfig,
    "distill": DistillTrainingConfig,
    "export": ExportConfig,
}

_STATES = 10  # times the weights' bytes on disk: what trainings keep to go back to
_PATIENCE = 1.5  # times the budget that a world may take
_ENCODING = 6  # times that a pass of the tokenizer, forward and back, takes longer than encoding
_STARTING = 10.0  # seconds for starting, encoding and the report, whatever the game


def check_kinds(game: GameConfig) -> None:
    """Refuse stages' settings that are not of the right kind, before anything looks into them.

    Raises:
        ConfigError: naming the stage and the setting, and what is to be written there.
    """
    for name, schema in {**SCHEMAS, "agent": TrainPPOConfig}.items():
        wrong = config.mistake(schema, getattr(game, name))
        if wrong:
            raise config.ConfigError(f"{name}: {wrong}")


def check(game: GameConfig, device: str, seen: Look, ranks: Ranks = ALONE) -> float:
    """Refuse settings that do not fit, a budget that is too small and a disk that is too full.

    Returns:
        About how many seconds it takes to encode a frame.

    Raises:
        ConfigError: naming the setting that is unknown, of the wrong type or out of range.
        PlanError: when frames cannot be cut into tokens, or the budget is too small.
        FolderError: when the disk is too full.
    """
    first = rounds.Round(game).here
    measures = GameMeasures(
        frame_size=seen.frame_size,
        small=4.0,
        moved=0.02,
        episodes=100,
        median_length=1000.0,
        longest=1000,
        ends=10,
        mean_return=0.0,
    )
    plan = planning.settings(first, measures, device, seen.action_width, ranks.count)
    built = check_settings(plan, seen)
    check_parts(built, ranks)
    _check_at_hand(game, built)
    if game.agent:
        _check_agent(game, device)
    _check_starts(game, built["export"])
    with torch.random.fork_rng():
        networks = Tokenizer(built["tokenizer"].model), Dynamics(built["flow"].model)
    _check_room(game, seen, networks)
    seconds, encoding = _least_seconds(game, plan, device, seen, networks)
    if seconds > _PATIENCE * 60 * first.minutes:
        minutes = seconds / 60 * game.minutes / first.minutes
        fewer = "fewer rounds, " if game.rounds > 1 else ""
        raise PlanError(
            f"a world of this game takes at least about {minutes:.1f} minutes on this machine;"
            f" {game.minutes:g} are too few: give --minutes {math.ceil(minutes)} or more, {fewer}"
            "smaller frames (source.size), or a faster device"
        )
    return encoding


def check_rounds(game: GameConfig, device: str) -> None:
    """Refuse later rounds of what no agent can play.

    Raises:
        PlanError: when there is no game.
        SourceError: when it cannot be made.
        ConfigError: naming a setting of the agent that is wrong.
        ValueError: for actions that no agent can learn.
    """
    if is_imported(game.source.env_id):
        raise PlanError(
            f"rounds: {game.rounds} records the game again with an agent, but {game.source.env_id} "
            "is no game: set rounds: 1"
        )
    _check_agent(game, device)
    env = make_source(game.source, **game.recording_kwargs)
    try:
        action_head(ActionCodec(env.action_space).space)
    finally:
        close(env)


def _check_agent(game: GameConfig, device: str) -> None:
    """Refuse wrong settings of the agent, which one round does not look at."""
    values = rounds.agent_settings(game, game.run_folder, game.world_folder, device, None)
    rounds.built_agent(values)


def check_settings(plan: Plan, seen: Look) -> dict[str, Any]:
    """Refuse settings of stages that are wrong or do not fit one another; returns them.

    Raises:
        ConfigError: naming the setting.
        PlanError: when frames do not divide.
    """
    built = {name: built_from(name, getattr(plan, name)) for name in SCHEMAS}
    for name in planning.SHARES:
        try:
            resolve_device(built[name].train.device)
        except DeviceError as error:
            raise config.ConfigError(f"{name}.train.device: {error}") from None
    _check_fit(built, seen)
    try:
        world_spec(built["export"], seen.frame_size, seen.fps, seen.action_space)
    except ValueError as error:
        raise config.ConfigError(f"export: {error}") from None
    return built


def check_parts(built: Mapping[str, Any], ranks: Ranks, finished: Collection[str] = ()) -> None:
    """Refuse batches that the processes cannot share equally.

    Raises:
        ConfigError: naming the stage, and what would fit.
    """
    for name in planning.SHARED:
        if name not in finished:
            try:
                built[name].train.check_parts(ranks)
            except ValueError as error:
                raise config.ConfigError(f"{name}.train: {error}") from None


def built_from(name: str, values: dict[str, Any]) -> Any:
    """The settings of a stage, checked.

    Raises:
        ConfigError: naming the stage and the setting.
    """
    return config.from_mapping(SCHEMAS[name], values, name)


def _try_to_begin(name: str, key: str, settings: Any) -> None:
    """Raise ``CheckpointError`` where there are no such weights, or no such that fit."""
    named = getattr(settings, key)
    if (name, key) == ("tokenizer", "initial"):
        begin_tokenizer(Tokenizer(settings.model), named)
    elif key == "initial_motion":
        begin_motion(Dynamics(settings.model), named)
    else:
        initial_weights(named, name)


def _check_at_hand(game: GameConfig, built: Mapping[str, Any]) -> None:
    """Refuse settings that ask for what is not there, which stages would find out hours later."""
    for name in SCHEMAS:
        for key in planning.BEGUN_FROM:
            if getattr(built[name], key, ""):
                try:
                    _try_to_begin(name, key, built[name])
                except CheckpointError as error:
                    raise config.ConfigError(f"{name}.{key}: {error}") from None
    for path in game.export.get("configs", ()):
        if not found_file(Path(path).expanduser(), config.ConfigError):
            raise config.ConfigError(f"export.configs: {path}: no such file")
    if built["heads"].signal_weight and not (game.signals or game.recordings):
        raise config.ConfigError(
            "heads.signal_weight asks for signals, which are not recorded: set signals, or leave "
            "it out"
        )


def _check_starts(game: GameConfig, export: ExportConfig) -> None:
    """Refuse starts that are longer than any episode that will be recorded."""
    window, most = export.start_frames + export.start_margin, game.max_episode_steps + 1
    if not game.recordings and window > most:
        raise config.ConfigError(
            f"export.start_frames and export.start_margin ask for episodes of {window} frames, "
            f"but max_episode_steps cuts them off after {most}"
        )


def _check_fit(built: dict[str, Any], seen: Look) -> None:
    """Of settings that a user may have set one by one."""
    tokenizer, flow = built["tokenizer"].model, built["flow"].model
    down = tokenizer.downsampling
    height, width = seen.frame_size
    if height % down or width % down:
        size = fitting_size(height, width)
        raise PlanError(
            f"frames of {height}x{width} do not divide by {down}, as "
            f"{len(tokenizer.encoder_channels)} tokenizer.model.encoder_channels ask for: set "
            f"source.size to {size}, or give fewer channels"
        )
    made = (tokenizer.latent_channels, height // down, width // down)
    if (*flow.latent_shape, flow.action_width) != (*made, seen.action_width):
        raise config.ConfigError(
            f"flow.model is for latents {tuple(flow.latent_shape)} and actions of width "
            f"{flow.action_width}, but the tokenizer makes {made} and the game's actions have "
            f"{seen.action_width}: leave these settings out, they are derived"
        )
    judged = built["distill"].adversarial
    if judged.weight and not all(0 <= layer < flow.layers for layer in judged.layers):
        raise config.ConfigError(
            f"distill.adversarial.layers must be from 0 to {flow.layers - 1}, the blocks of the "
            f"flow model, got {judged.layers}"
        )


def frames_at_most(game: GameConfig) -> int:
    """Frames that will be recorded, if the game is fast enough."""
    if game.recordings or is_imported(game.source.env_id):
        return 0
    return game.rounds * (game.frames or planning.wanted_frames(game.minutes))


def _check_room(game: GameConfig, seen: Look, networks: tuple[torch.nn.Module, ...]) -> None:
    folder = game.run_folder
    while not folder.exists():
        folder = folder.parent
    weights = sum(p.numel() for network in networks for p in network.parameters()) * 4
    there = sum(p.stat().st_size for p in _files(game.run_folder))
    height, width = seen.frame_size
    needed = frames_at_most(game) * height * width * 3 + _STATES * weights - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FolderError(
            f"{game.run_folder} has room for {free / 1e9:.2f} GB, but the recordings and weights "
            f"take about {needed / 1e9:.2f} GB: make room, or set folder to another disk, or "
            "record less (frames, source.size)"
        )


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []


def _least_seconds(
    game: GameConfig, plan: Plan, device: str, seen: Look, networks: tuple[Any, Any]
) -> tuple[float, float]:
    """About how long the smallest world of this game takes, and to encode one of its frames.

    In seconds, from a pass of each network with two samples.
    """
    total = _STARTING
    if not math.isnan(seen.rate):
        workers = game.collect_config(1).workers
        total += (game.frames or planning.FEWEST_FRAMES) / (seen.rate * workers)
    where = torch.device(device)
    tokenizer, dynamics = (network.to(where).train() for network in networks)
    frames = torch.rand(2, 3, *seen.frame_size, device=where)
    steps = {name: _steps(game, name) for name in planning.SHARES}
    pass_ = _pass(lambda: tokenizer(frames).square().mean())
    encoding = pass_ / len(frames) / _ENCODING
    recorded = game.frames or planning.FEWEST_FRAMES
    total += steps["tokenizer"] * pass_ + encoding * recorded
    size, length = dynamics.config, plan.flow["frames"]
    latents = torch.rand(2, length, *size.latent_shape, device=where)
    levels = torch.rand(2, length, device=where)
    actions = torch.rand(2, length, size.action_width, device=where)
    one = _pass(
        lambda: (
            dynamics.forward_two_copies(latents, levels, latents, levels, actions).square().mean()
        )
    )
    return total + one * (steps["flow"] + 3 * steps["distill"]), encoding


def _steps(game: GameConfig, name: str) -> int:
    own = getattr(game, name).get("train", {})
    return int(own.get("steps", LEAST_STEPS))


def _pass(loss: Any) -> float:
    """Seconds of one pass forward and back, the faster of three."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        value = loss()
        value.backward()
        value.item()  # waits for a GPU
        times.append(time.perf_counter() - begin)
    return float(np.min(times))


def with_short_episodes(game: GameConfig, frames: int) -> GameConfig:
    """``game`` with episodes so short that ``frames`` frames are some of them for each split."""
    workers = game.collect_config(1).workers
    most = max(2 * planning.LEAST_FRAMES, frames // workers // planning.EPISODES)
    return replace(game, max_episode_steps=min(game.max_episode_steps, most))
