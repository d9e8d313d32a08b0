"""What is refused before anything is recorded or trained, in one sentence, leaving nothing."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nfd_env.config import ConfigError
from nfd_env.data.collect import PolicyConfig, collect
from nfd_env.recipe import door
from nfd_env.recipe import look as looking
from nfd_env.recipe.game import GameConfig, load_game
from nfd_env.recipe.run import Recipe
from nfd_env.sources.source import SourceConfig
from tests.recipe.hostile import HOSTILE
from tests.recipe.tiny import TINY, game

_ERRORS = (ValueError, RuntimeError, OSError)  # what the command line shows in one line


def hostile(folder: Path, fault: str, **changes: Any) -> GameConfig:
    kwargs = {"fault": fault, **changes.pop("kwargs", {})}
    source = SourceConfig(HOSTILE, imports=["tests.recipe.hostile"], kwargs=kwargs)
    return replace(game(folder), source=source, **changes)


def refused(settings: GameConfig, message: str) -> None:
    with pytest.raises(_ERRORS, match=message) as caught:
        Recipe(settings, say=lambda line: None, progress=False).run()
    assert "\n" not in str(caught.value).strip()
    assert not settings.run_folder.exists()


@pytest.mark.parametrize(
    "fault, message",
    [
        ("reset", "fails in every episode.*no level"),
        ("exit", r"fails in every episode.*exit\(3\)"),
        ("size", "fails in every episode.*must have one size"),
        ("nan", "fails in every episode.*reward must be a finite number"),
        ("shaped", "fails in every episode.*reward must be one number"),
        ("one_step", "have at most 2 frames.*let policies play that live longer"),
        ("still", "nothing moves.*source.crop"),
        ("large", r"frames of 90x70 .*source.size.*\[\d+, \d+\]"),
    ],
)
def test_a_game_that_cannot_be_recorded(fault: str, message: str, tmp_path: Path) -> None:
    refused(hostile(tmp_path / "run", fault, tokenizer={}, flow={}), message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keys": {"jump": ["space"]}}, "keys are given for 'jump', which is no action of"),
        ({"action_names": ["a", "b", "c", "d"]}, "there are 4 action_names for 3 actions"),
        ({"action_names": ["a", "a", "b"]}, "action_names has 'a' twice"),
        ({"action_names": ["a", "b"]}, "3 actions to name, but 2 names"),
        ({"action_names": ["a", " ", "b"]}, "action_names must not be empty"),
        ({"keys": {"l": ["a"], "r": ["A"]}}, "'A' is given for both 'l' and 'r'"),
        ({"keys": {"l": ["Enter"], "r": ["return"]}}, "'return' is given for both 'l' and 'r'"),
        ({"keys": {"l": ["a+w"], "r": ["w+a"]}}, r"'w\+a' is given for both 'l' and 'r'"),
        ({"keys": {"l": ["spcae"]}}, "'l' has the key 'spcae', which is none: give a letter.*left"),
        ({"keys": {"l": ["left+"], "r": ["up+none"]}}, "'r' has the key 'none'"),
        ({"keys": {"l": [""]}}, "'l' has the key '', which is none"),
    ],
)
def test_controls_that_no_world_could_be_played_by(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Found when the trained world was to be saved or played, once."""
    source = replace(game(tmp_path).source, **changes)
    refused(game(tmp_path / "run", source=source), message)
    with pytest.raises(ValueError, match=message):
        collect(game(tmp_path / "run", source=source).collect_config(10), progress=False)


