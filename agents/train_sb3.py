"""Train PPO of Stable-Baselines3: ``python -m agents.train_sb3 CONFIG``.

The same command goes on with a run that was interrupted; its environments then begin new episodes.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tqdm import tqdm

from agents.command import run
from nfd_env import config
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.files import atomic_write, owned_folder, writing
from nfd_env.learning.judge import Judge, describe
from nfd_env.learning.settings import AgentTrainingConfig
from nfd_env.players.load import SPEC_ATTRIBUTE
from nfd_env.players.player import SB3Player
from nfd_env.players.policy import AgentError, AgentSpec, Trunk, looked_at
from nfd_env.sb3 import SB3VecEnv, make_vec_env
from nfd_env.stopping import StopRequest, stopping

from stable_baselines3 import PPO  # isort: skip  # after nfd_env.sb3, which says what to install
from stable_baselines3.common.callbacks import BaseCallback  # isort: skip
from stable_baselines3.common.logger import configure  # isort: skip
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor  # isort: skip
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack  # isort: skip


@dataclass(frozen=True)
class TrainSB3Config(AgentTrainingConfig):
    """A training of PPO of Stable-Baselines3; see also ``AgentTrainingConfig``.

    Attributes:
        policy: "trunk" for the network of the native PPO (not for features), "CnnPolicy" (rgb
            only) or "MlpPolicy", which look at the whole stack.
        reward_scale: factor on rewards that brings values to the order of 1; scores are unscaled.
        ppo: arguments of ``stable_baselines3.PPO``. Its learning_rate falls linearly to zero.
    """

    policy: str = "trunk"
    reward_scale: float = 1.0
    ppo: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the policy can take the observations."""
        super().__post_init__()
        if self.policy not in ("trunk", "CnnPolicy", "MlpPolicy"):
            raise ValueError(f"policy must be trunk, CnnPolicy or MlpPolicy, got {self.policy!r}")
        if self.policy == "CnnPolicy" and self.obs_type != "rgb":
            raise ValueError(
                f"CnnPolicy takes pictures, not obs_type={self.obs_type!r}: "
                "set obs_type: rgb, or policy: trunk"
            )
        if self.policy == "trunk" and self.obs_type == "features":
            raise ValueError("the trunk takes pictures, not features: set policy: MlpPolicy")
        if self.frame_offsets and self.policy != "trunk":
            raise ValueError(f"{self.policy} looks at the whole stack: frame_offsets need trunk")


