"""Whole trainings, the files that they leave, and playing those."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.train_ppo import main
from nfd_env import config
from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.envs.wrappers import GuardConfig
from nfd_env.evaluation.benchmark import describe_device
from nfd_env.evaluation.episodes import play_episodes
from nfd_env.learning import train as train_ppo
from nfd_env.learning.judge import Judge, describe
from nfd_env.learning.ppo import PPOConfig
from nfd_env.learning.train import TrainPPOConfig
from nfd_env.models.weights import CheckpointError, load_weights
from nfd_env.players.load import load_network, load_player, read_agent_spec
from nfd_env.players.player import NetworkPlayer
from nfd_env.players.policy import ActorCritic, AgentError, PolicyConfig, new_stack
from nfd_env.spaces import CountedFromZero
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.starts import StartsConfig
from nfd_env.worlds.load import load_world
from tests.clients.action_spaces import ACTION_SPACES, FINITE

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
METRICS = {"ends_per_1000_frames", "real_ends_per_1000_frames", "real_score"}
METRICS |= {"real_score_error", "real_length"}
SPEC = {"obs_type": "latent", "frame_skip": 2}  # of the trained agents below


def settings(folder: Path, world: Path | str = "Tiny", **kwargs: Any) -> TrainPPOConfig:
    values: dict[str, Any] = {
        "decisions": 64,
        "num_envs": 4,
        "frame_skip": 2,
        "frame_stack": 2,
        "max_episode_frames": 20,
        "env": {"precision": "fp32"},
        "channels": 8,
        "width": 16,
        "device": "cpu",
        "ppo": PPOConfig(rollout_steps=8, minibatch_size=16, epochs=2),
    }
    return TrainPPOConfig(folder=str(folder), world=str(world), **{**values, **kwargs})


@pytest.fixture(scope="module")
def trained(counter_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the counter world, evaluated in the real game. Do not write into it."""
    folder = tmp_path_factory.mktemp("run")
    metrics = train_ppo.train(
        settings(folder, counter_world, evaluate_every=32, evaluate_episodes=3),
        progress=False,
    )
    assert metrics.keys() == METRICS | {"score"}
    return folder


def make(world: Path, num_envs: int = 3, real: bool = False, **kwargs: Any) -> Any:
    arguments = {**SPEC, "max_episode_steps": 8, **CPU, **kwargs}
    if real:
        return RealVectorEnv(world, num_envs, **arguments)
    return NFDVectorEnv(world, num_envs, autoreset_mode="SameStep", **arguments)


def test_it_leaves_an_agent_state_and_logs(trained: Path) -> None:
    names = {p.name for p in trained.iterdir() if not p.name.startswith(".")}
    assert names == {"agent.safetensors", "state.pt", "tensorboard"}
    assert load_network(trained / "agent.safetensors").spec.trained_in == "world"


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_the_agent_plays_both(trained: Path, counter_world: Path, real: bool, output: str) -> None:
    env = make(counter_world, real=real, output=output)
    agent = load_player(trained / "agent.safetensors", env)
    first = play_episodes(env, agent, 5, seed=3).scores
    assert first.shape == (5,) and np.isfinite(first).all()
    assert np.array_equal(play_episodes(env, agent, 5, seed=3).scores, first)
    agent.reset(3, seed=0)
    action = agent.act(env.reset(seed=0)[0])
    assert isinstance(action, torch.Tensor if output == "torch" else np.ndarray)


def test_it_decides_on_the_stack(trained: Path, counter_world: Path) -> None:
    env = make(counter_world, output="torch")
    agent: Any = load_player(trained / "agent.safetensors", env, greedy=True)
    assert isinstance(agent, NetworkPlayer)
    agent.reset(3)
    a, b = env.reset(seed=0)[0], env.reset(seed=9)[0]
    agent.act(a)
    agent.act(b, first=torch.tensor([False, True, False]))
    expected = torch.stack([a, b], 1)
    expected[1] = new_stack(b, 2)[1]
    assert torch.equal(agent._stack, expected)


