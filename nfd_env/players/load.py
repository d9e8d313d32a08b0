"""Agents by name or file: native ones, Stable-Baselines3's, behaviour policies and functions."""

from __future__ import annotations

import re
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from nfd_env import config
from nfd_env.data.policies import make_policy
from nfd_env.files import found_file
from nfd_env.models.weights import CheckpointError, load_weights
from nfd_env.named import check_trusted
from nfd_env.players.player import (
    FunctionPlayer,
    NetworkPlayer,
    Player,
    PolicyPlayer,
    SB3Player,
)
from nfd_env.players.policy import ActorCritic, AgentError, AgentSpec, PolicyConfig
from nfd_env.spaces import CountedFromZero
from nfd_env.worlds.checksums import verify_listed
from nfd_env.worlds.format import AGENTS
from nfd_env.worlds.load import find_world, shipped_worlds

SPEC_ATTRIBUTE = "nfd_spec"  # of a saved Stable-Baselines3 model
_FILES = (".safetensors", ".zip")


def shipped_agents() -> dict[str, Path]:
    """Names and files of the agents that come with the shipped worlds."""
    return {name: path for w in shipped_worlds() for name, path in agents_of(find_world(w)).items()}


def agents_of(world: str | PathLike[str]) -> dict[str, Path]:
    """Names and files of the agents that lie in a world's folder, under ``agents/``."""
    return {path.stem: path for path in sorted((find_world(world) / AGENTS).glob("*.safetensors"))}


def find_agent(agent: str | PathLike[str], world: str | PathLike[str] | None = None) -> str:
    """The file of an agent that lies beside a world, by its name; other names as they are.

    Args:
        agent: a file, the name of an agent of ``world`` or of a shipped world, or a behaviour
            policy, see ``behaviour_policy``. In front of a zip that is not of PPO stands its class:
            "DQN:agent.zip".
        world: a world folder or the name of a shipped world.

    Raises:
        AgentError: when it is none of these; names the agents that there are.
    """
    text = str(agent)
    name = text.partition(",")[0]
    if name == "random" or ":" in name or text.endswith(_FILES):
        return text
    known = shipped_agents() | (agents_of(world) if world is not None else {})
    if text in known:
        path = known[text]
        verify_listed(path.parents[1], f"{AGENTS}/{path.name}")
        return str(path)
    raise AgentError(
        f"unknown agent {text!r}: neither a file (.safetensors, .zip), nor random, nor the "
        f"module:Class of a policy, nor an agent of a world "
        f"({', '.join(known) or 'none are shipped'})"
    )


def read_agent_spec(
    agent: Any, world: str | PathLike[str] | None = None, trust: bool = False
) -> AgentSpec | None:
    """What an agent's file says that it was trained on; None where nothing says so.

    Args and errors are those of ``load_player``.
    """
    text = find_agent(agent, world) if isinstance(agent, str | PathLike) else ""
    if not text.endswith(_FILES):
        return None
    if text.endswith(".zip"):
        return _sb3_spec(_read_sb3(text, trust), text)
    return _read_native(text).config.spec


def load_player(
    agent: Any,
    env: Any,
    greedy: bool = False,
    trust: bool = False,
    check: bool = True,
) -> Player:
    """The player of an agent for ``env``.

    Args:
        agent: a name or file, see ``find_agent``; a ``Player`` (which has ``act`` and ``reset`` for
            a batch, and a ``spec``); or a function (or SB3-like object with ``predict``) of one
            frame.
        env: the (real or learned) vector env of a world that it is to play.
        greedy: take the most probable action instead of drawing one.
        trust: whoever made a ``.zip`` may run code here, see ``nfd_env.named.check_trusted``.
        check: compare what it was trained on with ``env``.

    Raises:
        AgentError: when there is no such agent, or it was trained for something else than ``env``.
        UntrustedError: for a ``.zip`` without ``trust``.
        ValueError: when a behaviour policy cannot be made.
    """
    player = _player(agent, env, greedy, trust)
    if check and player.spec is not None:
        player.spec.check(env)
    return player