class TrunkExtractor(BaseFeaturesExtractor):
    """The native PPO's trunk as a features extractor."""

    def __init__(
        self,
        observation_space: spaces.Box,
        obs_type: str,
        channels: int,
        width: int,
        frame_stack: int,
        frame_offsets: list[int],
    ) -> None:
        """Build for stacked channels-first observations."""
        super().__init__(observation_space, width)
        depth, *size = observation_space.shape
        each = depth // frame_stack
        offsets = looked_at(frame_offsets, frame_stack)
        # The oldest observation's channels come first.
        firsts = [each * (frame_stack - 1 - back) for back in offsets]
        places = torch.tensor([first + i for first in firsts for i in range(each)])
        self._places = None if len(places) == depth else places
        self.trunk = Trunk(obs_type, (len(places), *size), channels, width)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, width)."""
        if self._places is not None:
            observations = observations[:, self._places]
        return self.trunk(observations)


class ScaleReward(VecEnvWrapper):
    """Multiplies rewards; inside it, a monitor still records the unscaled score."""

    def __init__(self, venv: VecEnv, factor: float) -> None:
        """Multiply by ``factor``."""
        super().__init__(venv)
        self._factor = factor

    def reset(self) -> Any:
        """As before."""
        return self.venv.reset()

    def step_wait(self) -> Any:
        """As before, with scaled rewards."""
        observation, reward, done, infos = self.venv.step_wait()
        return observation, self._factor * reward, done, infos


def native_env(venv: VecEnv) -> NFDVectorEnv:
    """The learned world beneath ``venv``."""
    assert isinstance(venv.unwrapped, SB3VecEnv)
    return venv.unwrapped.env.unwrapped


def make_env(settings: TrainSB3Config) -> tuple[VecEnv, AgentSpec]:
    """The monitored and stacked VecEnv to train in, and the spec of its agents."""
    env_kwargs = {"world": settings.world, **settings.world_kwargs()}
    guard = None if settings.guard is None else settings.guard.around
    venv = make_vec_env("NFD/World-v0", settings.num_envs, settings.seed, None, env_kwargs, guard)
    spec = AgentSpec.of(native_env(venv), settings.frame_stack)
    order = "first" if settings.obs_type == "latent" else "last"
    venv = VecFrameStack(ScaleReward(venv, settings.reward_scale), settings.frame_stack, order)
    return venv, spec


def make_model(venv: VecEnv, spec: AgentSpec, settings: TrainSB3Config) -> PPO:
    """A new PPO model for ``venv``."""
    rate = float(settings.ppo.get("learning_rate", 3e-4))
    kwargs: dict[str, Any] = {**settings.ppo, "learning_rate": _Linear(rate)}
    policy = settings.policy
    if policy == "trunk":
        policy = "MlpPolicy"  # which takes any features extractor
        extractor = {
            "obs_type": spec.obs_type,
            "channels": settings.channels,
            "width": settings.width,
            "frame_stack": settings.frame_stack,
            "frame_offsets": settings.frame_offsets,
        }
        kwargs["policy_kwargs"] = {
            "features_extractor_class": TrunkExtractor,
            "features_extractor_kwargs": extractor,
            "net_arch": [],
        }
    device = str(native_env(venv).model.device)
    try:
        model = PPO(policy, venv, seed=settings.seed, device=device, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise AgentError(
            f"stable_baselines3.PPO cannot be made with these settings: {error}"
        ) from None
    setattr(model, SPEC_ATTRIBUTE, config.to_dict(spec))
    return model


# Arguments of PPO that are not taken from the settings when a training goes on: what the network is
# made of, and what PPO.load is told itself.
_NOT_TAKEN = {"policy", "policy_kwargs", "use_sde", "env", "device"}


class _Linear:
    """A learning rate that falls linearly to zero; a class, so that it can be saved."""

    def __init__(self, initial: float) -> None:
        self.initial = initial

    def __call__(self, remaining: float) -> float:
        return self.initial * remaining


class Progress(BaseCallback):
    """Progress bar, evaluations in the real game, checkpoints."""

    def __init__(
        self,
        settings: TrainSB3Config,
        judge: Judge,
        path: Path,
        progress: bool,
        stop: StopRequest,
    ) -> None:
        """Save to ``path`` after updates, and when ``stop`` asks for it."""
        super().__init__()
        self._stop = stop
        self._settings, self._judge, self._path = settings, judge, path
        self._progress = progress
        self._kept = -1
        self._hazards: deque[float] = deque(maxlen=8 * settings.ppo.get("n_steps", 2048))
        self.metrics: dict[str, float] = {}

    def _on_training_start(self) -> None:
        self._bar = tqdm(
            total=self._settings.decisions,
            initial=self.model.num_timesteps,
            disable=not self._progress,
            desc="SB3 PPO",
            miniters=1,
        )
        self._saved, self._evaluated = time.monotonic(), self.model.num_timesteps
        self._kept = self.model.num_timesteps or -1

    def _on_step(self) -> bool:
        hazards = [info["hazard"] for info in self.locals["infos"]]
        self._hazards.append(float(np.mean(hazards)) / self._settings.frame_skip)
        if self._stop.asked:
            self.model.num_timesteps = self._learned  # the others are played again
            self.save()
            self._bar.close()
            self._stop.obey()
        return True

    def _on_rollout_start(self) -> None:
        # The policy is up to date here, after an update.
        done = self._learned = self.model.num_timesteps
        self.keep()
        self._bar.update(done - self._bar.n)
        infos = self.model.ep_info_buffer
        if infos and not self._settings.branched:
            self.metrics["score"] = float(sum(info["r"] for info in infos) / len(infos))
        if self._hazards:
            ends = self.metrics["ends_per_1000_frames"] = 1000 * float(np.mean(self._hazards))
            self.logger.record("rollout/ends_per_1000_frames", ends)
        every = self._settings.evaluate_every
        if every and done // every > self._evaluated // every:
            self.evaluate()
        if time.monotonic() - self._saved > self._settings.checkpoint_seconds:
            self.save()
        self._bar.set_postfix(describe(self.metrics, False, self._judge.missing), refresh=False)

    def _on_training_end(self) -> None:
        self._bar.update(self.model.num_timesteps - self._bar.n)
        self.keep()
        if self._settings.evaluate_every:
            self.evaluate()
        self.save()
        self._bar.close()

    def evaluate(self) -> None:
        """Play the real game, where it is installed."""
        if self._judge.missing:
            return
        self.save()  # an evaluation is long, and a stop in it is to cost nothing but itself
        done = self._evaluated = self.model.num_timesteps
        spec = config.from_mapping(AgentSpec, getattr(self.model, SPEC_ATTRIBUTE))
        with self._stop.at_once():
            self._bar.write(self._judge.report(SB3Player(self.model, spec), done, self.metrics))
        if not self._judge.missing:
            self.logger.record("evaluation/real_score", self.metrics["real_score"])

    def save(self) -> None:
        """Write the agent, all or nothing."""
        self._write(self._path)
        self._saved = time.monotonic()

    def keep(self) -> None:
        """Write it beside, where it is one to keep."""
        done, (folder, suffix) = self.model.num_timesteps, (self._path.parent, self._path.suffix)
        for path in self._settings.kept(folder, suffix, self._kept, done):
            self._write(path)
        self._kept = done

    def _write(self, path: Path) -> None:
        with writing(path.parent), atomic_write(path) as temporary:
            self.model.save(temporary)


def train(settings: TrainSB3Config, progress: bool = True) -> dict[str, float]:
    """Train to ``settings.decisions``, going on from the folder's last checkpoint.

    What ``settings.ppo`` says by then counts; the network stays as it was built. INT, TERM and HUP
    save the last update first.

    Returns:
        The last metrics, see ``nfd_env.learning.train.train``.

    Raises:
        AgentError: when the folder holds a run of another world or network, or PPO cannot take the
            settings.
        FolderInUseError: when another process trains there.
    """
    with owned_folder(settings.folder) as folder, stopping() as stop, ExitStack() as opened:
        return _train(settings, folder, progress, stop, opened)


def _train(
    settings: TrainSB3Config, folder: Path, progress: bool, stop: StopRequest, opened: ExitStack
) -> dict[str, float]:
    """``train``; whatever is to be closed is known to ``opened`` as soon as it is there."""
    path = folder / "agent.zip"
    venv, spec = make_env(settings)
    opened.callback(venv.close)
    if path.exists():
        model = _resume(path, venv, spec, settings)
        settings.check_kept(folder, path.suffix, model.num_timesteps)
        venv.seed(settings.seed + model.num_timesteps)  # not the first episodes again
    else:
        model = make_model(venv, spec, settings)
    model.set_logger(configure(str(folder / "tensorboard"), ["tensorboard"]))
    learned = native_env(venv).world
    judge = Judge(learned, settings.evaluate_episodes, settings.max_episode_steps, settings.device)
    opened.callback(judge.close)
    callback = Progress(settings, judge, path, progress, stop)
    # SB3 adds the timesteps that the model has had.
    left = settings.decisions - model.num_timesteps
    if left > 0:
        model.learn(left, callback, reset_num_timesteps=False)
    return callback.metrics


def _resume(path: Path, venv: VecEnv, spec: AgentSpec, settings: TrainSB3Config) -> PPO:
    """The agent of ``path``, which goes on learning as ``settings`` say by now."""
    fresh = make_model(venv, spec, settings)
    names = inspect.signature(PPO).parameters.keys() - _NOT_TAKEN
    taken = {name: getattr(fresh, name) for name in names if hasattr(fresh, name)}
    try:
        model = PPO.load(path, venv, device=str(fresh.device), **taken)
    except Exception as error:  # whatever a damaged zip or other spaces lead to
        raise AgentError(f"{path} cannot be continued: {error}; choose another folder") from None
    if getattr(model, SPEC_ATTRIBUTE, None) != config.to_dict(spec):
        raise AgentError(
            f"{path} is an agent of another world, observation type, frame skip or stack; "
            "choose another folder, or remove this one"
        )
    then, now = _network(model), _network(fresh)
    for name in then | now:
        if then.get(name) != now.get(name):
            raise AgentError(
                f"{path} has a network of {name}={then.get(name)}, not {now.get(name)}: set it "
                "back, or choose another folder"
            )
    return model


def _network(model: PPO) -> dict[str, Any]:
    """What the network of ``model`` was built by, under the names of the settings."""
    kwargs, gsde = model.policy_kwargs, {"ppo.use_sde": model.use_sde}
    # By name: a class of a module that was run as a command is another one each time.
    extractor = getattr(kwargs.get("features_extractor_class"), "__name__", "")
    if extractor == TrunkExtractor.__name__:
        built = kwargs["features_extractor_kwargs"]
        sizes = {name: built[name] for name in ("channels", "width", "frame_offsets")}
        return {"policy": "trunk", **sizes, **gsde}
    named = {cls: name for name, cls in PPO.policy_aliases.items()}
    policy = named.get(model.policy_class, model.policy_class.__name__)
    return {"policy": policy, "ppo.policy_kwargs": kwargs, **gsde}


def _command(settings: TrainSB3Config, args: argparse.Namespace) -> str:
    train(settings)
    return f"{settings.folder}/agent.zip"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run("train_sb3", TrainSB3Config, _command, arguments, {})


if __name__ == "__main__":
    sys.exit(main())
