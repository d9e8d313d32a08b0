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

from agents.network import ActorCritic, AgentSpec, PolicyConfig
from nfd_env.cli import main
from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.agents import (
    PolicyPlayer,
    evaluate_agent,
    format_report,
    load_player,
    play_episodes,
)
from nfd_env.models.weights import save_weights
from nfd_env.sources.source import SourceError
from nfd_env.video import read_mp4
from nfd_env.worlds.checksums import write_checksums
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


class Always:
    """Plays one action and notes what it sees first of each episode."""

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
    report = evaluate_agent("random", str(world), 2, **CPU, max_frames=9, progress=False)
    assert len(report["learned"]["scores"]) == 2


def test_the_sampling_of_the_learned_world(world: Path, distilled_world: Path) -> None:
    common: dict[str, Any] = {**CPU, "max_frames": 5, "progress": False}
    report = evaluate_agent("random", str(world), 1, temperature=1.5, history_level=0.4, **common)
    assert report["sampling"]["temperature"] == 1.5 and report["sampling"]["history_level"] == 0.4
    report = evaluate_agent("random", str(distilled_world), 1, dynamics="teacher", **common)
    assert report["dynamics"] == "teacher" and report["sampling"]["steps"] == 3


def test_ends_in_a_thousand_frames(world: Path) -> None:
    report = evaluate_agent("random", str(world), 4, **CPU, progress=False, frame_skip=2)
    assert report["real"]["ends_per_1000_frames"] == pytest.approx(1000 / 12)
    assert report["real"]["ends_standard_error"] == pytest.approx(1000 / 12 / 2)
    cut = evaluate_agent("random", str(world), 4, **CPU, progress=False, max_frames=5)
    assert cut["real"]["ends_per_1000_frames"] == 0 and cut["real"]["truncated"] == 4


def test_truncation_and_frame_skip_are_the_same_on_both_sides(world: Path) -> None:
    for make in (RealVectorEnv, NFDVectorEnv):
        kwargs = {"autoreset_mode": "SameStep"} if make is NFDVectorEnv else {}
        env = make(world, 2, frame_skip=4, max_episode_steps=2, **CPU, **kwargs)
        played = play_episodes(env, Always(), 4, seed=5)
        assert played.steps.max() == 2 and played.truncated.any(), make
        if make is RealVectorEnv:
            assert played.scores.tolist() == [8.0] * 4


def test_both_distributions_the_gap_and_a_film(world: Path, tmp_path: Path) -> None:
    report = evaluate_agent(
        "random", str(world), 5, 1, tmp_path, **CPU, num_envs=3, max_frames=20, threshold=0.0
    )
    for side in ("real", "learned"):
        scores = np.array(report[side]["scores"])
        assert len(scores) == 5 and len(set(scores)) > 1
        assert report[side]["mean"] == pytest.approx(scores.mean())
        assert report[side]["sd"] == pytest.approx(scores.std(ddof=1))
        assert report[side]["share_above_threshold"] == (scores > 0).mean()
    gap = report["learned"]["mean"] - report["real"]["mean"]
    assert report["gap"]["mean"] == pytest.approx(gap)
    assert 0 < report["gap"]["kolmogorov_smirnov"] <= 1
    film = read_mp4(report["video"])
    assert len(film) >= 12  # as long as the real episode
    text = format_report(report)
    assert "| real game |" in text and "| learned world |" in text and "NO REAL" not in text
    # The same seeds, the same scores.
    again = evaluate_agent(
        "random", str(world), 5, 1, **CPU, num_envs=3, max_frames=20, threshold=0.0
    )
    assert again["real"]["scores"] == report["real"]["scores"]
    assert again["learned"]["scores"] == report["learned"]["scores"]


