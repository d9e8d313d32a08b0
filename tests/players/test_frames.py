"""Agents that are shown one frame after the other, in play and in recordings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from nfd_env.data.policies import make_policy
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.models.weights import save_weights
from nfd_env.named import UntrustedError, import_named
from nfd_env.players.frames import AgentPolicy, FramePlayer
from nfd_env.players.load import load_player, read_agent_spec
from nfd_env.players.policy import ActorCritic, AgentError, AgentSpec, PolicyConfig
from nfd_env.worlds.load import load_world

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
SHAPE = (32, 48, 3)


@pytest.fixture(scope="module")
def agents(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained agents of the tiny world, one of each kind of observation, every other frame."""
    made = {}
    for obs_type in ("rgb", "latent", "features"):
        env = NFDVectorEnv(tiny_world, 1, obs_type=obs_type, frame_skip=2, **CPU)
        torch.manual_seed(0)
        policy = ActorCritic(PolicyConfig(AgentSpec.of(env, 2), channels=4, width=8))
        with torch.no_grad():
            policy.actor.weight.normal_()
        made[obs_type] = tmp_path_factory.mktemp("agents") / f"{obs_type}.safetensors"
        save_weights(made[obs_type], policy, policy.config)
    return made


def clip(frames: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, *SHAPE), np.uint8)


@pytest.mark.parametrize("obs_type", ["rgb", "latent", "features"])
def test_it_sees_what_it_was_trained_on(
    tiny_world: Path, agents: dict[str, Path], obs_type: str
) -> None:
    world = load_world(tiny_world, **CPU)
    player = FramePlayer(agents[obs_type], world.action_space, SHAPE, world, greedy=True)
    seen: list[np.ndarray] = []
    act = player.player.act
    player.player.act = lambda o, first=None: act(seen.append(np.array(o)) or o, first)  # type: ignore
    actions = [player(frame) for frame in clip()]
    # It decides on every other frame and keeps the action in between.
    assert actions[0::2][:4] == actions[1::2] and len(seen) == 5
    frames = torch.from_numpy(clip())
    latents = world.model.encode(frames)
    if obs_type == "rgb":
        expected = frames
    elif obs_type == "latent":
        expected = latents
    else:
        memory, made = world.model.heads.initial_state(1), []
        into = torch.zeros(1, world.codec.width)
        for i in range(len(frames)):
            if i:
                into = world.codec.encode(torch.tensor([actions[i - 1]]))
                memory = world.model.remember(latents[i : i + 1], into, memory)
            made.append(world.model.features(latents[i : i + 1], into, memory))
        expected = torch.cat(made)
    np.testing.assert_allclose(np.concatenate(seen), expected[::2].numpy(), atol=1e-5)


def test_forks_and_episodes_do_not_disturb_one_another(
    tiny_world: Path, agents: dict[str, Path]
) -> None:
    world = load_world(tiny_world, **CPU)
    player = FramePlayer(agents["features"], world.action_space, SHAPE, world)
    player.begin(seed=3)
    alone = [player(frame) for frame in clip()]
    other = player.fork()
    player.begin(seed=3)
    together = []
    for frame in clip():
        together.append(player(frame))
        other(frame[::-1])
    assert together == alone


def test_what_it_cannot_play(agents: dict[str, Path], tiny_world: Path) -> None:
    space = spaces.Discrete(3)
    with pytest.raises(AgentError, match="for the world Tiny and cannot play a game of no world"):
        FramePlayer(agents["rgb"], space, SHAPE)
    with pytest.raises(AgentError, match="for the action space"):
        FramePlayer(agents["rgb"], spaces.Discrete(4), SHAPE, load_world(tiny_world, **CPU))
    with pytest.raises(AgentError, match="unknown agent 'nobody'.*doom_take_cover_features"):
        FramePlayer("nobody", space, SHAPE)
    with pytest.raises(AgentError, match="must be callable"):
        FramePlayer(7, space, SHAPE)


def test_a_recording_of_an_agent(tiny_world: Path, agents: dict[str, Path]) -> None:
    kwargs = {"agent": str(agents["latent"]), "world": str(tiny_world)}
    policy = make_policy("nfd_env.players.frames:AgentPolicy", kwargs)
    env: Any = SimpleNamespace(action_space=spaces.Discrete(3))
    runs = []
    for _ in range(2):
        policy.reset(env, np.random.default_rng(5))
        runs.append([policy.act(frame) for frame in clip()])
    assert runs[0] == runs[1] and set(runs[0]) <= {0, 1, 2}
    assert isinstance(policy, AgentPolicy)


# ---------------------------------------------------------------------------------------- trust


def test_sb3_files_need_trust_wherever_they_are_loaded(tmp_path: Path) -> None:
    """Before anything of the file is read, and without Stable-Baselines3 too."""
    path = tmp_path / "agent.zip"
    path.write_bytes(b"whatever")
    stub: Any = SimpleNamespace(num_envs=1, world=None)
    loads = (
        lambda: read_agent_spec(str(path)),
        lambda: load_player(f"DQN:{path}", stub),
        lambda: FramePlayer(str(path), spaces.Discrete(3), SHAPE),
        lambda: make_policy("sb3", {"path": str(path)}),
    )
    for load in loads:
        with pytest.raises(UntrustedError, match="agent.zip: loading .* runs whatever .*--trust"):
            load()


def test_the_current_folder_hides_no_installed_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit('ran')")
    (tmp_path / "my_own_policy.py").write_text("class Mine:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    assert callable(import_named("colorsys:rgb_to_hsv"))
    assert import_named("my_own_policy:Mine").__name__ == "Mine"
