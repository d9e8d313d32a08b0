"""The policy network, and the file that an agent is."""

from __future__ import annotations

import hashlib
import math
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from nfd_env.config import check_ranges, config_class
from nfd_env.players.actions import action_head
from nfd_env.spaces import check_described, space_from_dict, space_to_dict

STACKS = "[1, 4096]"  # observations; far more than any policy looks back


class AgentError(ValueError):
    """An agent cannot be used here; the message says why and what to do."""


@config_class
class AgentSpec:
    """What an agent was trained on, and so what it can play.

    Attributes:
        world: name of the world.
        obs_type: "rgb", "latent" or "features".
        observation_shape: of one observation, (H, W, 3), (C, h, w) or (C * h * w + F,).
        action_space: see ``nfd_env.spaces.space_to_dict``.
        frame_skip: frames for which each action is repeated.
        frame_stack: observations that a decision is based on: the latest and those before it.
        encoder: fingerprint of the tokenizer's encoder, see ``fingerprint``; "" for rgb.
        trained_in: "world" or "real game".
        latent_shape: (C, h, w) of the latents that features begin with; empty for others.
        heads: fingerprint of the world's heads, whose features it takes; "" for others.
    """

    world: str
    obs_type: str
    observation_shape: list[int]
    action_space: dict[str, Any]
    frame_skip: int
    frame_stack: int
    encoder: str = ""
    trained_in: str = "world"
    latent_shape: list[int] = field(default_factory=list)
    heads: str = ""

    def __post_init__(self) -> None:
        """Check the ranges: a file may come from a stranger."""
        check_ranges(self, frame_skip="[1, 10000]", frame_stack=STACKS)
        check_described(self.action_space)

    @classmethod
    def of(cls, env: Any, frame_stack: int, trained_in: str = "world") -> AgentSpec:
        """The spec of an agent for ``env``, a (real or learned) vector env of a world."""
        latent, features = env.obs_type != "rgb", env.obs_type == "features"
        world = env.world
        folder = Path() if world is None else world.folder  # the latter: frames of any other game
        return cls(
            world="" if world is None else world.spec.name,
            obs_type=env.obs_type,
            observation_shape=list(env.single_observation_space.shape),
            action_space=space_to_dict(env.single_action_space),
            frame_skip=env.frame_skip,
            frame_stack=frame_stack,
            trained_in=trained_in,
            latent_shape=list(env.model.dynamics.config.latent_shape) if features else [],
            **_fingerprints(folder, latent, features),
        )

    def check(self, env: Any) -> None:
        """Raise AgentError when the agent cannot play ``env``."""
        here = AgentSpec.of(env, self.frame_stack)
        for name, what, remedy in (
            ("world", "for the world", "load an agent of this world"),
            ("action_space", "for the action space", "load an agent of this action space"),
            (
                "obs_type",
                "on observations of type",
                f"make the env with obs_type={self.obs_type!r}",
            ),
            ("observation_shape", "on observations of shape", "load an agent of this world"),
            (
                "frame_skip",
                "with a frame skip of",
                f"make the env with frame_skip={self.frame_skip}",
            ),
            ("encoder", "on latents of the tokenizer", "train an agent on the present tokenizer"),
            ("heads", "on features of the heads", "train an agent on the present heads"),
        ):
            mine, its = getattr(self, name), getattr(here, name)
            if mine != its and not (name == "world" and not mine):
                raise AgentError(f"the agent was trained {what} {mine}, this is {its}: {remedy}")


def of_networks(spec: AgentSpec, folder: Path) -> AgentSpec:
    """``spec`` for the same tokenizer and heads as they are stored in another world's folder."""
    prints = _fingerprints(folder, bool(spec.encoder), bool(spec.heads))
    return replace(spec, **prints)


def _fingerprints(folder: Path, latent: bool, features: bool) -> dict[str, str]:
    return {
        "encoder": fingerprint(folder / "tokenizer.safetensors", *_ENCODER) if latent else "",
        "heads": fingerprint(folder / "heads.safetensors", *_FEATURES) if features else "",
    }


_ENCODER = ("encoder.", "normalise.")  # the weights that make latents out of frames
_FEATURES = (
    "nearby.",
    "embed.",
    "gru.",
    "hidden.",
)  # those of the heads that make features out of latents


def fingerprint(path: Path, *prefixes: str) -> str:
    """A short hash of the weights in a file, or of those whose names have such a prefix."""
    digest = hashlib.sha256()
    with safe_open(path, framework="np") as file:
        for name in sorted(file.keys()):
            if name.startswith(prefixes or ("",)):
                digest.update(name.encode() + file.get_tensor(name).tobytes())
    return digest.hexdigest()[:16]