def test_the_agent_may_see_real_frames_as_the_tokenizer_renders_them(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    players: list[Always] = []

    def load(path: str, env: Any, greedy: bool) -> Any:
        players.append(Always())
        return players[-1]

    monkeypatch.setattr("nfd_env.evaluation.agents.import_named", lambda name: load)
    shown = []
    for through in (False, True):
        players.clear()
        evaluate_agent(
            "a.zip", str(world), 1, **CPU, obs_type="rgb", real_only=True, through_tokenizer=through
        )
        shown.append(players[-1].seen[3])
    env = RealVectorEnv(world, 1, **CPU)
    expected = env.model.decode(env.model.encode(torch.from_numpy(shown[0]))).numpy()
    assert not np.array_equal(*shown) and np.array_equal(shown[1], expected)


def test_a_policy_that_looks_inside_the_game(world: Path) -> None:
    name = f"{__name__}:NeedsTheGame"
    with pytest.raises(ValueError, match="more of the game than its frames.*--real-only"):
        evaluate_agent(name, str(world), 2, **CPU, progress=False)
    report = evaluate_agent(name, str(world), 3, **CPU, real_only=True, progress=False)
    assert report["real"]["scores"] == [3.0] * 3
    assert report["learned"] is None and "gap" not in report
    assert "learned world" not in format_report(report)


def test_without_the_real_game_that_is_said(world: Path, tmp_path: Path) -> None:
    folder = edited(world, tmp_path / "w", {"imports": ["gym_super_mario_bros"]})
    report = evaluate_agent("random", str(folder), 2, **CPU, max_frames=5, progress=False)
    assert report["real"] is None and len(report["learned"]["scores"]) == 2
    text = format_report(report)
    assert "NO REAL SCORE" in text and "pip install gym_super_mario_bros" in text
    with pytest.raises(SourceError, match="pip install gym_super_mario_bros"):
        evaluate_agent("random", str(folder), 2, **CPU, real_only=True)


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
    report = evaluate_agent(
        str(saved), str(world), 3, **CPU, num_envs=2, max_frames=9, progress=False
    )
    assert (report["obs_type"], report["frame_skip"]) == ("latent", 2)
    assert report["real"]["decisions"] == 3 * 5  # 9 frames, two a decision
    assert len(report["learned"]["scores"]) == 3


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
        evaluate_agent(str(saved), str(other), 1, **CPU)
    wider = make_world(action_space={"type": "Discrete", "n": 4, "start": 0})
    with pytest.raises(ValueError, match="for the action space"):
        evaluate_agent(str(saved), str(wider), 1, **CPU)
    with pytest.raises(ValueError, match="observations of type latent, this is rgb"):
        evaluate_agent(str(saved), str(world), 1, **CPU, obs_type="rgb", frame_skip=2)
    with pytest.raises(ValueError, match="frame skip of 2, this is 1"):
        evaluate_agent(str(saved), str(world), 1, **CPU, obs_type="latent")


def test_agents_that_cannot_be_loaded(world: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no_such.load:it.*from the folder of a clone"):
        evaluate_agent(str(saved), str(world), 1, **CPU, loader="no_such.load:it")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(saved.read_bytes()[:100])
    for name, message in (
        (str(damaged), "damaged"),
        (str(tmp_path / "none.safetensors"), "no such"),
        (str(tmp_path / "none.zip"), "no such file"),
        ("a_policy", "unknown policy 'a_policy'"),
        ("no.such:Class", "cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_agent(name, str(world), 1, **CPU, progress=False)
    with pytest.raises(ValueError, match="acts on frames and cannot take obs_type='latent'"):
        evaluate_agent("random", str(world), 1, **CPU, obs_type="latent")
    for wrong in ({"episodes": 0}, {"max_frames": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            evaluate_agent("random", str(world), **CPU, **wrong)


def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval-agent", "random", "--world", str(world), "--episodes", "2", "--device"]
    arguments += ["cpu", "--max-frames", "6", "--out", str(tmp_path), "--agent-arg", "high=3"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["real"]["scores"]) == len(report["learned"]["scores"]) == 2
    assert Path(report.pop("video")).is_file()
    assert json.loads((tmp_path / "eval_agent.json").read_text()) == report
    assert main([*arguments, "--agent-arg", "low"]) == 1
    assert "--agent-arg takes KEY=VALUE" in capsys.readouterr().err
    assert main([*arguments, "--agent-arg", "bogus=1"]) == 1
    assert "bogus" in capsys.readouterr().err


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


def test_policies_play_each_environment_on_its_own(world: Path) -> None:
    env = NFDVectorEnv(world, 4, **CPU)
    from nfd_env.data.policies import RandomHeld

    player = PolicyPlayer([RandomHeld(1, 1) for _ in range(4)], env)
    player.reset(4, seed=0)
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    acts = np.array([player.act(frames) for _ in range(40)])
    assert acts.shape == (40, 4) and set(acts.flatten()) == {0, 1, 2}
    assert len({tuple(column) for column in acts.T}) == 4
