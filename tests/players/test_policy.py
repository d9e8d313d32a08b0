"""The policy network and what an agent says of itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributions import Categorical, Independent, Normal

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.models.weights import load_weights, save_weights
from nfd_env.players.load import load_network
from nfd_env.players.policy import (
    ActorCritic,
    AgentError,
    AgentSpec,
    PolicyConfig,
    fingerprint,
    new_stack,
    push,
)
from nfd_env.spaces import space_from_dict, space_to_dict

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
SPACES = [
    spaces.Discrete(3),
    spaces.Discrete(3, start=2),
    spaces.MultiDiscrete([3, 2], start=[1, 0]),
    spaces.MultiBinary(4),
]


def spec(space: spaces.Space | None = None, **kwargs: Any) -> AgentSpec:
    values: dict[str, Any] = {
        "world": "Tiny",
        "obs_type": "latent",
        "observation_shape": [4, 4, 6],
        "action_space": space_to_dict(space or spaces.Discrete(3)),
        "frame_skip": 2,
        "frame_stack": 3,
    }
    return AgentSpec(**{**values, **kwargs})


def policy(space: spaces.Space | None = None, **kwargs: Any) -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(PolicyConfig(spec(space, **kwargs), channels=8, width=16))


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_actions_lie_in_the_space(space: spaces.Space) -> None:
    network, stack = policy(space), torch.randn(64, 3, 4, 4, 6)
    raw, log_prob, value = network.act(stack)
    action = network.playable(raw)
    assert action.shape == (64, *space.shape) and value.shape == (64,)
    assert all(a.numpy().astype(space.dtype) in space for a in action)
    again, entropy, same_value = network.evaluate(stack, raw)
    torch.testing.assert_close(again, log_prob)
    torch.testing.assert_close(same_value, value)
    parts = network(stack)[0].split(network.actions.sizes, -1)
    expected = sum(Categorical(logits=part).entropy() for part in parts)
    torch.testing.assert_close(entropy, expected)


BOXES = [
    spaces.Box(-1, 1, (2,)),
    spaces.Box(np.array([-np.inf, 0, -np.inf]), np.array([np.inf, np.inf, -3.0]), dtype=np.float32),
    spaces.Box(-0.1, 0.1, (2,), np.float64),
    spaces.Box(-1e308, 1.7e308, (1,), np.float64),
    spaces.Box(-1e38, 3e38, (1,)),
    spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,)),
    spaces.Box(0, 255, (3,), np.uint8),
    spaces.Box(2.0, 2.0, (1,)),
]


@pytest.mark.parametrize("space", BOXES, ids=str)
def test_numbers_lie_in_the_box(space: spaces.Box) -> None:
    network, stack = policy(space), torch.randn(64, 3, 4, 4, 6)
    with torch.no_grad():
        network.actions.log_std.fill_(1.0)  # so wide that bounds are reached
    raw, log_prob, value = network.act(stack, generator=torch.Generator().manual_seed(0))
    action = network.playable(raw)
    assert all(a.numpy().astype(space.dtype) in space for a in action)
    largest = np.maximum(np.abs(space.low), np.abs(space.high))
    finite = (largest < np.finfo(np.float32).max) & (space.high > space.low)
    assert finite.any() or np.abs(action).max() < 100  # bounds beyond all numbers are none
    for bound in (space.low, space.high):
        reached = (action.numpy().astype(space.dtype) == bound).any(0)
        assert reached[finite].all()
    again, entropy, _ = network.evaluate(stack, raw)
    torch.testing.assert_close(again, log_prob)
    normal = Independent(Normal(network(stack)[0], network.actions.log_std.exp()), 1)
    torch.testing.assert_close(log_prob, normal.log_prob(raw))
    torch.testing.assert_close(entropy, normal.entropy())
    greedy = network.playable(network.act(stack, greedy=True)[0])
    assert all(a.numpy().astype(space.dtype) in space for a in greedy)
    kept = load_saved(network).float()
    assert all(a.numpy().astype(space.dtype) in space for a in kept.playable(raw))
    torch.testing.assert_close(kept(stack)[0], network(stack)[0])
    torch.testing.assert_close(kept.actions.log_std, network.actions.log_std)


def load_saved(network: ActorCritic) -> ActorCritic:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "agent.safetensors"
        save_weights(path, network, network.config)
        return load_weights(path, ActorCritic, PolicyConfig)


def test_only_the_chosen_observations_are_looked_at() -> None:
    network = ActorCritic(PolicyConfig(spec(frame_stack=6), 8, 16, frame_offsets=[0, 1, 4]))
    assert network.config.offsets == [4, 1, 0]
    stack = torch.randn(2, 6, 4, 4, 6)
    base = network(network.look(stack))[1]
    for back in range(6):
        other = stack.clone()
        other[:, -1 - back] += 1
        assert torch.equal(network(network.look(other))[1], base) == (back not in (0, 1, 4))
    for wrong in ([0, 6], [-1, 0]):
        with pytest.raises(ValueError, match="frame_offsets must lie from 0 to frame_stack - 1"):
            PolicyConfig(spec(frame_stack=6), frame_offsets=wrong)


def test_actions_are_drawn_with_their_probabilities() -> None:
    network = policy()
    with torch.no_grad():
        network.actor.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    stack = torch.randn(1, 3, 4, 4, 6).expand(20_000, -1, -1, -1, -1)
    action, log_prob, _ = network.act(stack, generator=torch.Generator().manual_seed(0))
    probability = network(stack[:1])[0].softmax(-1)[0]
    frequency = torch.bincount(action, minlength=3) / len(action)
    torch.testing.assert_close(frequency, probability, atol=0.015, rtol=0)
    torch.testing.assert_close(log_prob.exp(), probability[action])
    greedy, *_ = network.act(stack[:5], greedy=True)
    assert greedy.tolist() == [1] * 5


def test_frames_are_seen_channels_first_and_by_their_order() -> None:
    network = policy(obs_type="rgb", observation_shape=[32, 48, 3])
    stack = torch.randint(0, 256, (2, 3, 32, 48, 3), dtype=torch.uint8)
    logits, value = network(stack)
    assert logits.shape == (2, 3) and value.shape == (2,)
    assert not torch.equal(value, network(stack.flip(1))[1])


def test_of_features_the_latest_and_of_latents_all_are_seen() -> None:
    network = policy(obs_type="features", observation_shape=[96 + 5], latent_shape=[4, 4, 6])
    stack = torch.randn(2, 3, 96 + 5)
    base = network(stack)[1]
    assert base.shape == (2,)
    for place, part, seen in (
        (0, slice(0, 96), True),
        (0, slice(96, None), False),
        (2, slice(0, 96), True),
        (2, slice(96, None), True),
    ):
        other = stack.clone()
        other[:, place, part] += 1
        assert torch.equal(network(other)[1], base) != seen


def test_stacks() -> None:
    observations = torch.arange(5.0)[:, None, None].expand(5, 2, 1)
    stack = new_stack(observations[0], 3)
    assert stack[:, :, 0].tolist() == [[0, 0, 0]] * 2
    stack = push(stack, observations[1])
    stack = push(stack, observations[2])
    assert stack[:, :, 0].tolist() == [[0, 1, 2]] * 2
    stack = push(stack, observations[3], torch.tensor([True, False]))
    assert stack[:, :, 0].tolist() == [[3, 3, 3], [1, 2, 3]]


def test_stacks_of_episodes_with_a_known_past() -> None:
    now = torch.full((2, 1), 9.0)
    past = torch.arange(4.0)[None, :, None] + torch.tensor([0.0, 10.0])[:, None, None]
    for count, expected in (
        (1, [[9], [9]]),
        (3, [[2, 3, 9], [12, 13, 9]]),
        (5, [[0, 1, 2, 3, 9], [10, 11, 12, 13, 9]]),
        (6, [[0, 0, 1, 2, 3, 9], [10, 10, 11, 12, 13, 9]]),
    ):
        assert new_stack(now, count, past)[:, :, 0].tolist() == expected
    stack = new_stack(torch.zeros(2, 1), 3)
    pushed = push(stack, now, torch.tensor([False, True]), past)
    assert pushed[:, :, 0].tolist() == [[0, 0, 9], [12, 13, 9]]


def test_acting_compiles_in_one_piece() -> None:
    network = policy()
    act = torch.compile(network.act, backend="eager", fullgraph=True)
    action, log_prob, value = act(torch.randn(4, 3, 4, 4, 6))
    assert action.shape == log_prob.shape == value.shape == (4,)


def test_what_the_policy_cannot_take() -> None:
    with pytest.raises(AgentError, match="rgb or latent observations with three axes"):
        policy(observation_shape=[7])
    with pytest.raises(AgentError, match="rgb or latent"):
        policy(obs_type="sound")
    for shape in ([1], [], [4, 0, 6]):
        with pytest.raises(AgentError, match="features are of latents with three axes"):
            policy(obs_type="features", observation_shape=[100], latent_shape=shape)


def test_the_spec_of_an_env(tiny_world: Path) -> None:
    env = NFDVectorEnv(tiny_world, 2, obs_type="latent", frame_skip=2, **CPU)
    mine = AgentSpec.of(env, 3)
    encoder = fingerprint(tiny_world / "tokenizer.safetensors", "encoder.", "normalise.")
    assert mine == spec(encoder=encoder)
    assert space_from_dict(mine.action_space) == env.single_action_space
    mine.check(env)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"world": "Mars"}, "trained for the world Mars, this is Tiny"),
        ({"action_space": space_to_dict(spaces.Discrete(5))}, "for the action space .*'n': 5"),
        ({"obs_type": "rgb"}, "observations of type rgb, this is latent: .*obs_type='rgb'"),
        ({"observation_shape": [4, 8, 6]}, r"observations of shape \[4, 8, 6\]"),
        ({"frame_skip": 4}, "frame skip of 4, this is 2: make the env with frame_skip=4"),
        ({"encoder": "0123"}, "latents of the tokenizer 0123"),
        ({"heads": "0123"}, "features of the heads 0123"),
    ],
)
def test_an_agent_for_something_else(
    tiny_world: Path, changed: dict[str, Any], message: str
) -> None:
    env = NFDVectorEnv(tiny_world, 2, obs_type="latent", frame_skip=2, **CPU)
    with pytest.raises(AgentError, match=message):
        replace(AgentSpec.of(env, 3), **changed).check(env)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frame_skip": 0}, "frame_skip must be from 1 to 10000, got 0"),
        ({"frame_stack": 0}, "frame_stack must be from 1 to 4096, got 0"),
        ({"frame_stack": 10**9}, "frame_stack must be from 1 to 4096"),
        ({"action_space": {}}, "action_space: .*unknown action space type"),
        ({"action_space": {"type": "Discrete"}}, "action_space: KeyError"),
        ({"action_space": {"type": "Discrete", "n": "3"}}, "action_space: "),
    ],
)
def test_an_agent_of_impossible_numbers(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A file of a stranger's: refused, not a division by zero later."""
    with pytest.raises(ValueError, match=message):
        spec(**changed)
    network = policy()
    save_weights(tmp_path / "a.safetensors", network, network.config)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        header, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    told = json.loads(header["config"])
    header["config"] = json.dumps({**told, "spec": {**told["spec"], **changed}})
    save_file(tensors, tmp_path / "a.safetensors", header)
    with pytest.raises(AgentError, match="no agent: .*a.safetensors: holds no usable config"):
        load_network(tmp_path / "a.safetensors")


def test_fingerprints_are_of_what_an_agent_sees(
    tiny_world: Path, make_world: Callable[..., Path]
) -> None:
    def fingerprints(folder: Path, obs_type: str) -> tuple[str, str]:
        made = AgentSpec.of(NFDVectorEnv(folder, 1, obs_type=obs_type, **CPU), 3)
        return made.encoder, made.heads

    other = make_world(seed=1)
    encoder, heads = fingerprints(tiny_world, "features")
    assert fingerprints(tiny_world, "latent") == (encoder, "")
    assert fingerprints(tiny_world, "rgb") == ("", "")
    assert not {encoder, heads} & set(fingerprints(other, "features"))
    # Other dynamics, and another bias of the ends: features are the same.
    assert fingerprints(make_world(distilled=True), "features") == (encoder, heads)
    assert fingerprints(make_world(hazard_bias=-0.5), "features") == (encoder, heads)