def _player(agent: Any, env: Any, greedy: bool, trust: bool) -> Player:
    if not isinstance(agent, str | PathLike):
        if hasattr(agent, "spec"):
            return agent
        if hasattr(agent, "predict"):
            return FunctionPlayer(lambda frame: agent.predict(frame, deterministic=greedy)[0])
        if hasattr(agent, "act"):
            if env.num_envs != 1:
                raise AgentError(
                    "a policy object plays one environment; give its module:Class for several"
                )
            return PolicyPlayer([agent], env)
        if callable(agent):
            return FunctionPlayer(agent)
        raise AgentError(f"an agent must be callable or have act() or predict(), got {agent!r}")
    text = find_agent(agent, getattr(getattr(env, "world", None), "folder", None))
    if text.endswith(".zip"):
        return _load_sb3(text, env, greedy, trust)
    if text.endswith(".safetensors"):
        policy = _read_native(text)
        return NetworkPlayer(policy.requires_grad_(False).to(env.model.device), greedy)
    return PolicyPlayer([behaviour_policy(text) for _ in range(env.num_envs)], env)


def behaviour_policy(text: str) -> Any:
    """A behaviour policy of recordings by its name and arguments.

    Args:
        text: "random" (held keys) or "module:Class", then its arguments, and ``mistakes`` as in a
            game file: "random,low=1,high=1", "module:Class,caution=30,mistakes=0.2".

    Raises:
        ValueError: when there is no such policy or it does not take these arguments.
    """
    name, *given = re.split(r",(?=\w+=)", text)
    if "," in name:
        raise AgentError(f"{text}: arguments of a policy are key=value, such as random,low=1")
    kwargs = {}
    for argument in given:
        key, _, value = argument.partition("=")
        kwargs[key] = config.value(value, f"{name}: {key}")
    mistakes = kwargs.pop("mistakes", 0.0)
    if not isinstance(mistakes, int | float):
        raise AgentError(f"{name}: mistakes must be a probability, got {mistakes!r}")
    return make_policy("random_held" if name == "random" else name, kwargs, mistakes)


def load_network(path: str | PathLike[str]) -> NetworkPlayer:
    """The native agent in a ``.safetensors`` file, on the CPU, whatever it is for.

    Raises:
        AgentError: when the file is missing, damaged or no agent.
    """
    return NetworkPlayer(_read_native(str(path)).requires_grad_(False))


def _read_native(path: str) -> ActorCritic:
    try:
        return load_weights(Path(path).expanduser(), ActorCritic, PolicyConfig)
    except CheckpointError as error:
        raise AgentError(f"no agent: {error}") from None


def _read_sb3(text: str, trust: bool) -> Any:
    algorithm, _, name = text.rpartition(":")
    path = Path(name).expanduser()
    if not found_file(path, AgentError):
        raise AgentError(f"no agent: {name}: no such file")
    check_trusted(path, trust)
    try:
        import stable_baselines3
    except ImportError:
        raise AgentError("an SB3 agent needs: pip install 'nfd-env[sb3]'") from None
    try:
        return getattr(stable_baselines3, algorithm or "PPO").load(path, device="cpu")
    except Exception as error:  # whatever a damaged zip or another algorithm leads to
        raise AgentError(f"{name} cannot be loaded as {algorithm or 'PPO'}: {error}") from None


def _sb3_spec(model: Any, name: str) -> AgentSpec | None:
    values = getattr(model, SPEC_ATTRIBUTE, None)
    return None if values is None else config.from_mapping(AgentSpec, values, name)


def _load_sb3(text: str, env: Any, greedy: bool, trust: bool) -> SB3Player:
    model = _read_sb3(text, trust)
    spec = _sb3_spec(model, text) or _guess_spec(model, env, text)
    return SB3Player(model, spec, greedy)


def _guess_spec(model: Any, env: Any, name: str) -> AgentSpec:
    """The spec of somebody's own SB3 agent whose spaces fit ``env``; frame skip is trusted."""
    if model.action_space != CountedFromZero(env.single_action_space).space:
        raise AgentError(
            f"{name} was trained for the action space {model.action_space}, "
            f"this is {env.single_action_space}: load an agent of this action space"
        )
    shape, own = model.observation_space.shape, env.single_observation_space.shape
    for count in range(1, 33):
        stacked = (*own[:-1], count * own[-1])
        if env.obs_type == "latent":
            stacked = (count * own[0], *own[1:])
        # SB3 moves the channels of images first.
        moved = (stacked[2], *stacked[:2]) if env.obs_type == "rgb" else stacked
        if shape in (stacked, moved):
            return replace(AgentSpec.of(env, count), trained_in="unknown")
    raise AgentError(
        f"{name} takes observations {shape}, this env gives {env.single_observation_space.shape} "
        f"of type {env.obs_type}: make the env with the observations of its training "
        "(--obs-type and --frame-skip say what the file does not)"
    )
