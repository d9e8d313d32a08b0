from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nfd_env import config
from nfd_env.config import ConfigError
from nfd_env.data.collect import CollectConfig, PolicyConfig
from nfd_env.evaluation.agents import AgentEvaluation
from nfd_env.evaluation.held_out import EvaluationConfig
from nfd_env.evaluation.untrained import read_sizes
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.learning.ppo import PPOConfig
from nfd_env.models.dynamics import Dynamics
from nfd_env.models.tokenizer import TokenizerConfig
from nfd_env.play.commands import PlayConfig, ServeConfig
from nfd_env.recipe.game import GameConfig
from nfd_env.sources.spec import SourceConfig
from nfd_env.training.loop import TrainConfig

GAME = SourceConfig("CartPole-v1", size=[64, 64])
TRAIN = TrainConfig("runs/x", 10, 2, 1e-3)
SETTINGS: dict[str, Callable[[], Any]] = {
    "sampling": SamplingConfig,
    "tokenizer": TokenizerConfig,
    "train": lambda: TRAIN,
    "game": lambda: GameConfig("Game", GAME),
    "source": lambda: GAME,
    "collect": lambda: CollectConfig(GAME, "runs/x", 100, [PolicyConfig("random_held")]),
    "evaluation": EvaluationConfig,
    "agent": lambda: AgentEvaluation(agent="random"),
    "ppo": PPOConfig,
    "play": PlayConfig,
    "serve": ServeConfig,
}
CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Inner:
    count: int
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outer:
    title: str
    inner: Inner
    rate: float = 1.0


GOOD: dict[str, Any] = {"title": "a", "inner": {"count": 2, "names": ["x"]}}


def test_nested_values_become_frozen_dataclasses() -> None:
    made = config.from_mapping(Outer, GOOD)
    assert made == Outer("a", Inner(2, ["x"]))
    with pytest.raises(AttributeError):
        made.rate = 2.0  # type: ignore[misc]


def test_to_dict_round_trip() -> None:
    made = config.from_mapping(Outer, GOOD)
    assert config.from_mapping(Outer, config.to_dict(made)) == made


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({**GOOD, "tilte": "b"}, "tilte"),
        ({**GOOD, "inner": {"count": 2, "bogus": 1}}, "bogus"),
        ({**GOOD, "inner": {"count": "many"}}, "inner.count"),
        ({**GOOD, "rate": [1]}, "rate"),
        ({**GOOD, "inner": {"count": 1, "names": 3}}, "inner.names"),
        ({"inner": {"count": 2}}, "title"),
        ({"title": "a", "inner": {}}, "inner.count"),
        ({"title": "a"}, "inner"),
        ({**GOOD, "title": None}, "title"),
    ],
)
def test_an_error_names_the_key_and_the_file(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_mapping(Outer, values, "my.yaml")
    assert named in str(caught.value)
    assert "my.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_out_of_range_is_a_config_error_that_names_the_file() -> None:
    with pytest.raises(ConfigError, match="my.yaml.*precision"):
        config.from_mapping(
            TrainConfig,
            {
                "folder": "x",
                "steps": 1,
                "batch_size": 1,
                "learning_rate": 1e-3,
                "precision": "fp8",
            },
            "my.yaml",
        )


def test_load_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("title: a\ninner: {count: 2}\n")
    assert config.load(Outer, path) == Outer("a", Inner(2))
    made = config.load(Outer, path, ["inner.count=7", "rate=0.5", "inner.names=[p, q]"])
    assert made == Outer("a", Inner(7, ["p", "q"]), 0.5)
    with pytest.raises(ConfigError, match="bogus"):
        config.load(Outer, path, ["inner.bogus=7"])
    with pytest.raises(ConfigError, match="inner.count"):
        config.load(Outer, path, ["inner.count=seven"])


@dataclass(frozen=True)
class Listed:
    name: str = "x"
    rate: float = 0.5
    keys: dict[str, list[str]] = field(default_factory=dict)
    inner: list[Inner] = field(default_factory=list)


def test_overrides_reach_everything(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: x\nkeys: {up: [w], down: [s]}\ninner: [{count: 1}, {count: 2}]\n")

    def made(*overrides: str) -> Listed:
        return config.load(Listed, path, overrides)

    assert made("inner.1.count=7").inner == [Inner(1), Inner(7)]
    assert made("keys={}").keys == {} and made("keys={left: [a]}").keys.keys() == {
        "up",
        "down",
        "left",
    }
    assert made("keys.up=[i, o]").keys["up"] == ["i", "o"]
    assert made("rate=1e-3", "name='on'") == Listed("on", 1e-3, made().keys, made().inner)
    assert made("name=a=b").name == "a=b"
    for wrong in ("name=[1", "name", "=3", "inner.x.count=3", "inner.9.count=3"):
        with pytest.raises(ConfigError, match=re.escape(repr(wrong))) as caught:
            made(wrong)
        assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: no such config file"):
        config.load(Outer, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "\t", "3"])
def test_a_file_of_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml: .*[^ :]$"):  # it says what is wrong
        config.load(Outer, path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("paper/*.yaml")), ids=lambda p: p.stem)
