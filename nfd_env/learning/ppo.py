"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) on TensorDict batches.

Three functions that take all they need as arguments: ``rollout`` plays, ``gae`` estimates
advantages, ``update`` improves the policy. The world, the observations and the batch stay on one
device; nothing passes through numpy. ``ActorCritic.act``, ``gae`` and ``ppo_loss`` compile one by
one, without graph breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nfd_env.config import check_ranges, config_class
from nfd_env.players.policy import ActorCritic, new_stack, push

if TYPE_CHECKING:  # it takes as long to import as torch, and ``nfd train`` seldom needs it
    from tensordict import TensorDict

Act = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
View = Callable[[Tensor], Tensor]
Loss = Callable[[ActorCritic, "TensorDict", "PPOConfig"], tuple[Tensor, dict[str, Tensor]]]


@config_class
class PPOConfig:
    """Hyper-parameters of PPO.

    Attributes:
        rollout_steps: decisions of each environment between updates.
        epochs: passes over the batch in an update.
        minibatch_size: decisions in a gradient step; divides the batch.
        learning_rate: of Adam, falling linearly to zero over the run.
        discount: of the reward of the next decision, in [0, 1).
        gae_lambda: of generalised advantage estimation, in [0, 1].
        clip: how far the probability ratio may leave 1.
        entropy: weight of the entropy bonus.
        value_weight: weight of the value loss.
        clip_norm: gradients are clipped to this norm.
        reward_scale: factor on rewards that brings values to the order of 1; scores are unscaled.
        use_hazard: in the advantages, replace each drawn end by the probability that it had, where
            the environment reports it. Takes the luck of the draw out of them.
    """

    rollout_steps: int = 64
    epochs: int = 4
    minibatch_size: int = 512
    learning_rate: float = 5e-4
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value_weight: float = 0.5
    clip_norm: float = 0.5
    reward_scale: float = 1.0
    use_hazard: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, "ppo.", discount="[0, 1)", gae_lambda="[0, 1]")
        some, above, any_ = "[1, inf)", "(0, inf)", "[0, inf)"
        check_ranges(self, "ppo.", learning_rate=above, clip=above, clip_norm=above)
        check_ranges(self, "ppo.", reward_scale=above, entropy=any_, value_weight=any_)
        check_ranges(self, "ppo.", rollout_steps=some, epochs=some, minibatch_size=some)


@dataclass
class Position:
    """Where a rollout goes on.

    Attributes:
        stack: (B, frame_stack, *observation_shape), what the next decisions are based on.
        score: float32 (B,), reward of the running episodes so far.
    """

    stack: Tensor
    score: Tensor

    @classmethod
    def start(
        cls, observation: Tensor, frame_stack: int, context: Tensor | None = None
    ) -> Position:
        """From the observations (B, ...) of a reset, and those before them (B, k, ...) if known."""
        score = torch.zeros(len(observation), device=observation.device)
        return cls(new_stack(observation.clone(), frame_stack, context), score)


