"""One episode of a real game, checked and copied at every call: the game is foreign code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from nfd_env.data.episode import Episode
from nfd_env.data.layout import RecordingError
from nfd_env.data.policies import BehaviourPolicy
from nfd_env.spaces import ActionCodec

# What it returns is described at ``CollectConfig.signals``.
Signals = Callable[[gymnasium.Env], np.ndarray]


def record_episode(
    env: gymnasium.Env,
    behaviour: BehaviourPolicy,
    seed: int,
    max_steps: int,
    signals: Signals | None = None,
    **labels: str,
) -> Episode:
    """Play one episode of ``env`` with ``behaviour`` and return it, with ``signals`` of it.

    ``actions[t]`` of the result was chosen on ``frames[t]`` and caused ``frames[t + 1]``. What the
    environment and the policy are given is theirs to change.

    Raises:
        RecordingError: when a frame, an action, a reward or a signal is not what it must be; names
            environment, seed and step.
    """
    step = 0

    def wrong(what: str) -> RecordingError:
        name = env.spec.id if env.spec else type(env.unwrapped).__name__
        return RecordingError(f"{name}, episode of seed {seed}, step {step}: {what}")

    try:
        codec = ActionCodec(env.action_space)
    except ValueError as error:
        raise wrong(str(error)) from None
    observation, _ = env.reset(seed=seed)
    frames = [_frame(observation, None, wrong)]
    behaviour.reset(env, np.random.default_rng(seed))
    actions, rewards, terminations, truncations, told = [], [], [], [], []
    for step in range(max_steps):
        action = _action(behaviour.act(frames[-1].copy()), env.action_space, codec, wrong)
        # Scalars cannot be changed, arrays can.
        observation, reward, terminated, truncated, _ = env.step(action.copy()[()])
        frames.append(_frame(observation, frames[0].shape, wrong))
        actions.append(action)
        rewards.append(_number(reward, "reward", wrong))
        terminations.append(bool(_number(terminated, "terminated", wrong)))
        last = step + 1 == max_steps and not terminations[-1]
        truncations.append(bool(_number(truncated, "truncated", wrong)) or last)
        told.append(_signals(signals(env) if signals else (), wrong))
        if terminations[-1] or truncations[-1]:
            break
    if len({t.shape for t in told}) > 1:
        raise wrong(f"signals must be as many at every step, got {sorted({len(t) for t in told})}")
    return Episode(
        np.stack(frames),
        np.stack(actions),
        np.array(rewards, np.float32),
        np.array(terminations),
        np.array(truncations),
        seed=seed,
        signals=np.stack(told),
        **labels,
    )


_Wrong = Callable[[str], RecordingError]


def _frame(observation: Any, shape: tuple[int, ...] | None, wrong: _Wrong) -> np.ndarray:
    """A copy of an observed frame; the first one says what the others look like."""
    if not isinstance(observation, np.ndarray) or observation.dtype != np.uint8:
        kind = getattr(observation, "dtype", type(observation).__name__)
        raise wrong(f"frames must be uint8 (H, W, 3) arrays, got {kind}")
    if observation.ndim != 3 or observation.shape[2] != 3 or not observation.size:
        raise wrong(f"frames must be uint8 (H, W, 3) arrays, got {observation.shape}")
    if shape is not None and observation.shape != shape:
        raise wrong(f"a frame is {observation.shape}, the episode's first was {shape}")
    return np.array(observation, order="C")


def _action(chosen: Any, space: gymnasium.Space, codec: ActionCodec, wrong: _Wrong) -> np.ndarray:
    """A copy of a policy's action as the space has it."""
    try:
        given = np.asarray(chosen)
        action = np.array(given, space.dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong(f"the policy's action is no array: {error}") from None
    if given.shape != codec.shape:
        raise wrong(f"the policy's action has shape {given.shape}, {space} has {codec.shape}")
    exact = action.dtype.kind == "f" or np.array_equal(action, given)
    if not exact or given.dtype.kind not in "buif" or action[()] not in space:
        raise wrong(f"the policy's action {given} does not lie in {space}")
    return action


def _number(value: Any, what: str, wrong: _Wrong) -> float:
    """A reward or a flag; arrays of one element count as that element."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "buif":
        raise wrong(f"{what} must be one number, got {array.dtype} {array.shape}")
    with np.errstate(over="ignore"):  # beyond float32: infinite, which is refused
        number = float(array.reshape(()).astype(np.float32))
    if not np.isfinite(number):
        raise wrong(f"{what} must be finite, got {value}")
    return number


def _signals(told: Any, wrong: _Wrong) -> np.ndarray:
    try:
        values = np.array(told, np.float32)
    except (TypeError, ValueError) as error:
        raise wrong(f"signals must be numbers: {error}") from None
    if values.ndim != 1:
        raise wrong(f"signals must be a list of numbers, got shape {values.shape}")
    if ((values < 0) | (values > 1)).any():
        raise wrong(
            "signals must be from 0 to 1, or NaN where they are not known, got "
            f"{np.nanmin(values):g} to {np.nanmax(values):g}"
        )
    return values