def test_a_size_that_does_not_divide_is_refused_with_one_that_does(tmp_path: Path) -> None:
    source = replace(game(tmp_path).source, size=[90, 70])
    refused(game(tmp_path / "run", source=source, tokenizer={}), r"90x70.*source.size.*\[\d+, \d+")
    refused(game(tmp_path / "run", source=source), r"90x70.*source.size.*\[\d+, \d+")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer": {"hard_wieght": 1.0}}, "tokenizer: hard_wieght.*hard_weight"),
        ({"flow": {"model": {"widht": 32}}}, "flow: model.widht.*width"),
        ({"heads": {"train": {"steps": "many"}}}, "heads: train.steps"),
        ({"flow": {"train": "fast"}}, "flow: train: must be key: value pairs, such as folder"),
        ({"flow": {"model": [1]}}, "flow: model: must be key: value pairs"),
        ({"flow": {"frames": "many"}}, "flow: frames: must be a whole number, got 'many'"),
        ({"flow": {"frames": True}}, "flow: frames: must be a whole number, got 'True'"),
        ({"tokenizer": {"model": {"encoder_channels": 8}}}, "encoder_channels: must be a list"),
        ({"agent": {"ppo": 3}}, "agent: ppo: must be key: value pairs"),
        ({"agent": {"widht": 3}}, "agent: widht.*width"),  # with one round too
        ({"flow": {"train": {"accumulate": 0}}}, "accumulate must be at least 1, got 0"),
        ({"heads": {"train": {"device": "zzz"}}}, "heads.train.device: "),
        ({"export": {"configs": ["/no/such.yaml"]}}, "export.configs: /no/such.yaml: no such file"),
        ({"distill": {"frames": 1}}, "distill: frames must be at least 2"),
        ({"inverse_dynamics": {"window": 1}}, "inverse_dynamics: window must be .*2.*64, got 1"),
        ({"inverse_dynamics": {"window": 5000}}, "inverse_dynamics: window must be .*2.*64, got"),
        ({"export": {"starts": 10**9}}, "export: starts must be .*100000, got 1000000000"),
        ({"export": {"startz": 3}}, "export: startz.*starts"),
        ({"export": {"display": "blurred"}}, "export: display must be smooth or pixelated"),
        ({"export": {"presentation": {"fps": "fast"}}}, "presentation: fps: must be a number"),
        ({"export": {"max_episode_steps": -1}}, "max_episode_steps must be at least 0"),
        ({"flow": {"model": {"layers": 0}}}, "layers must be at least 1, got 0"),
        ({"flow": {"model": {"heads": 0}}}, "heads must be at least 1, got 0"),
        ({"tokenizer": {"model": {"latent_noise": -1}}}, "latent_noise must be at least 0"),
        ({"flow": {"initial": "/no/such/w"}}, "flow.initial: /no/such/w: no such checkpoint"),
        (
            {"tokenizer": {"initial": "Nobody"}},
            "tokenizer.initial: Nobody: no such .* no such world",
        ),
        (
            {"tokenizer": {"initial": "CarRacing"}},
            "initial: CarRacing has another number",
        ),
        ({"flow": {"initial": "BigFish", "initial_motion": "BigFish"}}, "is a part of initial"),
        ({"flow": {"initial_motion": "Take Cover"}}, "flow.initial_motion: .* no such world"),
        (
            {"flow": {"initial_motion": "DoomTakeCover"}},
            "DoomTakeCover has no conv",
        ),
        ({"heads": {"signal_weight": 1.0}}, "heads.signal_weight asks for signals"),
        (
            {"distill": {"adversarial": {"weight": 0.1, "layers": [99]}}},
            r"distill.adversarial.layers must be from 0 to \d+, .*got \[99\]",
        ),
        ({"rounds": 2, "agent": {"frame_skip": 0}}, "frame_skip must be at least 1, got 0"),
        ({"rounds": 2, "agent": {"obs_type": "sound"}}, "obs_type must be one of rgb, latent"),
        ({"rounds": 2, "agent": {"env": {"temprature": 2}}}, "env knows .*got 'temprature'"),
        ({"rounds": 2, "agent": {"ppo": {"clip_norm": 0}}}, "ppo.clip_norm must be above 0"),
        ({"flow": {"train": {"folder": "elsewhere"}}}, "flow.train.folder.*leave it out"),
        ({"flow": {"recordings": "elsewhere"}}, "flow.recordings.*leave it out"),
        ({"flow": {"model": {"latent_channels": 3}}}, "flow.model is for latents.*leave these"),
        ({"policies": [PolicyConfig("randm")]}, "unknown policy 'randm'"),
        ({"policies": [PolicyConfig("random_held", kwargs={"lo": 1})]}, "random_held.*lo"),
        ({"recordings": "/no/such/folder"}, "/no/such/folder"),
        ({"max_episode_steps": 5}, "at most 6 frames.*max_episode_steps"),
        # What a world could not say of itself would else come out when all is trained.
        ({"name": "x" * 120}, "export: name must have 1 to 100 printable characters"),
        (
            {"export": {"presentation": {"action_names": ["a", "b", "c", "d"]}}},
            "export: there are 4 action_names for 3 actions",
        ),
        ({"export": {"presentation": {"keys": {"jump": ["space"]}}}}, "export: keys .*'jump'"),
        ({"export": {"sampling": {"steps": 5000}}}, "export: sampling.steps must be at most 1000"),
        (
            {"teacher": True, "export": {"teacher_sampling": {"steps": 5000}}},
            "export: teacher.steps must be at most 1000",
        ),
        ({"export": {"start_frames": 10**6}}, "ask for episodes of .* max_episode_steps cuts"),
    ],
)
def test_settings_that_are_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(game(tmp_path / "run", **changes), message)