def test_the_paper_configs_load(path: Path) -> None:
    dynamics, tokenizer = read_sizes(path)
    assert (dynamics.tokens, dynamics.window, tokenizer.downsampling) == (84, 32, 16)
    with torch.device("meta"):
        count = sum(p.numel() for p in Dynamics(dynamics).parameters())
    assert count == {"130m": 130_154_560, "310m": 310_935_616, "774m": 774_709_312}[path.stem]


def test_wrong_types_that_omegaconf_does_not_name() -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml"):
        config.from_mapping(Outer, {**GOOD, "inner": [1]}, "my.yaml")
    with pytest.raises(ConfigError, match=r"my\.yaml: rate: must be a number, got nan"):
        config.from_mapping(Outer, {**GOOD, "rate": float("nan")}, "my.yaml")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "a: " + "{b: " * 100_000, "? " * 5_000], ids=range(3)
)
def test_nested_beyond_all_reason(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml: .*nested deeper than 64 levels"):
        config.load(Outer, path)


def test_a_nested_override_and_nested_values() -> None:
    values: Any = 1
    for _ in range(100):
        values = [values]
    with pytest.raises(ConfigError, match="nested"):
        config.from_mapping(Outer, {**GOOD, "rate": values})


def test_a_file_that_is_no_config_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("title: " + "a" * 2**21)
    with pytest.raises(ConfigError, match="larger"):
        config.load(Outer, path)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"title: \x00", b"a: 1\na: 2\n", b"word"])
def test_bytes_of_something_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.yaml") as caught:
        config.load(Outer, path)
    assert "\n" not in str(caught.value)


def test_interpolations_are_for_the_users_own_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFD_SECRET", "secret")
    path = tmp_path / "a.yaml"
    path.write_text("title: ${oc.env:NFD_SECRET}\ninner: {count: 2}\n")
    assert config.load(Outer, path).title == "secret"
    plain = config.read(path)
    assert plain["title"] == "${oc.env:NFD_SECRET}"
    with pytest.raises(ConfigError, match="title: .* is not allowed here") as caught:
        config.from_mapping(Outer, plain, foreign=True)
    assert "secret" not in str(caught.value)
    names = {**GOOD, "inner": {"count": 1, "names": ["${title}"]}}
    with pytest.raises(ConfigError, match="inner.names: .* is not allowed here"):
        config.from_mapping(Outer, names, foreign=True)


def test_a_small_file_that_unfolds_into_a_huge_one(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    rows = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path.write_text("a0: &a0 [lol]\n" + "\n".join(rows))
    with pytest.raises(ConfigError, match="aliases"):
        config.load(Outer, path)


def test_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("title: ~/data\ninner: {count: 2, names: [~/x, a~/b]}\n")
    made = config.load(Outer, "~/a.yaml")
    assert made == Outer(f"{tmp_path}/data", Inner(2, [f"{tmp_path}/x", "a~/b"]))
    assert config.load(Outer, "~/a.yaml", ["title=~/b"]).title == f"{tmp_path}/b"


@pytest.mark.parametrize(
    ("value", "interval", "message"),
    [
        (0, "[1, inf)", "rate must be at least 1, got 0"),
        (-0.5, "[0, inf)", "rate must be at least 0 and finite, got -0.5"),
        (float("inf"), "(0, inf)", "rate must be above 0 and finite, got inf"),
        (float("nan"), "[0, inf]", "rate must be at least 0, got nan"),
        (0.0, "(0, 1]", "rate must be above 0 and at most 1, got 0.0"),
        (1, "[0, 1)", "rate must be at least 0 and below 1, got 1"),
        (2**63, "[0, 2**63)", f"rate must be at least 0 and below 2**63, got {2**63}"),
        (2, "[0, 1]", "a.rate must be from 0 to 1, got 2"),
    ],
)
def test_numbers_outside_of_their_range(value: float, interval: str, message: str) -> None:
    prefix = message[: message.index("rate")]
    with pytest.raises(ValueError) as error:
        config.check_ranges(Outer("", Inner(0), value), prefix, rate=interval)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("value", "interval"),
    [(None, "[1, 2]"), (1, "[1, inf)"), (1e-9, "(0, 1]"), (2**63 - 1, "[0, 2**63)")]
    + [(float("inf"), "[0, inf]"), (10**400, "[0, inf)")],
)
def test_numbers_within_their_range(value: Any, interval: str) -> None:
    config.check_ranges(Outer("", Inner(0), value), rate=interval)