@config_class
class PolicyConfig:
    """Sizes of the policy network.

    Attributes:
        spec: what it sees and does.
        channels: of the convolutions.
        width: of the fully connected layer.
        frame_offsets: which observations of the stack it looks at, in decisions back from the
            latest (0); empty for all. A few that lie further and further apart remember long and
            cost little.
    """

    spec: AgentSpec
    channels: int = 32
    width: int = 256
    frame_offsets: list[int] = field(default_factory=list)

    @property
    def offsets(self) -> list[int]:
        """The observations that it looks at, in decisions back, oldest first."""
        return looked_at(self.frame_offsets, self.spec.frame_stack)

    def __post_init__(self) -> None:
        """Check the ranges, and that the stack holds what the network looks at."""
        check_ranges(self, channels="[1, inf)", width="[1, inf)")
        looked_at(self.frame_offsets, self.spec.frame_stack)


def looked_at(frame_offsets: list[int], frame_stack: int) -> list[int]:
    """Offsets of a stack's observations, oldest first; all of them for an empty list.

    Raises:
        ValueError: when the stack does not hold one of them.
    """
    offsets = sorted(set(frame_offsets or range(frame_stack)), reverse=True)
    if offsets[0] >= frame_stack or offsets[-1] < 0:
        raise ValueError(
            f"frame_offsets must lie from 0 to frame_stack - 1 = {frame_stack - 1}, "
            f"got {frame_offsets}"
        )
    return offsets


_CELLS = 64  # of latents, up to which no convolution of the trunk makes them fewer


class Trunk(nn.Module):
    """Images of any size to a vector; latents have been downsampled already, frames have not."""

    def __init__(self, obs_type: str, shape: tuple[int, ...], channels: int, width: int) -> None:
        """Build for channels-first images of ``shape`` (stacked frames are channels)."""
        super().__init__()
        # (kernel, stride, padding) of each convolution
        layers = [(8, 4, 2), (4, 2, 1), (3, 2, 1)]
        if obs_type == "latent":  # on finer grids nearly all weights would be of the linear layer
            layers = [(3, 1, 1), (3, 1 if shape[1] * shape[2] <= _CELLS else 2, 1)]
        modules: list[nn.Module] = []
        before = shape[0]
        for kernel, stride, padding in layers:
            modules += [nn.Conv2d(before, channels, kernel, stride, padding), nn.SiLU()]
            before = channels
        convolutions = nn.Sequential(*modules, nn.Flatten())
        with torch.no_grad():
            size = convolutions(torch.zeros(1, *shape)).shape[1]
        self.layers = nn.Sequential(convolutions, nn.Linear(size, width), nn.SiLU())
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(module.weight, 2**0.5)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, beside: Tensor | None = None) -> Tensor:
        """Float (B, C, h, w) -> (B, width); ``beside`` (B, width) is added before the last SiLU."""
        hidden = self.layers[:2](images)
        return self.layers[2](hidden if beside is None else hidden + beside)