def test_a_training_that_cannot_begin_closes_its_games(
    counter_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    original = train_ppo.make_env
    monkeypatch.setattr(train_ppo, "make_env", lambda plan: made.append(original(plan)) or made[-1])
    with pytest.raises(AgentError, match="nobody"):
        plan = settings(tmp_path, counter_world, real=True, initial="nobody")
        train_ppo.train(plan, progress=False)
    assert len(made) == 1 and made[0].closed


def test_the_same_command_continues(tiny_world: Path, tmp_path: Path) -> None:
    short = settings(tmp_path, tiny_world, decisions=32)
    train_ppo.train(short, progress=False)
    before = torch.load(tmp_path / "state.pt", weights_only=True)
    assert before["decisions"] == 32
    train_ppo.train(short, progress=False)  # there is nothing left to do
    same = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(same["policy"][k], v) for k, v in before["policy"].items())
    train_ppo.train(replace(short, decisions=96), progress=False)
    after = torch.load(tmp_path / "state.pt", weights_only=True)
    assert after["decisions"] == 96
    steps = [s["optimiser"]["state"][0]["step"].item() for s in (before, after)]
    assert steps == [4, 12]  # two minibatches, two epochs: four to an update
    agent = load_network(tmp_path / "agent.safetensors")
    assert isinstance(agent, NetworkPlayer)
    for name, value in agent.policy.state_dict().items():
        assert torch.equal(value, after["policy"][name].half().float())  # it is stored in half


def agents_of(folder: Path) -> dict[str, Any]:
    return {p.name: load_network(p).policy.state_dict() for p in folder.glob("*.safetensors")}


def test_agents_are_kept_from_poor_to_good(tiny_world: Path, tmp_path: Path) -> None:
    plan = settings(tmp_path, tiny_world, decisions=64, keep=[0, 20, 64], fresh_rollouts=True)
    train_ppo.train(plan, progress=False)
    kept = agents_of(tmp_path)
    names = [f"agent-{at:09d}.safetensors" for at in plan.keep]
    assert sorted(kept) == [*names, "agent.safetensors"]
    first, second, last, newest = (list(kept[name].values())[0] for name in sorted(kept))
    assert torch.equal(last, newest)
    assert not torch.equal(first, second) and not torch.equal(second, last)
    # An update has 32 decisions, and the first one's learning rate is the same for all.
    train_ppo.train(replace(plan, folder=str(tmp_path / "short"), decisions=32), False)
    stopped = agents_of(tmp_path / "short")["agent.safetensors"]
    assert all(torch.equal(value, kept[names[1]][name]) for name, value in stopped.items())
    assert names[2] not in agents_of(tmp_path / "short")  # what is beyond its end is not reached
    more = replace(plan, decisions=128, keep=[*plan.keep, 128])
    train_ppo.train(more, progress=False)  # it goes on, and keeps what is new
    assert "agent-000000128.safetensors" in agents_of(tmp_path)
    with pytest.raises(AgentError, match=r"is at 128 decisions and has not kept .* after \[40\]"):
        train_ppo.train(replace(more, keep=[40]), progress=False)
    with pytest.raises(ValueError, match=r"keep must be numbers of decisions from 0, got \[-1\]"):
        replace(plan, keep=[-1, 65])


