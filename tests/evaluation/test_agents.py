"""An agent in the learned world and in the real game: the same rules on both sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nfd_env.cli import main
from nfd_env.data.policies import RandomHeld
from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.agents import (
    AgentEvaluation,
    AgentReport,
    Scores,
    evaluate_agent,
    format_report,
    longest_episode,
)
from nfd_env.evaluation.episodes import Episodes, play_episodes
from nfd_env.models.weights import save_weights
from nfd_env.players.load import agents_of, load_player
from nfd_env.players.player import FunctionPlayer, PolicyPlayer
from nfd_env.players.policy import ActorCritic, AgentError, AgentSpec, PolicyConfig
from nfd_env.sources.source import SourceError
from nfd_env.video import read_mp4
from nfd_env.worlds.checksums import write_checksums
from nfd_env.worlds.format import read_spec
from tests.counter_env import ENV_ID, read

RIGHT = 2
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
MakeWorld = Callable[..., Path]


def edited(folder: Path, to: Path, source: dict[str, Any], **values: Any) -> Path:
    """A copy of a world folder with another real game behind it, or another name."""
    shutil.copytree(folder, to)
    path = to / "world.yaml"
    spec = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**spec, **values, "source": {**spec["source"], **source}}))
    write_checksums(to)
    return to


@pytest.fixture(scope="module")
def world(make_world: MakeWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world with the counter game behind it, 12 steps an episode."""
    source = {"env_id": ENV_ID, "imports": ["tests.counter_env"], "frames": "observation"}
    return edited(make_world(hazard_bias=-2.0), tmp_path_factory.mktemp("w") / "tiny", source)


def evaluated(
    agent: str, world: Path | str, episodes: int, seed: int = 0, folder: Any = None, **kwargs: Any
) -> AgentReport:
    given = {**CPU, "agent": agent, "world": str(world), "episodes": episodes, "seed": seed}
    return evaluate_agent(AgentEvaluation(**{**given, **kwargs}), folder, progress=False)


def scores_of(report: AgentReport) -> tuple[Scores, Scores]:
    assert report.real is not None and report.learned is not None
    return report.real, report.learned


class Always:
    """Plays one action and notes what it sees first of each episode."""

    spec = None

    def __init__(self, action: int = RIGHT) -> None:
        self.action, self.seen, self.beginnings = action, [], []

    def reset(self, n: int, seed: int | None = None) -> None:
        self.n = n

    def act(self, observations: Any, first: Any = None) -> Any:
        begins = np.ones(self.n, bool) if first is None else first
        self.beginnings += [observations[row] for row in np.flatnonzero(begins)]
        self.seen.append(observations)
        return np.full(self.n, self.action)


class NeedsTheGame:
    """A policy that looks inside the real game, and asks for episodes of three steps."""

    real_kwargs = {"length": 3}

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        self.game = env.unwrapped

    def act(self, observation: np.ndarray) -> int:
        assert read(observation)[1] == self.game.steps
        return RIGHT


def test_every_real_episode_has_its_own_seed_and_is_scored_whole(world: Path) -> None:
    env, player = RealVectorEnv(world, 2, **CPU), Always()
    played = play_episodes(env, player, 5, seed=10)
    assert played.scores.tolist() == [12.0] * 5 and played.steps.tolist() == [12] * 5
    assert not played.truncated.any() and played.film == []
    expected = [read(env.envs[0].reset(seed=s)[0])[0] for s in range(10, 15)]
    # The first 2 start together, then the next 2, and the last beside one that is not scored.
    assert [read(frame)[0] for frame in player.beginnings[:5]] == expected
    env.close()


def test_an_episode_does_not_depend_on_those_beside_it(world: Path) -> None:
    def play(num_envs: int) -> Any:
        env = NFDVectorEnv(world, num_envs, autoreset_mode="SameStep", max_episode_steps=30, **CPU)
        return play_episodes(env, Always(), 6, seed=3, options={"start": "beginning"}, film=99)

    few, many = play(2), play(6)
    assert np.array_equal(few.steps, many.steps) and len(set(few.steps)) > 2
    assert np.allclose(few.scores, many.scores, atol=1e-3)
    assert np.array_equal(few.truncated, few.steps == 30)
    # From the first frame to the last before the end.
    assert len(few.film) == few.steps[0] and few.film[0].shape == (32, 48, 3)