class ActorCritic(nn.Module):
    """Policy and value of stacked observations."""

    def __init__(self, config: PolicyConfig) -> None:
        """Build from ``config``.

        Raises:
            AgentError: for an observation space that it cannot take.
        """
        super().__init__()
        self.config, spec = config, config.spec
        shape = spec.observation_shape
        features = spec.obs_type == "features" and len(shape) == 1
        if features:
            shape = spec.latent_shape
            if len(shape) != 3 or min(shape) < 1:
                raise AgentError(f"features are of latents with three axes, got {shape}")
        if not features and (spec.obs_type not in ("latent", "rgb") or len(shape) != 3):
            raise AgentError(
                f"the policy takes rgb or latent observations with three axes, or features, got "
                f"{spec.obs_type} of shape {shape}"
            )
        if spec.obs_type == "rgb":
            shape = [shape[2], shape[0], shape[1]]
        stacked = (len(config.offsets) * shape[0], shape[1], shape[2])
        kind = "rgb" if spec.obs_type == "rgb" else "latent"
        self.trunk = Trunk(kind, stacked, config.channels, config.width)
        if features:
            self._latent_size = math.prod(shape)
            known = spec.observation_shape[0] - self._latent_size
            self.beside = nn.Linear(known, config.width, bias=False)
            nn.init.orthogonal_(self.beside.weight, 2**0.5)
        self.actions = action_head(space_from_dict(spec.action_space))
        self.actor = nn.Linear(config.width, self.actions.outputs)
        self.critic = nn.Linear(config.width, 1)
        for head, gain in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(head.weight, gain)
            nn.init.zeros_(head.bias)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.critic.weight.device

    def begin_with(self, other: ActorCritic) -> None:
        """Take over the weights of ``other``; where it sees more than that, it acts alike at first.

        It may look at more observations than ``other``, and at features where that has latents.

        Raises:
            AgentError: when ``other`` is of other sizes, plays something else, or looks at
                observations that this network does not look at.
        """
        mine, its = self.config.offsets, other.config.offsets
        aim, spec = self.config.spec, other.config.spec
        spec = replace(spec, frame_stack=aim.frame_stack)
        learns = (spec.obs_type, aim.obs_type) == ("latent", "features")
        if learns:
            spec = replace(
                spec,
                obs_type=aim.obs_type,
                observation_shape=aim.observation_shape,
                latent_shape=spec.observation_shape,
                heads=aim.heads,
            )
        widened = replace(other.config, spec=spec, frame_offsets=self.config.frame_offsets)
        if widened != self.config or not set(its) <= set(mine):
            raise AgentError(f"cannot begin with {other.config}, this is to be {self.config}")
        state = other.state_dict()
        first = "trunk.layers.0.0.weight"  # of the convolution that the observations meet
        parts = dict(zip(its, state[first].chunk(len(its), 1), strict=True))
        nothing = torch.zeros_like(parts[its[0]])
        state[first] = torch.cat([parts.get(back, nothing) for back in mine], 1)
        if learns:
            state["beside.weight"] = torch.zeros_like(self.beside.weight)
        self.load_state_dict(state)

    def look(self, stack: Tensor) -> Tensor:
        """Of a stack (B, frame_stack, *observation_shape) the k observations that it looks at."""
        places = [-1 - back for back in self.config.offsets]
        return stack if len(places) == stack.shape[1] else stack[:, places]

    def forward(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        """What ``look`` gives (B, k, *observation_shape) -> outputs of the policy, value (B,)."""
        beside = None
        if self.config.spec.obs_type == "rgb":
            stack = stack.permute(0, 1, 4, 2, 3).float() / 255 - 0.5
        elif self.config.spec.obs_type == "features":
            # Of all but the latest observation the latents alone: features remember by themselves.
            beside = self.beside(stack[:, -1, self._latent_size :])
            stack = stack[..., : self._latent_size].unflatten(-1, self.config.spec.latent_shape)
        hidden = self.trunk(stack.flatten(1, 2), beside)
        return self.actor(hidden), self.critic(hidden)[:, 0]

    def act(
        self, stack: Tensor, greedy: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose raw actions; ``playable`` makes of them what an env takes.

        Args:
            stack: (B, k, *observation_shape), see ``look``.
            greedy: take the most probable ones instead of drawing them.
            generator: where the drawing's random numbers come from.

        Returns:
            Raw actions (B, *action shape), their log-probabilities and values (B,).
        """
        outputs, value = self(stack)
        raw = self.actions.draw(outputs, greedy, generator)
        return raw, self.actions.log_prob(outputs, raw)[0], value

    def playable(self, raw: Tensor) -> Tensor:
        """Raw actions -> actions of the action space, (B, *action shape)."""
        return self.actions.playable(raw)

    def evaluate(self, stack: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability and entropy of given raw actions, and the value; each (B,)."""
        outputs, value = self(stack)
        return *self.actions.log_prob(outputs, raw), value


def new_stack(observation: Tensor, count: int, context: Tensor | None = None) -> Tensor:
    """The stack (B, count, ...) at the beginning of an episode.

    Args:
        observation: (B, ...), its first.
        count: observations in a stack.
        context: (B, k, ...), what came before it, oldest first; None if that is not known: then,
            as where k is too small, as if it had always been so.
    """
    if context is None or count == 1:
        return observation[:, None].repeat_interleave(count, 1)
    context = context[:, 1 - count :]
    missing = count - 1 - context.shape[1]
    oldest = context[:, :1].repeat_interleave(missing, 1)
    return torch.cat([oldest, context, observation[:, None]], 1)


def push(
    stack: Tensor,
    observation: Tensor,
    first: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """Append an observation (B, ...) to a stack (B, k, ...) and drop the oldest.

    Args:
        stack: the latest k observations, oldest first.
        observation: the next.
        first: bool (B,), rows where ``observation`` is the first of a new episode.
        context: of those rows, see ``new_stack``.
    """
    pushed = torch.cat([stack[:, 1:], observation[:, None]], 1)
    if first is None:
        return pushed
    rows = first.view(-1, *[1] * (stack.ndim - 1))
    return torch.where(rows, new_stack(observation, stack.shape[1], context), pushed)