@pytest.mark.parametrize("trainer", ["native", "sb3"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_after_all_is_saved(
    tiny_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainer: str,
    number: signal.Signals,
) -> None:
    updates = []

    def signalled(*args: Any) -> Any:
        updates.append(1)
        if len(updates) == 2:
            os.kill(os.getpid(), number)
        return original(*args)

    plan: Any = settings(tmp_path, tiny_world, decisions=320)
    run: Any = train_ppo.train
    if trainer == "native":
        owner, name = train_ppo, "update"
    else:
        pytest.importorskip("stable_baselines3")
        from agents import train_sb3
        from agents.benchmark_ppo import as_sb3

        plan, run, owner, name = as_sb3(plan), train_sb3.train, train_sb3.PPO, "train"
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, signalled)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for what runs in the background
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            run(plan, progress=False)
    finally:
        signal.signal(signal.SIGINT, ignored)
    if trainer == "native":
        assert torch.load(tmp_path / "state.pt", weights_only=True)["decisions"] == 64
    else:
        assert train_sb3.PPO.load(tmp_path / "agent.zip").num_timesteps == 64
    run(replace(plan, decisions=96), progress=False)
    assert len(updates) == 3


@pytest.mark.parametrize("damage", ["empty", "foreign", "optimiser", "agent"])
def test_a_state_that_cannot_be_used_is_named(
    tiny_world: Path, tmp_path: Path, damage: str
) -> None:
    plan = settings(tmp_path, tiny_world, decisions=32)
    train_ppo.train(plan, progress=False)
    path = tmp_path / "state.pt"
    state = torch.load(path, weights_only=True)
    state = {
        "empty": None,
        "foreign": {"step": 3},
        "optimiser": {**state, "optimiser": {}},
        "agent": {**state, "policy": {"weights": torch.zeros(3)}},
    }[damage]
    path.write_bytes(b"") if state is None else torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="state.pt: no .*remove it to begin again") as error:
        train_ppo.train(plan, progress=False)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_killed_in_an_update_it_continues_from_the_checkpoint(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = []

    def interrupted(*args: Any) -> Any:
        updates.append(1)
        if len(updates) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = train_ppo.update
    monkeypatch.setattr(train_ppo, "update", interrupted)
    plan = settings(tmp_path, tiny_world, decisions=128, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        train_ppo.train(plan, progress=False)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["decisions"] == 64
    train_ppo.train(plan, progress=False)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["decisions"] == 128
    assert len(updates) == 5


def test_with_fresh_rollouts_going_on_is_exact(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(name: str) -> TrainPPOConfig:
        return settings(
            tmp_path / name, tiny_world, fresh_rollouts=True, decisions=128, checkpoint_seconds=0.0
        )

    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = train_ppo.update
    train_ppo.train(plan("whole"), progress=False)
    monkeypatch.setattr(train_ppo, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_ppo.train(plan("stopped"), progress=False)
    train_ppo.train(plan("stopped"), progress=False)
    one, other = (
        load_network(tmp_path / name / "agent.safetensors").policy.state_dict()
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_training_in_the_real_game(counter_world: Path, tmp_path: Path) -> None:
    metrics = train_ppo.train(settings(tmp_path, counter_world, real=True), progress=False)
    assert np.isfinite(metrics["score"])
    agent = load_player(tmp_path / "agent.safetensors", make(counter_world))
    assert agent.spec.trained_in == "real game"
    with pytest.raises(AgentError, match="choose another folder"):
        train_ppo.train(settings(tmp_path, counter_world), progress=False)


def test_without_the_real_game_it_says_so(
    counter_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "tests.counter_env", None)  # which registers the game
    plan = settings(tmp_path, counter_world, evaluate_every=32, evaluate_episodes=2)
    metrics = train_ppo.train(plan, progress=True)
    assert metrics.keys() == {"score", "ends_per_1000_frames"}
    printed = "".join(capsys.readouterr())
    assert printed.count("no score of the real game beside the world's") == 1


@pytest.fixture
def branched(
    counter_world: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Settings of branched rollouts in the counter world."""
    monkeypatch.setattr("nfd_env.training.starts._STRANGE", np.inf)  # its own starts are noise
    latents = tmp_path / "latents"
    encode(
        EncodeConfig(str(recordings), str(counter_world / "tokenizer.safetensors"), str(latents))
    )
    starts = StartsConfig(str(recordings), str(latents), count=40, frames=3, margin=5)
    return {"starts": starts, "horizon_frames": 8}


@pytest.mark.parametrize("trainer", ["native", "sb3"])
def test_guarded_training(counter_world: Path, tmp_path: Path, trainer: str) -> None:
    def score(name: str, guard: GuardConfig | None, real: bool = False) -> float:
        plan: Any = settings(tmp_path / name, counter_world, decisions=256, guard=guard)
        if trainer == "native":
            return train_ppo.train(replace(plan, real=real), progress=False)["score"]
        pytest.importorskip("stable_baselines3")
        from agents import train_sb3
        from agents.benchmark_ppo import as_sb3

        return train_sb3.train(as_sb3(plan), progress=False)["score"]

    free = score("free", None)
    assert score("lenient", GuardConfig(penalty=1e6, threshold=1e6, truncate=True)) == free
    assert score("penalised", GuardConfig(penalty=100.0, threshold=1e-3)) < free - 10
    # Cut at once, there is next to nothing to win or lose.
    cut = score("cut", GuardConfig(threshold=1e-3, truncate=True))
    assert 0 < abs(cut) < abs(free)
    with pytest.raises(ValueError, match="penalty must be at least 0"):
        score("wrong", GuardConfig(penalty=-1.0))
    if trainer == "native":  # the game itself is not guarded
        guard = GuardConfig(penalty=100.0, threshold=1e-3)
        assert score("guarded", guard, real=True) == score("game", None, real=True)


@pytest.mark.parametrize("trainer", ["native", "sb3"])
def test_branched_rollouts(
    counter_world: Path, tmp_path: Path, branched: dict[str, Any], trainer: str
) -> None:
    plan: Any = settings(
        tmp_path / "run", counter_world, evaluate_every=32, evaluate_episodes=2, **branched
    )
    if trainer == "native":
        env = train_ppo.make_env(plan)
        metrics = train_ppo.train(plan, progress=False)
    else:
        pytest.importorskip("stable_baselines3")
        from agents import train_sb3
        from agents.benchmark_ppo import as_sb3

        plan = as_sb3(plan)
        plan = replace(plan, evaluate_every=32, evaluate_episodes=2)
        env = train_sb3.make_env(plan)[0].unwrapped.env  # type: ignore
        metrics = train_sb3.train(plan, progress=False)
    assert len(env.starts) == 40 and env.max_episode_steps == 4  # of two frames
    # What an episode of 8 frames pays is no score, and real episodes are not cut off there.
    assert metrics.keys() == METRICS
    assert metrics["real_ends_per_1000_frames"] == pytest.approx(1000 / 12)
    assert 0 < metrics["ends_per_1000_frames"] < 1000


def test_it_can_begin_with_an_agent(trained: Path, counter_world: Path, tmp_path: Path) -> None:
    initial = str(trained / "agent.safetensors")
    learned = load_weights(Path(initial), ActorCritic, PolicyConfig).state_dict()
    env = make(counter_world)
    policy, _ = train_ppo.make_policy(env, settings(tmp_path, initial=initial))
    assert all(torch.equal(v, learned[k]) for k, v in policy.state_dict().items())
    # More observations change nothing at first, fewer cannot do.
    more = settings(tmp_path, initial=initial, frame_stack=5, frame_offsets=[0, 1, 4])
    further, _ = train_ppo.make_policy(env, more)
    stack = torch.randn(3, 5, 4, 4, 6)
    for one, other in zip(policy(stack[:, -2:]), further(further.look(stack)), strict=True):
        torch.testing.assert_close(one, other)
    # So do features instead of latents; then they are learned to be used.
    features = make(counter_world, obs_type="features")
    more = replace(more, obs_type="features", ppo=replace(more.ppo, learning_rate=0.1))
    aware, optimiser = train_ppo.make_policy(features, more)
    told = torch.cat([stack.flatten(2), torch.randn(3, 5, 16)], -1)
    for one, other in zip(policy(stack[:, -2:]), aware(aware.look(told)), strict=True):
        torch.testing.assert_close(one, other)
    aware(aware.look(told))[1].sum().backward()
    optimiser.step()
    assert aware.beside.weight.abs().min() > 0
    with pytest.raises(AgentError, match="observations of type latent, this is rgb"):
        rgb = settings(tmp_path, initial=initial, obs_type="rgb")
        train_ppo.make_policy(make(counter_world, obs_type="rgb"), rgb)
    for other in ({"width": 32}, {"frame_stack": 1}, {"frame_stack": 3, "frame_offsets": [0, 2]}):
        with pytest.raises(AgentError, match="cannot begin with"):
            train_ppo.make_policy(env, settings(tmp_path, initial=initial, **other))
    with pytest.raises(AgentError, match="cannot begin with"):
        train_ppo.make_policy(env, settings(tmp_path, initial=initial, real=True))


def test_an_agent_of_features(trained: Path, counter_world: Path, tmp_path: Path) -> None:
    initial = str(trained / "agent.safetensors")
    plan = settings(tmp_path, counter_world, obs_type="features", initial=initial)
    plan = replace(plan, evaluate_every=32, evaluate_episodes=2)
    metrics = train_ppo.train(plan, progress=False)
    assert metrics.keys() == METRICS | {"score"}
    path = tmp_path / "agent.safetensors"
    for real in (False, True):
        env = make(counter_world, real=real, obs_type="features")
        agent = load_player(path, env)
        assert len(agent.spec.heads) == 16 and agent.spec.latent_shape == [4, 4, 6]
        assert np.isfinite(play_episodes(env, agent, 4, seed=0).scores).all()
    with pytest.raises(AgentError, match="obs_type='features'"):
        load_player(path, make(counter_world))
    longer = settings(tmp_path / "longer", obs_type="features", initial=str(path))
    further, _ = train_ppo.make_policy(make(counter_world, obs_type="features"), longer)
    learned = load_weights(path, ActorCritic, PolicyConfig).state_dict()
    assert all(torch.equal(v, learned[k]) for k, v in further.state_dict().items())


def test_no_score_of_a_world_without_the_real_one() -> None:
    assert describe({"score": 900.0}, real=False, missing="") == {}
    both = {"score": 900.0, "real_score": 400.0}
    assert describe(both, real=False, missing="") == {"score": "900", "real_score": "400"}
    assert describe({"score": 900.0}, real=True, missing="") == {"score": "900"}
    assert describe({"score": 900.0}, real=False, missing="no game") == {"score": "900"}


def test_the_judge_always_asks_the_same(trained: Path, counter_world: Path) -> None:
    agent = load_network(trained / "agent.safetensors")
    judge = Judge(load_world(counter_world, **CPU), 3, 8, "cpu")
    state = torch.get_rng_state()
    first, second = judge.play(agent), judge.play(agent)
    assert first is not None and second is not None
    assert np.array_equal(first.scores, second.scores)
    assert torch.equal(torch.get_rng_state(), state)
    judge.close()


def test_command_line(
    tiny_world: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text(
        f"folder: {tmp_path / 'run'}\nworld: {tiny_world}\ndecisions: 32\nnum_envs: 4\n"
        "device: cpu\nmax_episode_frames: 8\nppo: {rollout_steps: 8, minibatch_size: 16}\n"
    )
    command = [str(path)]
    assert main([*command, "frame_stack=2", "channels=8"]) == 0
    printed = capsys.readouterr()
    assert f"nfd eval-agent {tmp_path / 'run'}/agent.safetensors" in printed.out
    assert "score=" not in printed.err  # the real game was not asked
    agent = load_network(tmp_path / "run" / "agent.safetensors")
    assert (agent.spec.frame_stack, agent.spec.frame_skip) == (2, 4)
    for wrong, message in (
        (["ppo.bogus=1"], "bogus"),
        (["ppo.minibatch_size=7"], "does not divide the batch"),
        (["obs_type=sound"], "obs_type must be one of"),
    ):
        assert main([*command, *wrong]) == 1
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert main([*command, "world=Mars"]) == 1
    assert "unknown world 'Mars'" in capsys.readouterr().err


def test_the_shipped_configs_fit() -> None:
    folder = Path(__file__).parents[2] / "configs" / "doom_take_cover"
    native = config.load(TrainPPOConfig, folder / "ppo.yaml")
    assert native.max_episode_steps == 525
    pytest.importorskip("stable_baselines3")
    from agents.benchmark_ppo import as_sb3
    from agents.train_sb3 import TrainSB3Config

    sb3 = config.load(TrainSB3Config, folder / "ppo_sb3.yaml")
    expected = as_sb3(native)
    assert {**expected.ppo, **sb3.ppo} == expected.ppo
    same = ("num_envs", "frame_skip", "frame_stack", "obs_type", "channels", "reward_scale")
    same += ("starts", "horizon_frames", "max_episode_frames", "width", "frame_offsets")
    assert all(getattr(sb3, name) == getattr(expected, name) for name in same)


def test_the_agents_go_on_from_one_another() -> None:
    folder = Path(__file__).parents[2] / "configs" / "doom_take_cover"
    first = config.load(TrainPPOConfig, folder / "ppo.yaml")
    then = config.load(TrainPPOConfig, folder / "ppo_memory.yaml")
    assert then.initial == f"{first.folder}/agent.safetensors"
    assert (then.channels, then.width, then.frame_skip) == (32, 256, first.frame_skip)
    assert set(range(first.frame_stack)) <= set(then.frame_offsets)
    # A start's frames fill the stack.
    assert then.starts is not None
    assert then.starts.frames > (then.frame_stack - 1) * then.frame_skip
    last = config.load(TrainPPOConfig, folder / "ppo_features.yaml")
    assert last.initial == f"{then.folder}/agent.safetensors" and last.obs_type == "features"
    assert (last.channels, last.width, last.frame_offsets) == (32, 256, then.frame_offsets)


# Loading agents that do not fit.


def test_agents_of_another_world_or_action_space(
    trained: Path, make_world: Callable[..., Path], counter_world: Path
) -> None:
    path = trained / "agent.safetensors"
    load_player(path, make(counter_world))
    with pytest.raises(AgentError, match="latents of the tokenizer"):
        load_player(path, make(make_world(seed=1)))
    four = make_world(action_space={"type": "MultiBinary", "n": 4})
    with pytest.raises(AgentError, match="trained for the action space"):
        load_player(path, make(four))
    with pytest.raises(AgentError, match="obs_type='latent'"):
        load_player(path, make(counter_world, obs_type="rgb"))
    with pytest.raises(AgentError, match="frame_skip=2"):
        load_player(path, make(counter_world, frame_skip=1))


def test_observations_of_another_shape(trained: Path) -> None:
    agent = load_network(trained / "agent.safetensors")
    agent.reset(2)
    with pytest.raises(
        AgentError, match=r"takes observations \(2, 4, 4, 6\), got \(2, 32, 48, 3\)"
    ):
        agent.act(np.zeros((2, 32, 48, 3), np.uint8))


def test_files_that_are_no_agents(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="no such checkpoint"):
        load_network(tmp_path / "agent.safetensors")
    with pytest.raises(AgentError, match="holds a Tokenizer, not a ActorCritic"):
        load_network(tiny_world / "tokenizer.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nonsense")
    with pytest.raises(AgentError, match="damaged or not a safetensors file"):
        load_network(damaged)


def assert_in(space: spaces.Space, actions: np.ndarray) -> None:
    assert all(action.astype(space.dtype) in space for action in actions)


@pytest.mark.parametrize("space", ACTION_SPACES.values(), ids=ACTION_SPACES.keys())
def test_every_action_space(
    make_world: Callable[..., Path], tmp_path: Path, space: dict[str, Any]
) -> None:
    world = make_world(action_space=space)
    metrics = train_ppo.train(settings(tmp_path, world), progress=False)
    assert np.isfinite(metrics["score"])
    env = make(world)
    agent = load_player(tmp_path / "agent.safetensors", env)
    agent.reset(3, seed=0)
    observation, _ = env.reset(seed=0)
    played = []
    for _ in range(20):
        action = agent.act(observation)
        played.append(action)
        assert all(
            a.astype(env.single_action_space.dtype) in env.single_action_space for a in action
        )
        observation, *_ = env.step(action)
    assert len(np.unique(np.array(played))) > 1
    assert np.isfinite(play_episodes(env, agent, 2, seed=0).scores).all()


# Stable-Baselines3.


def sb3_settings(folder: Path, world: Path | str = "Tiny", **kwargs: Any) -> Any:
    pytest.importorskip("stable_baselines3")
    from agents.benchmark_ppo import as_sb3

    return replace(as_sb3(settings(folder, world)), **kwargs)


@pytest.mark.parametrize(
    ("obs_type", "policy"),
    [("latent", "trunk"), ("rgb", "trunk"), ("latent", "MlpPolicy"), ("features", "MlpPolicy")],
)
def test_sb3_trains_and_plays(
    counter_world: Path, tmp_path: Path, obs_type: str, policy: str
) -> None:
    plan = sb3_settings(
        tmp_path,
        counter_world,
        obs_type=obs_type,
        policy=policy,
        evaluate_every=32,
        evaluate_episodes=2,
    )
    if policy == "trunk":
        plan = replace(plan, frame_stack=4, frame_offsets=[0, 3])
    from agents import train_sb3

    metrics = train_sb3.train(plan, progress=False)
    assert metrics.keys() == METRICS | {"score"}
    for real in (False, True):
        env = make(counter_world, real=real, obs_type=obs_type)
        agent = load_player(tmp_path / "agent.zip", env, trust=True)
        assert np.isfinite(play_episodes(env, agent, 4, seed=0).scores).all()
    env = make(counter_world, obs_type=obs_type, frame_skip=1)
    with pytest.raises(AgentError, match="frame_skip=2"):
        load_player(tmp_path / "agent.zip", env, trust=True)


@pytest.mark.parametrize("name", FINITE)
def test_an_sb3_agent_of_every_action_space(
    make_world: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    env = make(make_world(action_space=ACTION_SPACES[name]))
    seen = spaces.Box(-np.inf, np.inf, env.single_observation_space.shape, np.float32)
    given = CountedFromZero(env.single_action_space).space

    class Game(gymnasium.Env):
        observation_space, action_space = seen, given

    model = stable_baselines3.PPO("MlpPolicy", Game(), n_steps=8, batch_size=8, device="cpu")
    model.save(tmp_path / "own.zip")
    agent = load_player(tmp_path / "own.zip", env, trust=True)
    agent.reset(3, seed=0)
    observation, _ = env.reset(seed=0)
    for _ in range(20):
        action = agent.act(observation)
        assert all(
            a.astype(env.single_action_space.dtype) in env.single_action_space for a in action
        )
        observation, *_ = env.step(action)


def test_sb3_looks_at_the_chosen_observations() -> None:
    pytest.importorskip("stable_baselines3")
    from agents.train_sb3 import TrainSB3Config, TrunkExtractor

    space = spaces.Box(-np.inf, np.inf, (6 * 4, 4, 6), np.float32)
    extractor = TrunkExtractor(space, "latent", 8, 16, 6, [0, 1, 4])
    stack = torch.randn(2, 6 * 4, 4, 6)
    base = extractor(stack)
    for back in range(6):
        other = stack.clone()
        other.unflatten(1, (6, 4))[:, -1 - back] += 1
        assert torch.equal(extractor(other), base) == (back not in (0, 1, 4))
    with pytest.raises(ValueError, match="frame_offsets must lie from 0 to frame_stack - 1"):
        TrainSB3Config("x", "Tiny", 1, frame_stack=3, frame_offsets=[0, 3])
    with pytest.raises(ValueError, match="frame_offsets need trunk"):
        TrainSB3Config("x", "Tiny", 1, policy="MlpPolicy", frame_offsets=[0])


def test_sb3_sees_the_stack_it_was_trained_on(tiny_world: Path, tmp_path: Path) -> None:
    """The agent gives its model exactly what VecFrameStack did."""
    plan = sb3_settings(tmp_path, tiny_world, frame_stack=3)
    from agents import train_sb3
    from nfd_env.players.player import SB3Player

    venv, spec = train_sb3.make_env(plan)
    seen: list[np.ndarray] = []

    class Model:
        def predict(self, observation: np.ndarray, deterministic: bool) -> Any:
            seen.append(observation.copy())
            return np.zeros(len(observation), int), None

        def set_random_seed(self, seed: int) -> None:
            seeds.append(seed)

    seeds: list[int] = []
    agent = SB3Player(Model(), spec)
    for seed in (5, 5 + 2**32, 5 + 2**64):
        agent.reset(plan.num_envs, seed)
    assert seeds[0] == 5 and len(set(seeds)) == 3 and max(seeds) < 2**32
    agent.reset(plan.num_envs)
    stacked, dones = venv.reset(), np.zeros(plan.num_envs, bool)
    for _ in range(14):
        agent.act(stacked[:, -4:], first=dones)
        assert np.array_equal(seen[-1], stacked)
        stacked, _, dones, _ = venv.step(np.zeros(plan.num_envs, int))


def test_sb3_continues(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sb3_settings(tmp_path, tiny_world, keep=[0, 33])
    from stable_baselines3 import PPO

    from agents import train_sb3

    train_sb3.train(plan, progress=False)
    assert PPO.load(tmp_path / "agent.zip").num_timesteps == 64
    train_sb3.train(replace(plan, decisions=96, keep=[0, 33, 96]), progress=False)
    model = PPO.load(tmp_path / "agent.zip")
    assert model.num_timesteps == 96 and model._n_updates == 2 * 3
    kept = {p.name: PPO.load(p).num_timesteps for p in tmp_path.glob("agent-*.zip")}
    assert kept == {"agent-000000000.zip": 0, "agent-000000033.zip": 64, "agent-000000096.zip": 96}
    made: list[Any] = []
    original = train_sb3.make_env
    monkeypatch.setattr(train_sb3, "make_env", lambda s: made.append(original(s)) or made[-1])
    with pytest.raises(AgentError, match="another world, observation type, frame skip or stack"):
        train_sb3.train(replace(plan, frame_skip=1), progress=False)
    assert train_sb3.native_env(made[0][0]).closed
    with pytest.raises(AgentError, match="cannot be continued"):
        train_sb3.train(replace(plan, frame_stack=3), progress=False)
    for changed, message in (
        ({"width": 32}, "width=16, not 32"),
        ({"policy": "MlpPolicy"}, "policy=trunk, not MlpPolicy"),
        ({"ppo": {**plan.ppo, "use_sde": True}}, "with these settings: .*continuous actions"),
    ):
        with pytest.raises(AgentError, match=message):
            train_sb3.train(replace(plan, **changed), progress=False)
    faster = {**plan.ppo, "n_steps": 16, "gamma": 0.5, "learning_rate": 0.01, "ent_coef": 0.1}
    train_sb3.train(replace(plan, decisions=160, keep=[], ppo=faster), progress=False)
    model = PPO.load(tmp_path / "agent.zip")
    assert (model.num_timesteps, model.n_steps, model.gamma) == (160, 16, 0.5)
    assert (model.lr_schedule(1.0), model.ent_coef) == (0.01, 0.1)


def test_somebodys_own_sb3_agent(
    tiny_world: Path, make_world: Callable[..., Path], tmp_path: Path
) -> None:
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.vec_env import VecFrameStack

    from nfd_env.sb3 import make_vec_env

    kwargs = {"world": tiny_world, "obs_type": "latent", **CPU}
    venv = VecFrameStack(make_vec_env("NFD/World-v0", 2, env_kwargs=kwargs), 2, "first")
    stable_baselines3.DQN("MlpPolicy", venv, buffer_size=10, device="cpu").save(tmp_path / "own")
    path = f"DQN:{tmp_path / 'own.zip'}"
    assert read_agent_spec(path, trust=True) is None
    env = make(tiny_world)
    agent = load_player(path, env, trust=True)
    assert agent.spec.frame_stack == 2
    assert np.isfinite(play_episodes(env, agent, 3, seed=0).scores).all()
    of_features = make_vec_env("NFD/World-v0", 2, env_kwargs={**kwargs, "obs_type": "features"})
    stacked = VecFrameStack(of_features, 3)
    stable_baselines3.DQN("MlpPolicy", stacked, buffer_size=10).save(tmp_path / "features")
    assert load_player(
        f"DQN:{tmp_path / 'features.zip'}", make(tiny_world, obs_type="features"), trust=True
    )
    with pytest.raises(AgentError, match=r"takes observations \(8, 4, 6\)"):
        load_player(path, make(tiny_world, obs_type="rgb"), trust=True)
    with pytest.raises(AgentError, match="for the action space"):
        load_player(
            path, make(make_world(action_space={"type": "MultiBinary", "n": 4})), trust=True
        )
    with pytest.raises(AgentError, match="cannot be loaded as PPO"):
        load_player(tmp_path / "own.zip", make(tiny_world), trust=True)
    with pytest.raises(AgentError, match="no such file"):
        load_player(tmp_path / "other.zip", env, trust=True)


def test_sb3_settings_that_do_not_go(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CnnPolicy takes pictures, not obs_type='latent'"):
        sb3_settings(tmp_path, policy="CnnPolicy")
    with pytest.raises(ValueError, match="not features: set policy: MlpPolicy"):
        sb3_settings(tmp_path, obs_type="features")
    with pytest.raises(ValueError, match="policy must be"):
        sb3_settings(tmp_path, policy="Transformer")
    from agents import train_sb3

    wrong = sb3_settings(tmp_path, world=tiny_world, ppo={"bogus": 1})
    with pytest.raises(AgentError, match="bogus"):
        train_sb3.train(wrong, progress=False)


def test_the_benchmark_measures_both(tiny_world: Path, tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    from agents.benchmark_ppo import benchmark, format_report

    plan = settings(tmp_path, tiny_world)
    report = benchmark(plan, updates=1, repeats=2)
    assert list(report) == ["native, latent", "sb3, latent", "native, rgb", "sb3, rgb"]
    for row in report.values():
        assert 0 < row["lowest"] <= row["decisions_per_second"] <= row["highest"]
        assert row["frames_per_second"] == 2 * row["decisions_per_second"]
    # Each is compared with the native one of the same observations.
    lines = format_report(report, plan).splitlines()
    assert lines[0].startswith(f"PPO on {describe_device(torch.device('cpu'))}, ")
    assert len(lines) == 8 and lines[4].endswith("| 1 |") and lines[6].endswith("| 1 |")
    native, sb3 = report["native, rgb"], report["sb3, rgb"]
    assert native["ratio"] == 1 and native["ratio_error"] == 0
    low, high = native["lowest"] / sb3["highest"], native["highest"] / sb3["lowest"]
    assert low <= sb3["ratio"] <= high and sb3["ratio_error"] >= 0
    assert lines[7].endswith(f"| {sb3['ratio']:.3f} ± {sb3['ratio_error']:.3f} |")
    assert not any(tmp_path.iterdir())  # it leaves nothing behind


def test_loading_without_stable_baselines3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "agent.zip").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(AgentError, match=r"pip install 'nfd-env\[sb3\]'"):
        read_agent_spec(tmp_path / "agent.zip", trust=True)


def test_the_agent_moves_with_its_file(trained: Path, counter_world: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "agent.safetensors", tmp_path / "other.safetensors")
    env = make(counter_world)
    scores = [
        play_episodes(env, load_player(path, env), 3, seed=1).scores
        for path in (trained / "agent.safetensors", tmp_path / "other.safetensors")
    ]
    assert np.array_equal(*scores)