@dataclass(frozen=True)
class Player:
    policy: str
    share: float = 1.0


@dataclass(frozen=True)
class Kinds:
    name: str
    size: list[int] = field(default_factory=list)
    keys: dict[str, list[str]] = field(default_factory=dict)
    players: list[Player] = field(default_factory=list)
    best: Player | None = None
    steps: int | None = None
    fast: bool = False
    scores: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"best": "random"}, "best: must be key: value pairs, such as policy: ..., got 'random'"),
        ({"players": "random"}, "players: must be a list, such as [a, b], got 'random'"),
        ({"players": {"policy": "x"}}, "players: must be a list, such as [a, b], got"),
        ({"players": ["random"]}, "players[0]: must be key: value pairs, such as policy: ..."),
        ({"players": [{"policy": "x", "share": "all"}]}, "players[0].share: must be a number"),
        ({"size": 64}, "size: must be a list, such as [a, b], got '64'"),
        ({"size": {"h": 64}}, "size: must be a list, such as [a, b], got \"{'h': 64}\""),
        ({"size": [64, "x"]}, "size[1]: must be a whole number, got 'x'"),
        ({"keys": ["up"]}, "keys: must be key: value pairs, got \"['up']\""),
        ({"keys": {"up": "w"}}, "keys.up: must be a list, such as [a, b], got 'w'"),
        ({"steps": True}, "steps: must be a whole number, got 'True'"),
        ({"steps": {"a": 1}}, "steps: must be a whole number, got"),
        ({"fast": "maybe"}, "fast: must be true or false, got 'maybe'"),
        ({"name": ["x"]}, "name: must be text, got"),
        ({"name": None}, "name: must be text, got nothing"),
        ({"name": True}, "name: must be text, got True: put it in quotes"),
        ({"keys": {"up": [False]}}, "keys.up[0]: must be text, got False: put it in quotes"),
        ({"scores": {"a": [1, 2]}}, "scores.a: must be a number, got '[1, 2]'"),
        ({"scores": {"a": {"b": 1}}}, "scores.a: must be a number, got"),
        ({"best": {"policy": "x", "shar": 1}}, "best.shar: unknown key. Did you mean: 'share'?"),
    ],
)
def test_a_mistake_in_the_structure_is_told_by_what_to_write(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_mapping(Kinds, {"name": "x", **values}, "game.yaml")
    assert str(caught.value).startswith(f"game.yaml: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, found",
    [
        ("BigFish", "the text 'BigFish'"),
        ("name:BigFish", "the text 'name:BigFish'"),
        ("name BigFish\nfps 15", "the text 'name BigFish fps 15'"),
        ("- a\n- b", "a list (lines that begin with -)"),
        ("5", "the text '5'"),
    ],
)
def test_a_file_without_pairs_is_told_what_they_are(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "game.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.read(path)
    assert str(caught.value) == (
        f"{path}: must hold key: value pairs, one a line, such as name: MyGame (with a space "
        f"behind the colon); it holds {found}"
    )


@pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)
def test_settings_take_no_bool_for_a_number(make: Callable[..., Any]) -> None:
    made = make()
    names = [name for name, *_ in config._numbers_of(type(made))]
    assert names
    for name in names:
        value = [True] if isinstance(getattr(made, name), list | tuple) else True
        with pytest.raises(ValueError, match=f"{name} must be a (whole )?number, got"):
            replace(made, **{name: value})
    for name, whole, _ in config._numbers_of(type(made)):
        if whole and isinstance(getattr(made, name), int):
            with pytest.raises(ValueError, match=f"{name} must be a whole number, got '2.5'"):
                replace(made, **{name: 2.5})
