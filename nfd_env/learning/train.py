"""Train an agent with the native PPO, going on where a run was interrupted."""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nfd_env import config
from nfd_env.envs.real_vector_env import RealVectorEnv
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.files import found_file, owned_folder, writing
from nfd_env.learning.judge import Judge, describe
from nfd_env.learning.ppo import Position, PPOConfig, gae, ppo_loss, rollout, update
from nfd_env.learning.settings import AgentTrainingConfig
from nfd_env.models.weights import CheckpointError, save_weights
from nfd_env.players.load import find_agent, load_network
from nfd_env.players.player import NetworkPlayer
from nfd_env.players.policy import ActorCritic, AgentError, AgentSpec, PolicyConfig
from nfd_env.stopping import StopRequest, stopping
from nfd_env.training.checkpoints import read_state, write_state
from nfd_env.training.loop import Progress

_STATE = "config", "policy", "optimiser", "rng", "decisions", "elapsed", "evaluated", "metrics"


@config.config_class
class TrainPPOConfig(AgentTrainingConfig):
    """A training of the native PPO; see also ``AgentTrainingConfig``.

    Attributes:
        real: train in the real game behind the world instead, for comparison; ``starts``,
            ``horizon_frames``, ``env`` and ``guard`` then mean nothing.
        initial: an agent of the same world and network to begin with; "" for a new one. It may look
            at fewer observations, and at latents where this one is to look at features.
        ppo: hyper-parameters.
        compile: use torch.compile on acting, advantages and loss.
        fresh_rollouts: begin every rollout with new episodes, whose seeds, like the draws of
            actions, depend on the decisions so far alone: going on after a stop then computes what
            would have been computed. For ``horizon_frames`` of about a rollout.
        threads: CPU threads; 0 leaves torch's default.
    """

    real: bool = False
    initial: str = ""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    compile: bool = False
    fresh_rollouts: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        """Check that minibatches fill a batch."""
        super().__post_init__()
        config.check_ranges(self, threads="[0, inf)")
        batch = self.num_envs * self.ppo.rollout_steps
        if batch % self.ppo.minibatch_size:
            raise ValueError(
                f"ppo.minibatch_size {self.ppo.minibatch_size} does not divide the batch of "
                f"num_envs x ppo.rollout_steps = {batch}"
            )


def make_env(settings: TrainPPOConfig) -> Any:
    """The vector env of tensors to train in: the learned world, or the real game behind it."""
    world = settings.world
    if settings.real:
        return RealVectorEnv(
            world,
            settings.num_envs,
            settings.device,
            settings.frame_skip,
            settings.obs_type,
            "torch",
            settings.max_episode_steps,
        )
    kwargs: dict[str, Any] = {"output": "torch", "autoreset_mode": "SameStep"}
    kwargs |= {"context_observations": settings.frame_stack - 1} | settings.world_kwargs()
    env = NFDVectorEnv(world, settings.num_envs, **kwargs)
    return env if settings.guard is None else settings.guard.around(env)


def make_policy(env: Any, settings: TrainPPOConfig) -> tuple[ActorCritic, torch.optim.Optimizer]:
    """A new policy for ``env``, on its device, and what improves it.

    Raises:
        AgentError: when the policy cannot take the actions or observations of ``env``, or is to
            begin with an agent of another network, world or kind of training.
    """
    base = env.unwrapped
    spec = AgentSpec.of(base, settings.frame_stack, "real game" if settings.real else "world")
    sizes = settings.channels, settings.width, settings.frame_offsets
    network = ActorCritic(PolicyConfig(spec, *sizes))
    if settings.initial:
        agent = load_network(find_agent(settings.initial, base.world.folder))
        if (agent.spec.obs_type, spec.obs_type) != ("latent", "features"):
            agent.spec.check(base)
        network.begin_with(agent.policy)
    policy = network.to(base.model.device)
    return policy, torch.optim.Adam(policy.parameters(), settings.ppo.learning_rate, eps=1e-5)


def compiled(function: Any, wanted: bool) -> Any:
    """``function``, through torch.compile if that is ``wanted``."""
    return torch.compile(function, dynamic=False) if wanted else function


def train(
    settings: TrainPPOConfig, progress: bool = True, on_step: Progress | None = None
) -> dict[str, float]:
    """Train to ``settings.decisions``, going on from the folder's last checkpoint.

    INT, TERM and HUP let the running update end and save first.

    Args:
        settings: what and how.
        progress: show a progress bar.
        on_step: called at the beginning and after every update, with decisions.

    Returns:
        The last metrics: ``ends_per_1000_frames`` of the latest training episodes and, where those
        are whole, their ``score``; where the real game is installed and evaluations are on, also
        those of ``nfd_env.learning.judge.Judge.report``.

    Raises:
        AgentError: when the folder holds a run of another world, or the policy cannot take the
            world's actions or observations.
        CheckpointError: when its state is damaged.
        FolderInUseError: when another process trains there.
        FolderError: when it cannot be written to.
    """
    told = on_step or (lambda done, total: None)
    with owned_folder(settings.folder) as folder, stopping() as stop, ExitStack() as opened:
        return _train(settings, folder, progress, stop, told, opened)


