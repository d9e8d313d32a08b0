"""The whole recipe on a small game, with tiny networks: what is made, kept, made anew."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import yaml

import nfd_env  # noqa: F401
from nfd_env.cli import main
from nfd_env.data.collect import PolicyConfig
from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.gates import GateError
from nfd_env.recipe.records import write_yaml
from nfd_env.recipe.rounds import STAGES
from nfd_env.recipe.run import Recipe
from nfd_env.sources.source import SourceConfig
from nfd_env.worlds.checksums import is_whole
from nfd_env.worlds.load import load_world
from tests.recipe.hostile import HOSTILE
from tests.recipe.tiny import TINY, game, run


def written(folder: Path, *names: str) -> dict[str, int]:
    """When each stage's result was written last; of ``names`` only, if there are some."""
    trained = names or ("tokenizer", "flow", "heads", "distill")
    times = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in trained}
    return times if names else {**times, "world": (folder / "world/world.yaml").stat().st_mtime_ns}


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The finished run under another name: nothing in it depends on where it lies."""
    shutil.copytree(made, tmp_path / "dots")
    return tmp_path / "dots"


def test_the_world_steps_and_the_report_is_there(made: Path) -> None:
    env = gymnasium.make("NFD/World-v0", world=made / "world")
    frame, _ = env.reset(seed=0)
    assert frame.shape == (48, 48, 3)
    frame, *_ = env.step(2)
    drawn_by = load_world(made / "world", "cpu", "fp32").model
    assert drawn_by.dynamics.config.stillness > 0 and drawn_by.sampling.history_level == 0
    report = (made / "report.html").read_text(encoding="utf-8")
    assert "data:image/webp;base64," in report and "gymnasium.make" in report
    assert "Do keys do what they say?" in report and "drawn under other actions" in report
    assert "<svg" in report and "http://" not in report.replace("http://www.w3.org", "")
    records = yaml.safe_load((made / "run.yaml").read_text())
    assert list(records) == list(STAGES) and all(r["finished"] for r in records.values())
    assert records["world"]["metrics"]["energy_at_last"] > 0
    assert any("energy of the latents after" in line for line in records["world"]["gates"])


def test_a_second_run_makes_nothing_again(copied: Path) -> None:
    before = written(copied)
    run(game(copied))
    assert written(copied) == before


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long, and nothing depends on it."""
    monkeypatch.setattr(Recipe, "_report", lambda self: None)


@pytest.mark.usefixtures("without_report")
def test_what_depends_on_a_change_is_made_again_and_nothing_else(copied: Path) -> None:
    before = written(copied)
    run(game(copied, heads={**TINY["heads"], "width": 24}))
    after = written(copied)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"heads", "world"}
    run(game(copied, heads={**TINY["heads"], "width": 24}, flow={**TINY["flow"], "frames": 4}))
    again = written(copied)
    assert {name for name in again if again[name] != after[name]} == {"flow", "distill", "world"}


@pytest.mark.usefixtures("without_report")
def test_a_batch_that_was_made_smaller_for_the_time_is_no_change(tmp_path: Path) -> None:
    """Once the tokenizer was trained again at every run, in the end with ten steps."""
    tokenizer = {"model": TINY["tokenizer"]["model"]}
    settings = game(tmp_path / "dots", tokenizer=tokenizer)
    run(settings, "record")
    run(settings, "tokenizer")
    made = written(tmp_path / "dots", "tokenizer")
    plan = yaml.safe_load((tmp_path / "dots" / "plan.yaml").read_text())
    assert plan["tokenizer"]["train"]["batch_size"] < plan["batches"]["tokenizer"]
    renamed = replace(settings, source=replace(settings.source, action_names=["a", "b", "c"]))
    for changed in (settings, renamed, renamed):
        said = run(changed, "tokenizer") + run(changed, "encode")
        assert not any("made anew" in line for line in said)
        assert written(tmp_path / "dots", "tokenizer") == made
    after = yaml.safe_load((tmp_path / "dots" / "plan.yaml").read_text())
    assert after["tokenizer"] == plan["tokenizer"] and after["batches"] == plan["batches"]