def test_only_environments_with_work_left_are_stepped(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    original = NFDVectorEnv.step

    def step(self: NFDVectorEnv, actions: Any) -> Any:
        assert len(actions) == self.num_envs
        batches.append(self.num_envs)
        return original(self, actions)

    monkeypatch.setattr(NFDVectorEnv, "step", step)
    env = NFDVectorEnv(world, 8, autoreset_mode="SameStep", max_episode_steps=30, **CPU)
    played = play_episodes(env, Always(), 8, seed=3, options={"start": "beginning"})
    assert batches[0] == 8 and batches[-1] < 4 and sorted(batches, reverse=True) == batches
    alone = [play_episodes(env, Always(), 1, s, {"start": "beginning"}) for s in range(3, 11)]
    assert played.steps.tolist() == [int(one.steps[0]) for one in alone]
    assert np.allclose(played.scores, [one.scores[0] for one in alone], atol=1e-3)


def test_random_keys_need_no_pictures(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*args: Any) -> Any:
        raise AssertionError("a frame was decoded for a player that does not look")

    monkeypatch.setattr("nfd_env.inference.world_model.WorldModel.decode", decode)
    report = evaluated("random", world, 2, max_frames=9)
    assert report.learned is not None and len(report.learned.scores) == 2


def test_the_sampling_of_the_learned_world(world: Path, distilled_world: Path) -> None:
    report = evaluated("random", world, 1, temperature=1.5, history_level=0.4, max_frames=5)
    assert report.sampling["temperature"] == 1.5 and report.sampling["history_level"] == 0.4
    report = evaluated("random", distilled_world, 1, dynamics="teacher", max_frames=5)
    assert report.dynamics == "teacher" and report.sampling["steps"] == 3


def test_lengths_and_ends(world: Path) -> None:
    real, _ = scores_of(evaluated("random", world, 4, frame_skip=2))
    assert real.ends_per_1000_frames == pytest.approx(1000 / 12)
    assert real.ends_error == pytest.approx(1000 / 12 / 2)
    assert real.length == 12 and real.length_error == 0
    cut, _ = scores_of(evaluated("random", world, 4, max_frames=5))
    assert cut.ends_per_1000_frames == 0 and cut.truncated == 4 and cut.length == 5


def test_a_summary_of_episodes() -> None:
    played = Episodes(
        np.array([1.0, 3.0, 8.0]), np.array([2, 4, 6]), np.array([False, True, False]), []
    )
    row = Scores.of(played, 4, threshold=2.0)
    assert (row.mean, row.median, row.min, row.max) == (4.0, 3.0, 1.0, 8.0)
    assert row.sd == pytest.approx(np.sqrt(13)) and row.standard_error == pytest.approx(
        np.sqrt(13 / 3)
    )
    assert row.share_above_threshold == pytest.approx(2 / 3)
    assert row.length == 16 and row.length_error == pytest.approx(8 / np.sqrt(3))
    assert row.truncated == 1 and row.decisions == 12
    assert row.ends_per_1000_frames == pytest.approx(1000 * 2 / 48)


def test_the_longest_episode_is_the_worlds(world: Path, tmp_path: Path) -> None:
    limited = edited(world, tmp_path / "w", {}, max_episode_steps=7)
    assert evaluated("random", limited, 1).settings.max_frames == 7
    assert longest_episode(read_spec(world)) == 60 * 35  # a minute


def test_truncation_and_frame_skip_are_the_same_on_both_sides(world: Path) -> None:
    for make in (RealVectorEnv, NFDVectorEnv):
        kwargs = {"autoreset_mode": "SameStep"} if make is NFDVectorEnv else {}
        env = make(world, 2, frame_skip=4, max_episode_steps=2, **CPU, **kwargs)
        played = play_episodes(env, Always(), 4, seed=5)
        assert played.steps.max() == 2 and played.truncated.any(), make
        if make is RealVectorEnv:
            assert played.scores.tolist() == [8.0] * 4


def test_both_distributions_the_gap_and_a_film(world: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"num_envs": 3, "max_frames": 20}
    report = evaluated("random", world, 5, 1, tmp_path, threshold=0.0, **few)
    real, learned = scores_of(report)
    for side in (real, learned):
        assert len(side.scores) == 5 and len(set(side.scores)) > 1
        assert side.share_above_threshold == (np.array(side.scores) > 0).mean()
    assert report.gap is not None and 0 < report.gap.kolmogorov_smirnov <= 1
    assert report.gap.mean == pytest.approx(learned.mean - real.mean)
    assert report.gap.length == pytest.approx(learned.length - real.length)
    film = read_mp4(report.video)
    assert len(film) >= 12  # as long as the real episode
    text = format_report(report)
    assert "| real game |" in text and "| learned world |" in text and "NO REAL" not in text
    assert "above 0" in text
    # The same seeds, the same scores; nobody asked for a threshold.
    again = evaluated("random", world, 5, 1, **few)
    assert [side.scores for side in scores_of(again)] == [real.scores, learned.scores]
    assert "above" not in format_report(again)


SHOWN: list[np.ndarray] = []


class Watching:
    """A policy that notes what it is shown."""

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        SHOWN.clear()

    def act(self, observation: np.ndarray) -> int:
        SHOWN.append(observation.copy())
        return RIGHT


def test_the_agent_may_see_real_frames_as_the_tokenizer_renders_them(world: Path) -> None:
    shown = []
    for through in (False, True):
        name = f"{__name__}:Watching"
        evaluated(name, world, 1, real_only=True, through_tokenizer=through)
        shown.append(SHOWN[3])
    env = RealVectorEnv(world, 1, **CPU)
    expected = env.model.decode(env.model.encode(torch.from_numpy(shown[0][None]))).numpy()[0]
    assert not np.array_equal(*shown) and np.array_equal(shown[1], expected)


def test_a_policy_that_looks_inside_the_game(world: Path) -> None:
    name = f"{__name__}:NeedsTheGame"
    with pytest.raises(ValueError, match="more of the game than its frames.*--real-only"):
        evaluated(name, world, 2)
    report = evaluated(name, world, 3, real_only=True)
    assert report.real is not None and report.real.scores == [3.0] * 3
    assert report.learned is None and report.gap is None
    assert "learned world" not in format_report(report)


def test_without_the_real_game_that_is_said(world: Path, tmp_path: Path) -> None:
    folder = edited(world, tmp_path / "w", {"imports": ["gym_super_mario_bros"]})
    report = evaluated("random", str(folder), 2, max_frames=5)
    assert report.real is None and report.gap is None and report.learned is not None
    text = format_report(report)
    assert "NO REAL SCORE" in text and "pip install gym_super_mario_bros" in text
    with pytest.raises(SourceError, match="pip install gym_super_mario_bros"):
        evaluated("random", str(folder), 2, real_only=True)


# ------------------------------------------------------------------------------------- agent files


@pytest.fixture(scope="module")
def saved(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained native agent of ``world``, on two stacked latents, every other frame."""
    env = NFDVectorEnv(world, 1, obs_type="latent", frame_skip=2, **CPU)
    torch.manual_seed(0)
    policy = ActorCritic(PolicyConfig(AgentSpec.of(env, 2), channels=4, width=8))
    path = tmp_path_factory.mktemp("agents") / "agent.safetensors"
    save_weights(path, policy, policy.config)
    return path


def test_an_agent_file_says_how_it_plays(world: Path, saved: Path) -> None:
    report = evaluated(str(saved), world, 3, num_envs=2, max_frames=9)
    assert (report.settings.obs_type, report.settings.frame_skip) == ("latent", 2)
    real, learned = scores_of(report)
    assert real.decisions == 3 * 5  # 9 frames, two a decision
    assert report.settings.max_frames == 10
    with pytest.raises(ValueError, match="obs_type='latent'.*leave out through_tokenizer"):
        evaluated(str(saved), world, 1, through_tokenizer=True)
    assert len(learned.scores) == 3


def test_agents_lie_beside_their_world(world: Path, saved: Path, tmp_path: Path) -> None:
    folder = edited(world, tmp_path / "w", {})
    (folder / "agents").mkdir()
    shutil.copy(saved, folder / "agents" / "good.safetensors")
    assert evaluated("good", folder, 1, max_frames=4).settings.obs_type == "latent"
    assert list(agents_of(folder)) == ["good"]
    with pytest.raises(ValueError, match=r"unknown agent 'bad'.*\(.*doom_take_cover.*, good\)"):
        evaluated("bad", folder, 1)
    # An agent says which world it plays, where that comes with the package.
    with pytest.raises(ValueError, match="trained in the world Tiny, which does not come with"):
        evaluated(str(saved), "", 1)
    with pytest.raises(ValueError, match="random does not say which world"):
        evaluated("random", "", 1)


def test_a_player_of_a_file_or_a_policy(world: Path, saved: Path) -> None:
    env = NFDVectorEnv(world, 2, obs_type="latent", frame_skip=2, **CPU)
    for name in (str(saved), "random"):
        player = load_player(name, env)
        player.reset(2, seed=0)
        assert env.action_space.contains(player.act(env.reset(seed=0)[0]))


def test_an_agent_of_something_else(
    world: Path, saved: Path, make_world: MakeWorld, tmp_path: Path
) -> None:
    other = edited(world, tmp_path / "other", {}, name="Elsewhere")
    with pytest.raises(ValueError, match="for the world Tiny, this is Elsewhere"):
        evaluated(str(saved), str(other), 1)
    wider = make_world(action_space={"type": "Discrete", "n": 4, "start": 0})
    with pytest.raises(ValueError, match="for the action space"):
        evaluated(str(saved), str(wider), 1)
    with pytest.raises(ValueError, match="observations of type latent, this is rgb"):
        evaluated(str(saved), world, 1, obs_type="rgb", frame_skip=2)
    with pytest.raises(ValueError, match="frame skip of 2, this is 1"):
        evaluated(str(saved), world, 1, frame_skip=1)


def test_agents_that_cannot_be_loaded(world: Path, saved: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(saved.read_bytes()[:100])
    for name, message in (
        (str(damaged), "damaged"),
        (str(tmp_path / "none.safetensors"), "no such"),
        (str(tmp_path / "none.zip"), "no such file"),
        ("a_policy", "unknown agent 'a_policy'"),
        ("no.such:Class", "cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluated(name, world, 1)
    with pytest.raises(ValueError, match="acts on frames and cannot take obs_type='latent'"):
        evaluated("random", world, 1, obs_type="latent")
    for wrong in ({"episodes": 0}, {"max_frames": -1}, {"frame_skip": 0}):
        with pytest.raises(ValueError, match="must be at least [01], got"):
            evaluated("random", world, **{"episodes": 1, **wrong})


def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--world", str(world), "--episodes", "2", "--device", "cpu"]
    arguments += ["--max-frames", "6", "--out", str(tmp_path)]
    assert main(["eval-agent", "random,high=3,mistakes=0.5", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["real"]["scores"]) == len(report["learned"]["scores"]) == 2
    assert Path(report["video"]).is_file()
    assert json.loads((tmp_path / "eval_agent.json").read_text()) == report
    for wrong, message in (
        ("random,low", "arguments of a policy are key=value"),
        ("random,bogus=1", "bogus"),
        ("random,mistakes=often", "mistakes must be a probability, got 'often'"),
        ("random,mistakes=2", "mistakes must be a probability, got 2"),
    ):
        assert main(["eval-agent", wrong, *arguments]) == 1
        assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------- batch of real games


def test_some_real_games_start_again(world: Path) -> None:
    env = RealVectorEnv(world, 3, **CPU)
    mask = np.array([False, True, False])
    with pytest.raises(Exception, match="first reset"):
        env.reset(options={"reset_mask": mask})
    env.reset(seed=0)
    before = env.step(np.full(3, RIGHT))[0]
    after, _ = env.reset(seed=[None, 7, None], options={"reset_mask": mask})
    assert np.array_equal(after[[0, 2]], before[[0, 2]])
    assert np.array_equal(after[1], env.envs[0].reset(seed=7)[0])
    assert np.array_equal(env.frames(), after)
    after[:] = 0
    assert env.frames().any()
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": [True, False]})
    env.close()


class Stumbling(RandomHeld):
    """Fails at the second frame."""

    def reset(self, env: Any, rng: np.random.Generator) -> None:
        super().reset(env, rng)
        self.steps = 0

    def act(self, observation: np.ndarray) -> Any:
        self.steps += 1
        if self.steps == 2:
            raise KeyError("no such\nplace")
        return super().act(observation)


def test_a_policy_that_fails_is_one_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval-agent", f"{__name__}:Stumbling", "--world", str(world), "--episodes", "2"]
    command += ["--device", "cpu", "--precision", "fp32"]
    assert main(command) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "policy Stumbling failed in environment 0, step 2: KeyError" in said
    assert "test_agents.py" in said
    with pytest.raises(AgentError):
        main([*command, "--debug"])

    def stumble(frame: np.ndarray) -> int:
        raise ZeroDivisionError

    with pytest.raises(AgentError, match="function stumble failed in environment 0, step 1: Zero"):
        FunctionPlayer(stumble).act(np.zeros((2, 32, 48, 3), np.uint8))


def test_policies_play_each_environment_on_its_own(world: Path) -> None:
    env = NFDVectorEnv(world, 4, **CPU)
    player = PolicyPlayer([RandomHeld(1, 1) for _ in range(4)], env)
    player.reset(4, seed=0)
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    acts = np.array([player.act(frames) for _ in range(40)])
    assert acts.shape == (40, 4) and set(acts.flatten()) == {0, 1, 2}
    assert len({tuple(column) for column in acts.T}) == 4