def _train(
    settings: TrainPPOConfig,
    folder: Path,
    progress: bool,
    stop: StopRequest,
    on_step: Progress,
    opened: ExitStack,
) -> dict[str, float]:
    """``train``; whatever is to be closed is known to ``opened`` as soon as it is there."""
    from torch.utils.tensorboard import SummaryWriter

    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    env, real = make_env(settings), settings.real
    opened.callback(env.close)
    policy, optimiser = make_policy(env, settings)
    spec = policy.config.spec
    state_path, agent_path = folder / "state.pt", folder / "agent.safetensors"
    done, elapsed, evaluated = 0, 0.0, 0
    metrics: dict[str, float] = {}
    if found_file(state_path, CheckpointError):
        state = read_state(state_path, policy.device, _STATE)
        if state["config"] != config.to_dict(policy.config):
            raise AgentError(
                f"{folder} holds a run of another world, observation type or network; "
                "choose another folder, or remove this one"
            )
        try:
            policy.load_state_dict(state["policy"])
            optimiser.load_state_dict(state["optimiser"])
            torch.set_rng_state(state["rng"].cpu())
        except Exception as error:  # whatever another program's values make torch stumble over
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{state_path}: no state of this training ({reason}): remove it to begin again"
            ) from None
        done, elapsed, evaluated = state["decisions"], state["elapsed"], state["evaluated"]
        metrics = state["metrics"]
        settings.check_kept(folder, agent_path.suffix, done)

    act, loss_of, advantage_of = (
        compiled(function, settings.compile) for function in (policy.act, ppo_loss, gae)
    )
    judge = Judge(
        env.unwrapped.world,
        settings.evaluate_episodes,
        settings.max_episode_steps,
        settings.device,
    )
    opened.callback(judge.close)
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done)
    opened.callback(writer.close)
    # miniters=1, because an update is one tick of the bar.
    bar = tqdm(total=settings.decisions, initial=done, disable=not progress, miniters=1)
    opened.callback(bar.close)
    bar.set_description("PPO in the real game" if real else f"PPO in {spec.world}")
    finished: deque[float] = deque(maxlen=100)
    hazards: deque[float] = deque(maxlen=8)
    started = saved = time.monotonic()

    def checkpoint() -> None:
        nonlocal elapsed, started, saved
        now = time.monotonic()
        elapsed, started, saved = elapsed + now - started, now, now
        values = {
            "config": config.to_dict(policy.config),
            "policy": policy.state_dict(),
            "optimiser": optimiser.state_dict(),
            "rng": torch.get_rng_state(),
            "decisions": done,
            "elapsed": elapsed,
            "evaluated": evaluated,
            "metrics": metrics,
        }
        assert values.keys() == set(_STATE)
        with writing(folder):
            write_state(state_path, values)
            save_weights(agent_path, policy, policy.config, torch.float16)

    def keep(before: int) -> None:
        for path in settings.kept(folder, agent_path.suffix, before, done):
            with writing(folder):
                save_weights(path, policy, policy.config, torch.float16)

    def evaluate() -> None:
        nonlocal evaluated
        checkpoint()  # an evaluation is long, and a stop in it is to cost nothing but itself
        evaluated = done
        with stop.at_once():
            bar.write(judge.report(NetworkPlayer(policy), done, metrics, real))
        if not judge.missing:
            writer.add_scalar("evaluation/real_score", metrics["real_score"], done)

    def begin() -> Position:
        # Another seed each time, so that a resumed run does not repeat its first episodes.
        observation, info = env.reset(seed=settings.seed + done)
        return Position.start(observation, settings.frame_stack, info.get("context"))

    position = begin()
    on_step(done, settings.decisions)
    if not done:
        keep(-1)
    while done < settings.decisions:
        if settings.fresh_rollouts:
            position = begin()
            torch.manual_seed(settings.seed + done)
        rate = settings.ppo.learning_rate * (1 - done / settings.decisions)
        for group in optimiser.param_groups:
            group["lr"] = rate
        began = time.monotonic()
        batch, position = rollout(
            env, act, position, settings.ppo.rollout_steps, policy.look, policy.playable
        )
        middle = time.monotonic()
        logs = update(policy, optimiser, batch, settings.ppo, loss_of, advantage_of)
        values = {f"train/{name}": float(value) for name, value in logs.items()}
        if not all(map(math.isfinite, values.values())):
            raise RuntimeError(
                f"the training diverged at decision {done}; lower ppo.learning_rate and run "
                f"again (it goes on from {state_path})"
            )
        done += batch.numel()
        keep(done - batch.numel())
        hazards.append(float(batch["hazard"].mean()) / settings.frame_skip)
        metrics["ends_per_1000_frames"] = 1000 * float(np.mean(hazards))
        values["rollout/ends_per_1000_frames"] = metrics["ends_per_1000_frames"]
        finished.extend(batch["score"][batch["ended"]].tolist())
        if finished:
            mean = float(np.mean(finished))
            if real or not settings.branched:
                metrics["score"] = values["rollout/score"] = mean
            else:
                values["rollout/return_to_horizon"] = mean
        values["time/rollout_decisions_per_second"] = batch.numel() / (middle - began)
        values["time/decisions_per_second"] = batch.numel() / (time.monotonic() - began)
        for name, value in values.items():
            writer.add_scalar(name, value, done)
        bar.set_postfix(describe(metrics, real, judge.missing), refresh=False)
        bar.update(batch.numel())
        on_step(done, settings.decisions)
        every = settings.evaluate_every
        last = done >= settings.decisions
        if every and not judge.missing and (last or done // every > evaluated // every):
            evaluate()
            checkpoint()
        elif last or stop.asked or time.monotonic() - saved > settings.checkpoint_seconds:
            checkpoint()
        stop.obey()
    return metrics