@pytest.mark.usefixtures("without_report")
def test_weights_to_begin_with_count_by_content(copied: Path, tmp_path: Path) -> None:
    def begun(name: str) -> GameConfig:
        return game(copied, heads={**TINY["heads"], "initial": str(tmp_path / name)})

    trained = copied / "heads" / "model.safetensors"
    shutil.copy(trained, tmp_path / "a")
    run(begun("a"), "heads")
    made = written(copied, "heads")
    (tmp_path / "a").rename(tmp_path / "b")
    run(begun("b"), "heads")
    assert written(copied, "heads") == made
    shutil.copy(trained, tmp_path / "b")
    assert any("made anew" in line for line in run(begun("b"), "heads"))
    assert written(copied, "heads") != made


def test_a_damaged_world_is_written_again(copied: Path) -> None:
    weights, before = copied / "world" / "dynamics.safetensors", written(copied, "distill")
    good = weights.read_bytes()
    for damage in (weights.unlink, lambda: weights.write_bytes(good[:-1])):
        damage()
        run(game(copied), "world")
        assert weights.stat().st_size == len(good) and is_whole(copied / "world")
    assert written(copied, "distill") == before


def test_what_was_recorded_stays_and_is_told_of(copied: Path) -> None:
    recorded = sorted(copied.rglob("recordings/**/*"))
    others = [PolicyConfig("random_held", kwargs={"low": 2, "high": 3})]
    said = run(game(copied, policies=others, seed=5), "record")
    told = f"recordings stay as they are, though policies, seed changed: remove {copied}"
    assert any(told in line for line in said)
    assert not any("stay as they are" in line for line in run(game(copied), "record"))
    source = replace(game(copied).source, size=[64, 64])
    with pytest.raises(RecordingError, match="other settings of source: remove it .*folder"):
        run(game(copied, source=source))
    assert sorted(copied.rglob("recordings/**/*")) == recorded


@pytest.mark.usefixtures("without_report")
def test_recordings_that_were_removed_are_made_again(copied: Path) -> None:
    """As the messages say: a run that knew of them once is no obstacle."""
    shutil.rmtree(copied / "recordings")
    source = replace(game(copied).source, size=[64, 64])
    run(game(copied, source=source, seed=5), "record")
    assert RecordedDataset(copied / "recordings").spec.frame_shape == (64, 64, 3)
    with pytest.raises(ValueError, match="tokenizer is stale"):  # and what follows from them
        run(game(copied, source=source, seed=5), "flow")


