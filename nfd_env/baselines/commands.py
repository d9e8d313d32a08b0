"""``nfd train-baseline``: the token-autoregressive rival of a world, in the world's run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from nfd_env import config
from nfd_env.baselines.model import FOLDER, PARTS, find
from nfd_env.baselines.stages import (
    DiscreteTokenizerStage,
    DiscreteTrainingConfig,
    TokenDynamicsStage,
    TokenDynamicsTrainingConfig,
)
from nfd_env.data.shards import RecordedDataset
from nfd_env.devices import resolve_device
from nfd_env.files import atomic_write, check_writable, found_file, owned_folder
from nfd_env.models.weights import fingerprint_of
from nfd_env.recipe import plan as planning
from nfd_env.recipe.game import GameConfig, load_game
from nfd_env.recipe.records import read_records, recordings_digest, write_yaml
from nfd_env.recipe.timing import seconds_per_step, validation_seconds
from nfd_env.stopping import stopping
from nfd_env.training.loop import train
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.format import owned_world
from nfd_env.worlds.load import find_world

# What each part is to take as long as.
_RIVAL_OF = {"tokenizer": "tokenizer", "dynamics": "flow"}
_STAGES: dict[str, tuple[Any, Any]] = {
    "tokenizer": (DiscreteTrainingConfig, DiscreteTokenizerStage),
    "dynamics": (TokenDynamicsTrainingConfig, TokenDynamicsStage),
}
_VALIDATIONS = 4  # of each part
_TOKENS = 100  # of a frame at most, where its grid can be halved: each costs a pass


@dataclass(frozen=True)
class BaselinePlan:
    """The settings of both parts; ``autoregressive/plan.yaml`` in the run.

    Attributes:
        made_from: fingerprints of the world's tokenizer, of which recordings there are, and, once
            the transformer has begun, of the discrete tokenizer.
        minutes: that each part is given.
        seconds_per_step: measured, of those that have begun.
        tokenizer: of ``DiscreteTrainingConfig``.
        dynamics: of ``TokenDynamicsTrainingConfig``.
    """

    made_from: dict[str, str]
    minutes: dict[str, float]
    seconds_per_step: dict[str, float] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    dynamics: dict[str, Any] = field(default_factory=dict)


@config.config_class
class Minutes:
    """How long each part is trained.

    Attributes:
        tokenizer_minutes: of the discrete tokenizer; default: what the run's tokenizer took.
        dynamics_minutes: of the transformer; default: what the run's flow model took.
    """

    tokenizer_minutes: float | None = None
    dynamics_minutes: float | None = None

    def of(self, game: GameConfig, planned: Mapping[str, float]) -> dict[str, float]:
        """Minutes of each part: as given, else as ``planned`` before, else the run's.

        Raises:
            ValueError: when they are none, or the run has not got as far.
        """
        records = read_records(game.run_folder)
        found = {}
        for part, rival in _RIVAL_OF.items():
            record, own = records.get(rival), getattr(self, f"{part}_minutes")
            own = planned.get(part) if own is None else own
            if record is None or not record.finished:
                raise ValueError(
                    f"{game.run_folder}: its {rival} stage is not finished; nfd train first, then "
                    "a baseline as large and as long trained"
                )
            found[part] = record.seconds / 60 if own is None else own
            if not 0 < found[part] < 1e6:
                raise ValueError(f"--{part}-minutes must be above 0, got {found[part]:g}")
        return found


def train_baseline(
    game: Positional[str],
    minutes: Minutes,
    overrides: Positional[tuple[str, ...]] = (),
    device: str | None = None,
    into_world: bool = False,
) -> int:
    """Train a token-autoregressive rival of a game's world; run it again to go on.

    It learns from the same recordings for the same time, with about as many parameters. Then
    nfd eval WORLD --against compares the two, and dynamics="autoregressive" steps it.

    Args:
        game: the game file of a run that nfd train has finished.
        minutes: how long.
        overrides: key.sub=value, over the game file.
        device: cpu, cuda or auto; default: the file's.
        into_world: put a copy into the world's folder too, so that it goes with it.
    """
    described = load_game(game, overrides, None, device)
    folder = described.run_folder / FOLDER
    if into_world:
        find_world(described.world_folder)  # or refuse now, and not after hours
        check_writable(described.world_folder / FOLDER / f"{PARTS[0]}.safetensors")
    old = _stored(folder)
    given = minutes.of(described, old.minutes if old else {})
    with stopping() as stop, stop.at_once(), owned_folder(folder):
        plan = _plan(described, folder, given)
        plan = _train(plan, "tokenizer", folder)
        plan = _train(_of_these_tokens(plan, folder), "dynamics", folder)
    if into_world:
        _copy_into(described.world_folder)
    print(f"compare: nfd eval {described.world_folder} --against")
    return 0


def _train(plan: BaselinePlan, part: str, folder: Path) -> BaselinePlan:
    """Train a part to its end; decides first, once, how many steps there is time for."""
    schema, make = _STAGES[part]
    values = getattr(plan, part)
    stage = make(config.from_mapping(schema, values, part))
    if part not in plan.seconds_per_step:
        held = validation_seconds(stage, values["train"]["device"])
        pace = seconds_per_step(stage, values["train"])
        steps = max(10, int((60 * plan.minutes[part] - _VALIDATIONS * held) / pace))
        decided = {
            "steps": steps,
            "warmup_steps": max(1, min(200, steps // 10)),
            "validate_every": -(-steps // _VALIDATIONS),
        }
        values = {**values, "train": {**values["train"], **decided}}
        paces = {**plan.seconds_per_step, part: round(pace, 5)}
        plan = replace(plan, seconds_per_step=paces, **{part: values})
    write_yaml(folder / "plan.yaml", asdict(plan))
    settings = config.from_mapping(schema, values, part).train
    count = sum(p.numel() for p in stage.network.parameters() if p.requires_grad)
    print(
        f"{part}: {count / 1e6:.2f} M parameters, {settings.steps} steps in "
        f"{plan.minutes[part]:.1f} minutes"
    )
    for name, value in train(stage, settings).items():
        print(f"  {name} {value:.4g}")
    return plan


def _plan(game: GameConfig, folder: Path, minutes: dict[str, float]) -> BaselinePlan:
    """The stored plan where it still holds, else a new one in an empty folder."""
    run = game.run_folder
    tokenizer, data = run / "tokenizer" / "model.safetensors", game.recordings_place
    made_from = {
        "tokenizer": fingerprint_of(tokenizer),
        "recordings": recordings_digest(RecordedDataset(data)),
    }
    old = _stored(folder)
    if old is not None and made_from.items() <= old.made_from.items():
        # Other minutes are other steps; what was trained goes on.
        kept = {p: x for p, x in old.seconds_per_step.items() if minutes[p] == old.minutes[p]}
        return replace(old, minutes=minutes, seconds_per_step=kept)
    if old is not None:
        print("the baseline is made anew: the run's tokenizer or recordings have changed")
        for part in PARTS:
            shutil.rmtree(folder / part, ignore_errors=True)
    theirs = planning.stored(run / "plan.yaml")
    device = str(resolve_device(game.device))
    shared = {"seed": game.seed, "device": device, "steps": 1}
    model, flow = theirs.flow["model"], theirs.flow
    halvings, rows, columns = 0, model["latent_height"], model["latent_width"]
    while rows * columns > _TOKENS and not (rows % 2 or columns % 2):
        halvings, rows, columns = halvings + 1, rows // 2, columns // 2
    tokenizing = {
        "recordings": data,
        "tokenizer": str(tokenizer),
        "halvings": halvings,
        **{key: theirs.tokenizer[key] for key in ("hard_weight", "hard_fraction")},
        "train": {
            **shared,
            "folder": str(folder / "tokenizer"),
            **{key: theirs.tokenizer["train"][key] for key in ("batch_size", "learning_rate")},
        },
    }
    trained = ("batch_size", "learning_rate", "optimiser", "ema_decay", "decay_fraction")
    drawing = {
        "recordings": data,
        "tokenizer": str(tokenizer),
        "latents": str(run / "latents"),
        "discrete": str(folder / "tokenizer" / "model.safetensors"),
        **{key: model[key] for key in ("width", "layers", "heads", "window")},
        **{key: flow[key] for key in ("frames", "ending_share", "rollouts") if key in flow},
        "train": {
            **shared,
            "folder": str(folder / "dynamics"),
            **{key: flow["train"][key] for key in (*trained, "compile") if key in flow["train"]},
        },
    }
    return BaselinePlan(made_from, minutes, {}, tokenizing, drawing)


def _stored(folder: Path) -> BaselinePlan | None:
    path = folder / "plan.yaml"
    if not found_file(path, config.ConfigError):
        return None
    return config.from_mapping(BaselinePlan, config.read(path), str(path))


def _of_these_tokens(plan: BaselinePlan, folder: Path) -> BaselinePlan:
    """``plan``; a transformer that was trained on other tokens is taken away."""
    made = fingerprint_of(folder / "tokenizer" / "model.safetensors")
    if plan.made_from.get("discrete", made) != made:
        print("the transformer is made anew: the discrete tokenizer has changed")
        shutil.rmtree(folder / "dynamics", ignore_errors=True)
    return replace(plan, made_from={**plan.made_from, "discrete": made})


def _copy_into(world: Path) -> None:
    """Put copies of the trained parts into a world's folder."""
    beside = [world.parent / FOLDER / part / "model.safetensors" for part in PARTS]
    with owned_world(world):
        (world / FOLDER).mkdir(exist_ok=True)
        for part, file in zip(PARTS, beside, strict=True):
            with atomic_write(world / FOLDER / f"{part}.safetensors") as temporary:
                shutil.copyfile(file, temporary)
        write_checksums(world)
    assert find(world)