@torch.no_grad()
def rollout(
    env: Any,
    act: Act,
    position: Position,
    steps: int,
    look: View | None = None,
    playable: View | None = None,
) -> tuple[TensorDict, Position]:
    """Play ``steps`` decisions in every environment.

    Args:
        env: a vector env of tensors that resets in the step that ends an episode, as made with
            ``output="torch"`` and ``autoreset_mode="SameStep"``. Where it reports
            ``info["context"]``, the stacks of new episodes begin with that.
        act: what is looked at -> raw actions, log-probabilities, values.
        position: where to go on.
        steps: T.
        look: stack -> what is looked at of it, all that the batch keeps, see ``ActorCritic.look``;
            None for the whole stack.
        playable: raw actions, which the batch keeps -> actions that ``env`` takes, see
            ``ActorCritic.playable``; None where they are the same.

    Returns:
        A batch of size (T, B) and where to go on. ``next_value`` is the value of what the action
        led to, the end of an episode included; ``hazard`` is the probability with which it could
        have terminated; ``score`` is the episode's whole reward where one ended, else NaN.
    """
    from tensordict import TensorDict

    look = look or (lambda stack: stack)
    playable = playable or (lambda raw: raw)
    rows: list[dict[str, Tensor]] = []
    last: list[Tensor] = []  # what is looked at where episodes ended, in their order
    for _ in range(steps):
        seen = look(position.stack)
        action, log_prob, value = act(seen)
        observation, reward, terminated, truncated, info = env.step(playable(action))
        ended = terminated | truncated
        any_ended = "final_obs" in info
        if any_ended:
            last.append(look(push(position.stack, info["final_obs"]))[ended])
        score = position.score + reward
        rows.append(
            {
                "observation": seen,
                "action": action,
                "log_prob": log_prob,
                "value": value,
                "reward": reward,
                "terminated": terminated,
                "hazard": info.get("hazard", terminated).to(reward.dtype),
                "ended": ended,
                "score": torch.where(ended, score, torch.nan),
            }
        )
        stack = push(position.stack, observation, ended if any_ended else None, info.get("context"))
        position = Position(stack, score.masked_fill(ended, 0.0))
    count = len(position.score)
    batch = TensorDict(
        {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        batch_size=(steps, count),
    )
    values = _values(act, torch.cat([look(position.stack), *last]), count)
    next_value = torch.cat([batch["value"][1:], values[None, :count]])
    next_value[batch["ended"]] = values[count:]
    batch["next_value"] = next_value
    return batch, position


def _values(act: Act, seen: Tensor, count: int) -> Tensor:
    """Values (N,) of what is looked at (N, ...), ``count`` at a time: ``act`` may be compiled."""
    padding = seen[:1].expand(-len(seen) % count, *seen.shape[1:])
    parts = torch.cat([seen, padding]).split(count)
    return torch.cat([act(part)[2] for part in parts])[: len(seen)]


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    termination: Tensor,
    ended: Tensor,
    discount: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    All tensors are (T, B).

    Args:
        reward: of each decision.
        value: before it.
        next_value: after it; also where the episode ended, before the reset.
        termination: probability that the episode terminated there: 0 or 1 if it was drawn, in
            between for the expectation over the draw.
        ended: bool, the episode ended there (terminated or truncated).
        discount: gamma.
        gae_lambda: lambda.

    Returns:
        Advantages (T, B).
    """
    survival = discount * (1 - termination)
    error = reward + survival * next_value - value
    carried = gae_lambda * survival * ~ended
    advantage = torch.zeros_like(value[0])
    advantages = []
    for step in range(len(reward) - 1, -1, -1):
        advantage = error[step] + carried[step] * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1])


def ppo_loss(
    policy: ActorCritic, batch: TensorDict, config: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate objective with value loss and entropy bonus (eqs. 7 and 9 of PPO).

    Args:
        policy: the network to improve.
        batch: of size (N,), with observation, action, log_prob, advantage and target.
        config: weights and clipping.

    Returns:
        The loss, and tensors to log.
    """
    log_prob, entropy, value = policy.evaluate(batch["observation"], batch["action"])
    log_ratio = log_prob - batch["log_prob"]
    ratio, advantage = log_ratio.exp(), batch["advantage"]
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage).mean()
    value_loss = 0.5 * (value - batch["target"]).square().mean()
    bonus = entropy.mean()
    loss = -surrogate + config.value_weight * value_loss - config.entropy * bonus
    return loss, {
        "surrogate": surrogate.detach(),
        "value_loss": value_loss.detach(),
        "entropy": bonus.detach(),
        "kl": (ratio - 1 - log_ratio).mean().detach(),
        "clipped": ((ratio - 1).abs() > config.clip).float().mean().detach(),
    }


def update(
    policy: ActorCritic,
    optimiser: torch.optim.Optimizer,
    batch: TensorDict,
    config: PPOConfig,
    loss_of: Loss = ppo_loss,
    advantage_of: Callable[..., Tensor] = gae,
) -> dict[str, Tensor]:
    """Improve ``policy`` on a rollout.

    Args:
        policy: the network.
        optimiser: of its parameters.
        batch: as ``rollout`` returns it.
        config: hyper-parameters.
        loss_of: ``ppo_loss``, or its compiled form.
        advantage_of: ``gae``, or its compiled form.

    Returns:
        Scalars to log: means over all gradient steps, and the explained variance.
    """
    from tensordict import TensorDict

    value = batch["value"]
    advantage = advantage_of(
        config.reward_scale * batch["reward"],
        value,
        batch["next_value"],
        batch["hazard"] if config.use_hazard else batch["terminated"].to(value.dtype),
        batch["ended"],
        config.discount,
        config.gae_lambda,
    )
    target = advantage + value
    explained = 1 - advantage.var() / target.var().clamp_min(1e-8)
    normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    columns = {name: batch[name] for name in ("observation", "action", "log_prob")}
    columns |= {"advantage": normalised, "target": target}
    flat: dict[str, Tensor] = {name: column.flatten(0, 1) for name, column in columns.items()}
    logs: list[dict[str, Tensor]] = []
    for _ in range(config.epochs):
        order = torch.randperm(value.numel(), device=value.device)
        for index in order.split(config.minibatch_size):
            # index_select is several times as fast as indexing where rows are wide.
            picked = {name: column.index_select(0, index) for name, column in flat.items()}
            minibatch = TensorDict(picked, batch_size=len(index))
            loss, log = loss_of(policy, minibatch, config)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            log["gradient_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), config.clip_norm)
            optimiser.step()
            logs.append(log)
    means = {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}
    return {**means, "explained_variance": explained}