@pytest.mark.usefixtures("without_report")
def test_who_tried_other_recordings_can_go_back(copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(copied / "recordings", other)
    run(game(copied, recordings=str(other)), "record")
    run(game(copied), "record")


@pytest.mark.usefixtures("without_report")
def test_a_single_stage_leaves_the_plan_of_the_run_alone(copied: Path) -> None:
    """nfd export has no --minutes, and once took the decisions of a longer run away."""
    before, plan = written(copied), (copied / "plan.yaml").read_text()
    minutes = game(copied).minutes
    file = copied.with_suffix(".yaml")
    write_yaml(file, asdict(game(copied, minutes=3 * minutes)))
    assert main(["export", str(file)]) == 0
    assert (copied / "plan.yaml").read_text() == plan and written(copied) == before
    # With another budget that is asked for, nothing is decided for the stages that are not.
    assert main(["train", str(file), "--stage", "flow", "--minutes", str(5 * minutes)]) in (0, 1)
    after = yaml.safe_load((copied / "plan.yaml").read_text())
    assert after["seconds"].keys() <= yaml.safe_load(plan)["seconds"].keys()
    assert written(copied, "tokenizer") == {"tokenizer": before["tokenizer"]}


@pytest.mark.usefixtures("without_report")
def test_how_it_is_judged_is_no_other_training(copied: Path) -> None:
    before = written(copied)
    judged = {
        "flow": {**TINY["flow"], "rollouts": 3},
        "inverse_dynamics": {**TINY["inverse_dynamics"], "validation_windows": 70},
    }
    said = run(game(copied, **judged), "inverse_dynamics") + run(game(copied, **judged), "flow")
    assert not any("made anew" in line for line in said) and written(copied) == before


def test_names_and_keys_change_the_world_alone(copied: Path) -> None:
    before = written(copied)
    source = replace(game(copied).source, action_names=["west", "rest", "east"], fps=10.0)
    run(game(copied, source=source))
    after = written(copied)
    assert {name for name in after if after[name] != before[name]} == {"world"}
    spec = yaml.safe_load((copied / "world" / "world.yaml").read_text())
    assert spec["source"]["action_names"] == ["west", "rest", "east"] and spec["fps"] == 10.0


def test_one_stage_alone_asks_for_those_before_it(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="record has not been finished"):
        run(game(tmp_path / "empty"), "flow")
    with pytest.raises(ValueError, match="stage must be one of record, inverse_dynamics"):
        run(game(copied), "flo")
    reader = game(copied, inverse_dynamics={**TINY["inverse_dynamics"], "channels": 8})
    with pytest.raises(ValueError, match="inverse_dynamics is stale"):
        run(reader, "report")
    before = written(copied)
    assert any("inverse_dynamics is made anew" in line for line in run(reader, "inverse_dynamics"))
    run(reader, "distill")  # nothing is made from the net that reads actions
    assert written(copied) == before
    changed = game(copied, tokenizer={**TINY["tokenizer"], "hard_weight": 0.1})
    with pytest.raises(ValueError, match="tokenizer is stale"):
        run(changed, "flow")


def test_a_gate_stops_with_advice_before_the_next_stage(copied: Path) -> None:
    before = written(copied)
    tokenizer = {**TINY["tokenizer"], "train": {**TINY["tokenizer"]["train"], "steps": 1}}
    (copied / "run.yaml").unlink()  # of what lies there nobody knows what it was made from
    with pytest.raises(GateError, match=r"^tokenizer: .*--keep-going"):
        Recipe(game(copied, tokenizer=tokenizer), say=lambda line: None, progress=False).run()
    after = {**before, "tokenizer": (copied / "tokenizer/model.safetensors").stat().st_mtime_ns}
    assert written(copied) == after != before


def test_a_game_of_twelve_steps_that_fails_now_and_then_ends_in_a_world(tmp_path: Path) -> None:
    source = SourceConfig(
        HOSTILE, imports=["tests.recipe.hostile"], kwargs={"fault": "sometimes", "length": 12}
    )
    said = run(game(tmp_path / "short", source=source, frames=600))
    assert any("warning share of episodes in which the game failed" in line for line in said)
    env = gymnasium.make("NFD/World-v0", world=tmp_path / "short" / "world")
    env.reset(seed=0)
    assert env.step(2)[0].shape == (48, 48, 3)
    assert (tmp_path / "short" / "report.html").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"inverse_dynamics": {"window": 30}},
        {"export": {"start_frames": 12}},
        {"flow": {"frames": 20}},
    ],
)
def test_windows_longer_than_any_episode_are_told_of_before_anything_is_trained(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    source = SourceConfig(HOSTILE, imports=["tests.recipe.hostile"], kwargs={"length": 12})
    with pytest.raises(RecordingError, match=r"has \d+ frames, the longest has 13"):
        run(game(tmp_path / "short", source=source, minutes=30.0, **changes))
    made = {path.name for path in (tmp_path / "short").iterdir() if path.is_dir()}
    assert made == {"recordings"}