def test_a_budget_that_is_too_small_says_what_is_enough(tmp_path: Path) -> None:
    settings = hostile(tmp_path / "run", "", kwargs={"pause": 0.01}, minutes=0.01, frames=0)
    refused(settings, r"at least about [\d.]+ minutes.*give --minutes \d+")


def test_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(door.shutil, "disk_usage", lambda folder: usage)
    refused(game(tmp_path / "run"), r"has room for 0.00 GB.*make room")


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(_ERRORS, match="file"):
        Recipe(game(tmp_path / "file"), say=lambda line: None).run()
    with pytest.raises(_ERRORS, match="cannot be made"):
        Recipe(game(tmp_path / "file" / "run"), say=lambda line: None).run()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "text, message",
    [
        ("recordings: r\ntokenizer: t\nmodel: {width: 3}\ntrain: {steps: 3}", "nfd init"),
        ("source: {env_id: X-v0}\nfolder: f\nframes: 100\npolicies: []", "name"),
        ("name: Dots\nsource: {env_id: X-v0}\nminuets: 3", "minuets.*minutes"),
        ("name: Dots\nsource: {env_id: X-v0, sizes: [3, 3]}", "sizes.*size"),
        ("name: ../Dots\nsource: {env_id: X-v0}", "name must consist of"),
        ("name: Dots\nsource: {env_id: X-v0}\npolicies: []", "policies"),
        ("name: Dots\nsource: {env_id: X-v0}\nvalidation_every: 1", "validation_every"),
        ("name: Dots\nsource: {env_id: X-v0}\nminutes: .nan", "minutes"),
        ("- 3", "key: value"),
    ],
)
def test_files_that_are_no_game_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "game.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_game(path)


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "game.yaml"
    path.write_text("name: Dots\nsource: {env_id: X-v0}\nfolder: ~/runs\nrecordings: ~/data\n")
    settings = load_game("~/game.yaml")
    assert settings.run_folder == tmp_path / "runs"
    assert settings.recordings_place == str(tmp_path / "data")


def test_rounds_join_what_lies_on_a_disk() -> None:
    with pytest.raises(ValueError, match="name one folder on a disk"):
        GameConfig("Dots", SourceConfig("X-v0"), rounds=2, recordings="s3://bucket/game")


def test_what_can_be_recorded_passes(tmp_path: Path) -> None:
    for fault in ("", "sometimes", "endless", "twelve_steps", "multi_discrete", "multi_binary"):
        settings = hostile(tmp_path / "run", fault)
        seen = looking.look(settings)
        assert seen.frame_size == [48, 48] and seen.rate > 0
        door.check(settings, "cpu", seen)
    assert TINY


def test_a_games_speed_is_that_of_the_fastest_of_several_timings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is busy for a moment must not lead to a refused budget."""
    clock = iter(range(10**9))

    def ticking(busy: Callable[[int], bool]) -> Callable[[], float]:
        times = itertools.accumulate(1.0 if busy(n) else 0.001 for n in clock)
        return lambda: next(times)

    rates = []
    for busy in (lambda n: False, lambda n: n % 90 < 30):
        clock = iter(range(10**9))
        monkeypatch.setattr(looking, "time", SimpleNamespace(perf_counter=ticking(busy)))
        rates.append(looking.look(hostile(tmp_path / "run", "")).rate)
    assert rates[0] == pytest.approx(1000, rel=0.1)
    assert rates[1] == pytest.approx(rates[0], rel=0.1)
