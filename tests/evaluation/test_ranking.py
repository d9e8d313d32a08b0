"""Does a world rank policies as the real game does: the figures by closed form, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfd_env.cli import main
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation import agents
from nfd_env.evaluation.agents import Scores, Scoring
from nfd_env.evaluation.episodes import Episodes
from nfd_env.evaluation.ranking import (
    Interval,
    Ranked,
    Ranking,
    format_ranking,
    pearson,
    rank,
    rank_policies,
    spearman,
    write_ranking,
)


def scores(mean: float, length: int = 4) -> Scores:
    steps = np.full(3, length)
    return Scores.of(Episodes(np.array([mean - 1, mean, mean + 1]), steps, steps < 0, []), 1)


def test_correlations_by_closed_form() -> None:
    left, right = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 16.0])
    assert spearman(left, right) == pytest.approx(1)
    assert pearson(left, right) == pytest.approx(np.corrcoef(left, right)[0, 1])
    assert spearman(left, -right) == pytest.approx(-1)
    # Equals share the mean of their ranks: 0, 1.5, 1.5, 3.
    ties = np.array([1.0, 2.0, 2.0, 9.0])
    assert spearman(left, ties) == pytest.approx(np.corrcoef([0, 1, 2, 3], [0, 1.5, 1.5, 3])[0, 1])
    assert np.isnan(pearson(left, np.ones(4)))


def test_a_kind_world_that_ranks_rightly(tmp_path: Path) -> None:
    policies = [Ranked(f"p{i}", scores(20.0 * i, 8), scores(10.0 * i)) for i in range(1, 9)]
    ranking = rank("Tiny", policies)
    assert ranking.spearman.value == pytest.approx(1) and ranking.spearman.low > 0.95
    assert ranking.pearson.value == pytest.approx(1) and ranking.kindness.value == pytest.approx(2)
    assert ranking.length_ratio == Interval(2, 2, 2)
    assert rank("Tiny", policies) == ranking  # the same seed, the same errors
    plot = write_ranking(ranking, tmp_path)
    assert plot.is_file() and (tmp_path / "ranking.json").is_file()
    assert "Spearman 1.00" in format_ranking(ranking)


def test_a_world_that_ranks_the_wrong_way_round() -> None:
    policies = [Ranked(f"p{i}", scores(-10.0 * i), scores(10.0 * i)) for i in range(5)]
    ranking = rank("Tiny", policies)
    assert ranking.spearman.value == pytest.approx(-1) and ranking.spearman.high < -0.5
    # Where the real mean is 0, there is no ratio.
    assert ranking.kindness == Interval(-1, -1, -1)
    assert np.isnan(rank("Tiny", 3 * policies[:1]).kindness.value)


def test_policies_are_scored_on_both_sides(counter_world: Path) -> None:
    common: dict[str, Any] = {"device": "cpu", "precision": "fp32", "max_frames": 4}
    settings = Scoring(world=str(counter_world), episodes=2, **common)
    always = "tests.counter_env:AlwaysRight"
    for wrong, message in (
        (["random", "random", always], "at least 3 different policies"),
        (["random", always], "at least 3 different policies"),
        (["random", always, "nobody"], "unknown agent 'nobody'"),
        (["random", always, f"{__name__}:Nobody"], "Nobody"),
    ):
        with pytest.raises(ValueError, match=message), pytest.MonkeyPatch.context() as patch:
            patch.setattr("nfd_env.evaluation.ranking.evaluate_agent", None)  # nobody plays
            rank_policies(wrong, settings, progress=False)
    names = ["random", f"{__name__}:Left", f"{__name__}:Right"]
    with pytest.raises(ValueError, match="2 episodes or more a policy, got 1"):
        rank_policies(names, replace(settings, episodes=1), progress=False)
    told: list[Ranking] = []
    ranking = rank_policies(names, settings, False, told.append)
    assert told == [ranking]  # as soon as there are three
    assert [p.agent for p in ranking.policies] == names
    assert [p.real.mean for p in ranking.policies[1:]] == [-4.0, 4.0]


def test_the_command(
    counter_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "rank"
    command = ["rank", "random", f"{__name__}:Left", f"{__name__}:Right", "--episodes", "2"]
    command += ["--world", str(counter_world), "--max-frames", "4", "--out", str(out)]
    command += ["--device", "cpu", "--precision", "fp32"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "Spearman" in text and str(out / "ranking.png") in text
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "ranking.json").read_text())
    assert [p["real"]["mean"] for p in printed["policies"][1:]] == [-4.0, 4.0]
    assert main(["rank", "random", *command[3:]]) == 1
    assert "at least 3 different policies" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["demo"], ["eval-agent", "random", "--world"], ["rank", "a", "b", "c", "--world"]]
)
def test_a_folder_that_cannot_be_made_is_found_out_first(
    command: list[str],
    counter_world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def played(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("played first")

    monkeypatch.setattr(agents, "play_episodes", played)
    monkeypatch.setattr(NFDVectorEnv, "step", played)
    (tmp_path / "file").touch()
    out = ["--out", str(tmp_path / "file" / "x"), "--device", "cpu", "--precision", "fp32"]
    assert main([*command, str(counter_world), *out]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"nfd: {tmp_path / 'file' / 'x'}") and "cannot be written" in shown


class Left:
    """Moves the counter down."""

    action = 0

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        pass

    def act(self, observation: np.ndarray) -> int:
        return self.action


class Right(Left):
    """Moves it up."""

    action = 2
