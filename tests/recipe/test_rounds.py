"""An agent learns in the world, plays the real game, and the world is trained on on both."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium import spaces

from nfd_env.config import ConfigError
from nfd_env.data.shards import RecordedDataset
from nfd_env.learning import train as learning
from nfd_env.models.weights import fingerprint_of
from nfd_env.recipe import gates, rounds
from nfd_env.recipe.game import load_game
from nfd_env.recipe.gates import Gate
from nfd_env.recipe.ledger import Ledger
from nfd_env.recipe.records import recordings_digest
from nfd_env.recipe.run import Recipe
from nfd_env.sources.source import SourceConfig
from nfd_env.training.flow import FlowStage
from tests.recipe.dots import DotsEnv
from tests.recipe.tiny import AGENT, game, run, twice

LAST = "agent_2", "record_2", "tokenizer_2", "encode_2", "flow_2", "heads_2", "distill_2", "world_2"


@pytest.fixture
def copied(made_twice: Path, tmp_path: Path) -> Path:
    shutil.copytree(made_twice, tmp_path / "dots", symlinks=True)
    return tmp_path / "dots"


def results(folder: Path) -> dict[str, str]:
    """What a run has come to, by content."""
    second = folder / "round_2"
    found = {
        name: fingerprint_of(second / name / "model.safetensors")
        for name in ("tokenizer", "flow", "heads", "distill")
    }
    found["agent"] = fingerprint_of(second / "agent" / "agent.safetensors")
    found["recordings"] = recordings_digest(RecordedDataset(second / "all_recordings"))
    return found


def test_both_worlds_step_and_the_report_tells_of_the_agent(made_twice: Path) -> None:
    for world in (made_twice / "world", made_twice / "round_1" / "world"):
        env = gymnasium.make("NFD/World-v0", world=world)
        env.reset(seed=0)
        assert env.step(2)[0].shape == (48, 48, 3)
    records = yaml.safe_load((made_twice / "run.yaml").read_text())
    assert set(records) == set(rounds.stages(2)) and all(r["finished"] for r in records.values())
    told = records["record_2"]["extra"]["returns"]
    assert set(told) == {"agent", "mistakes", "random"} and told["random"]["episodes"] > 0
    assert any("above that of random play" in line for line in records["record_2"]["gates"])
    before, after = (records["flow_2"]["extra"][name] for name in ("before", "after"))
    assert before.keys() == after.keys() and before != after
    report = (made_twice / "report.html").read_text(encoding="utf-8")
    assert "<h2>Round 2</h2>" in report and "random play<td>" in report
    world = yaml.safe_load((made_twice / "world" / "world.yaml").read_text())
    assert world["recordings"].endswith("round_2/all_recordings")


def test_the_world_learns_on_all_that_was_recorded(made_twice: Path) -> None:
    first = RecordedDataset(made_twice / "recordings")
    own = RecordedDataset(made_twice / "round_2" / "recordings")
    joined = RecordedDataset(made_twice / "round_2" / "all_recordings")
    assert joined.frame_count == first.frame_count + own.frame_count
    assert {e.seed for e in own}.isdisjoint({e.seed for e in first})
    policies = {e.policy for e in own}
    assert policies == {"0:AgentPolicy+mistakes0.05", "1:AgentPolicy", "2:random_held"}
    same = own.episodes[-1]
    (moved,) = (episode for episode in joined if episode.seed == same.seed)
    assert np.array_equal(moved.frames, same.frames) and moved.key != same.key
    latents = made_twice / "round_2" / "latents"
    lengths = {path.stem: len(np.load(path)) for path in latents.glob("*.npy")}
    assert sum(lengths.values()) == joined.frame_count


def test_a_second_run_makes_nothing_again(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("model.safetensors")}
    world = (copied / "world" / "world.yaml").stat().st_mtime_ns
    said = run(twice(copied))
    assert not any("anew" in line for line in said)
    after = {path: path.stat().st_mtime_ns for path in copied.rglob("model.safetensors")}
    assert after == before, said
    assert (copied / "world" / "world.yaml").stat().st_mtime_ns == world


def test_stopped_in_the_second_round_it_ends_as_if_it_had_not_been(
    made: Path, made_twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "dots"
    shutil.copytree(made, folder)

    def interrupted(owner: Any, name: str, at: int) -> None:
        calls, original = [], getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            with pytest.raises(KeyboardInterrupt):
                run(settings)

    settings = twice(folder, agent={**AGENT, "checkpoint_seconds": 0.0})
    interrupted(learning, "update", 3)
    interrupted(rounds, "join", 1)
    interrupted(FlowStage, "loss", 13)  # after ten by which its speed is found out
    interrupted(Recipe, "_world", 2)  # nothing of what is compared comes later
    assert results(folder) == results(made_twice)


def test_a_change_of_the_agent_leaves_the_first_round_alone(copied: Path) -> None:
    changed = twice(copied, agent={**AGENT, "channels": 4})
    with pytest.raises(ValueError, match="agent_2 is stale"):
        run(changed, "flow_2")
    said = run(changed, "agent_2")
    assert [line.split()[0] for line in said if "anew" in line] == ["agent_2"]
    said = run(changed, "record_2")
    assert [line.split()[0] for line in said if "anew" in line] == ["record_2"]
    assert results(copied)["flow"] and len(RecordedDataset(copied / "round_2" / "recordings"))


def test_fewer_rounds_give_the_world_of_the_round_that_is_the_last_then(copied: Path) -> None:
    once = replace(twice(copied), rounds=1, minutes=1.0)
    said = run(once, "world")
    assert any("world is made anew" in line for line in said)
    made_by = yaml.safe_load((copied / "world" / "provenance.yaml").read_text())
    own = RecordedDataset(copied / "recordings").frame_count
    assert made_by["recordings"]["frames"] == own


def test_a_tokenizer_that_is_lost_where_the_agent_goes_is_trained_on(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = yaml.safe_load((copied / "run.yaml").read_text())
    kept = results(copied)["tokenizer"]
    assert kept == fingerprint_of(copied / "tokenizer" / "model.safetensors")
    del records["tokenizer_2"]
    (copied / "run.yaml").write_text(yaml.safe_dump(records))
    lost = Gate("PSNR", 3.0, "above 28", "more", low=20.0)
    monkeypatch.setattr(gates, "tokenizer_gates", lambda metrics: [lost])
    said = run(twice(copied), "tokenizer_2")
    assert any("it is trained on" in line for line in said)
    assert results(copied)["tokenizer"] != kept
    run(twice(copied), "encode_2")


def test_who_has_how_much_of_the_budget(tmp_path: Path) -> None:
    settings = twice(tmp_path, minutes=100.0, rounds=3)
    minutes = [rounds.Round(settings, number).minutes for number in (1, 2, 3)]
    assert sum(minutes) == pytest.approx(100) and minutes[0] > minutes[1] == minutes[2]
    assert rounds.Round(replace(settings, rounds=1)).here == replace(settings, rounds=1)
    names = rounds.stages(3)
    assert names[-1] == "report" and names[8:16] == LAST
    assert [rounds.split(name) for name in ("flow_2", "inverse_dynamics")] == [
        ("flow", 2),
        ("inverse_dynamics", 1),
    ]


def test_the_time_left_is_that_of_the_budget_until_it_is_known(tmp_path: Path) -> None:
    """It once was 20 seconds for each stage that had not been timed."""
    for count in (1, 2):
        ledger = Ledger(twice(tmp_path / "run", minutes=150.0, rounds=count))
        expected = ledger.expected()
        assert tuple(expected) == ledger.stages
        assert 0.8 * 9000 < sum(expected.values()) <= 9001
    ledger = Ledger(game(tmp_path / "dots", minutes=150.0))
    ledger.folder.mkdir()
    timed = {"inverse_dynamics": 10.0, "tokenizer": 60.0, "flow": 120.0}
    (ledger.folder / "plan.yaml").write_text(yaml.safe_dump({"seconds": timed}))
    expected = ledger.expected()
    assert {name: expected[name] for name in timed} == timed
    timed |= {"heads": 5.0, "distill": 30.0}
    (ledger.folder / "plan.yaml").write_text(yaml.safe_dump({"seconds": timed}))
    # What nobody plans takes its share of the budget at most, not all that is left.
    assert sum(ledger.expected().values()) < sum(timed.values()) + 0.25 * 9000


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "1000"])
def test_numbers_of_rounds_that_there_are_not(value: str, tmp_path: Path) -> None:
    path = tmp_path / "game.yaml"
    path.write_text(f"name: Dots\nsource: {{env_id: X-v0}}\nrounds: {value}\n")
    with pytest.raises(ConfigError, match="rounds"):
        load_game(path)


class Nested(DotsEnv):
    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        self.action_space = spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2)))


gymnasium.register("tests/Nested-v0", entry_point=Nested, disable_env_checker=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": SourceConfig("tests/Nested-v0")}, "action space must be Discrete"),
        ({"agent": {"widht": 3}}, "agent: widht.*width"),
        ({"agent": {"ppo": {"epochs": 0}}}, "agent: .*epochs.*at least 1"),
        ({"agent": {"world": "Mars"}}, "agent.world: is decided.*leave it out"),
    ],
)
def test_what_is_refused_before_anything_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = twice(tmp_path / "run", minutes=1000.0, **changes)
    with pytest.raises((ValueError, RuntimeError), match=message):
        Recipe(settings, say=lambda line: None, progress=False).run()
    assert not settings.run_folder.exists()


def test_recordings_of_no_game_have_no_later_rounds(tmp_path: Path) -> None:
    from nfd_env.recipe import door

    source = SourceConfig("videos:" + str(tmp_path))
    with pytest.raises(ValueError, match="is no game: set rounds: 1"):
        door.check_rounds(twice(tmp_path / "run", source=source), "cpu")
