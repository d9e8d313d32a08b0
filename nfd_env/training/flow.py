"""Stage 3: the dynamics transformer learns the velocity of the next frame (flow matching)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nfd_env import parts
from nfd_env.config import check_ranges, config_class
from nfd_env.flow.path import data_from_velocity, expand, interpolate, sample_levels
from nfd_env.flow.persistence import frame_change
from nfd_env.flow.solvers import level_grid, sample_euler
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.low_rank import with_low_rank
from nfd_env.models.weights import CheckpointError, load_weights, save_weights
from nfd_env.training.initial import begin_motion, initial_weights
from nfd_env.training.latent_stage import CONTEXT, HistoryTrainingConfig, WindowStage, check_fit

_WINDOWS = 8  # whose loss a validation tells, for each of its rollouts
_FROM_NOISE = 0.1  # share of the frames whose level is 1, see ``sample_levels``
_COMPARED = 2048  # pairs of frames that their change is measured on
_LIKELIHOOD = 0.5  # its weight beside the squared error
_LARGEST = 3.0  # how many times as large as it makes them the network's own errors are shown to it
# Euler steps of its rollouts: worlds draw in one to four, and while training is short, many steps
# are further from what happens, see docs/trials.md.
_STEPS = 2


@config_class
class FlowTrainingConfig(HistoryTrainingConfig):
    """What to train the flow model on, and how; see also ``HistoryTrainingConfig``.

    Attributes:
        model: the network's sizes; latent shape and action width are those of the recordings.
        history: "two_copies": every noisy frame sees an almost clean copy of the frames before it,
            as when playing; "shared": one copy, an independent level a frame (arXiv 2506.01380).
        initial: weights to begin with, a file or a world, of the same sizes as ``model``; "" for
            random ones. They may have another ``window`` or ``stillness``, and a full adaLN
            projection is brought to ``model.modulation_rank``.
        initial_motion: weights whose convolutions alone to begin with, a file or a world; see
            ``LocalMotion.begin_with``. "" for random ones, or all of ``initial``.
        level_shift: see ``nfd_env.flow.path.sample_levels``.
        own_errors: in [0, 1], the share of windows whose history has the network's own errors in
            it; a third more time a step.
    """

    model: DynamicsConfig = field(default_factory=DynamicsConfig)
    history: str = "two_copies"
    initial: str = ""
    initial_motion: str = ""
    level_shift: float = 3.0
    own_errors: float = 0.0

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        check_ranges(self, level_shift="(0, inf)", own_errors="[0, 1]")
        if self.history not in ("two_copies", "shared"):
            raise ValueError(f"history must be two_copies or shared, got {self.history!r}")
        if self.initial and self.initial_motion:
            raise ValueError("initial_motion is a part of initial: give one of them")
        if self.own_errors and self.history != "two_copies":
            raise ValueError("own_errors belong into a history of its own: history: two_copies")


class FlowStage(WindowStage):
    """See ``nfd_env.training.loop.Stage``."""

    settings: FlowTrainingConfig

    def __init__(self, settings: FlowTrainingConfig) -> None:
        """Load the data and build the network.

        Raises:
            CheckpointError: when the config or the weights to begin with do not fit the data; see
                also ``LatentStage``.
        """
        super().__init__(settings)
        check_fit(self._train, settings.model, "the config's model")
        torch.manual_seed(settings.train.seed)
        self.network = Dynamics(settings.model)
        if self.network.local is not None:
            frames, _ = self._train.windows(np.random.default_rng(0), _COMPARED, 2)
            self.network.local.persistence.change.copy_(frame_change(frames))
        if settings.initial_motion:
            begin_motion(self.network, settings.initial_motion)
        if settings.initial:
            path = initial_weights(settings.initial, "flow")
            begun = load_weights(path, Dynamics, DynamicsConfig)
            rank = settings.model.modulation_rank
            if rank and not begun.config.modulation_rank:
                begun, _ = with_low_rank(begun, self._known_actions(), rank)
            # How many frames one sees, and what is believed of them, the weights do not depend on.
            free = {"window": begun.config.window, "stillness": begun.config.stillness}
            if begun.config != replace(settings.model, **free):
                raise CheckpointError(
                    f"{settings.initial}: holds {begun.config}, the config asks for "
                    f"{settings.model}"
                )
            self.network.load_state_dict(begun.state_dict())
        rng = np.random.default_rng(0)
        self._held_out = self._validation.windows(
            rng, _WINDOWS * settings.rollouts, settings.frames
        )
        self._hold_out(rng, settings.rollouts)

    @property
    def lower_is_better(self) -> list[str]:
        """The loss and the errors of rollouts."""
        return ["flow", *self._rollout_losses]

    def _known_actions(self) -> Tensor:
        """Encoded actions (n, action_width) of the recordings, and the one before the first."""
        first = [torch.from_numpy(e.actions[:256]) for e in self._train.episodes[:64]]
        distinct = torch.unique(torch.cat(first), dim=0)
        return torch.cat((distinct[:256], torch.zeros(1, distinct.shape[1])))

    def loss(
        self, network: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean squared error of the velocity, and the likelihood of what is sure of itself.

        What stands still makes next to no squared error, but its errors add up from frame to frame.
        Told in units of their own standard deviation they count, and that is made what it says. The
        weight by the deviation (beta-NLL of arXiv 2203.09168 with beta 1/2) keeps a place that was
        wrongly taken for still from drowning the rest.
        """
        error, deviation = self._errors(network, batch)
        logs = {"last_frame": error[:, -1].mean().detach()}
        loss = error.mean()
        if deviation is not None:
            unlikely = error / deviation.square() + 2 * deviation.log()
            loss = loss + _LIKELIHOOD * (deviation.detach() * unlikely).mean()
            logs["squared_error"] = error.mean().detach()
        return loss, logs

    def _errors(
        self, network: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Squared errors of the velocity of the frames that are trained, and their deviation.

        Both (B, T, C, h, w); None for the latter where the network does not say it.
        """
        assert isinstance(network, Dynamics)
        latents, actions = (x.to(self._device) for x in batch)
        shift, shape = self.settings.level_shift, latents.shape[:2]
        levels = sample_levels(shape, shift, self._device, _FROM_NOISE)
        sample = interpolate(latents, parts.randn_like(latents), levels)
        if self.settings.history == "shared":
            velocity = network(sample.x, levels, actions)
            return (velocity.float() - sample.velocity).square(), None
        history_levels = self.settings.history_levels.sample(shape, shift, self._device)
        remembered = latents
        if self.settings.own_errors:
            remembered = self._as_remembered(network, latents, history_levels, actions)
        history = interpolate(remembered, parts.randn_like(latents), history_levels).x
        velocity, deviation = network.two_copies(history, history_levels, sample.x, levels, actions)
        error = (velocity.float() - sample.velocity).square()
        # The first frame of a window has no history to follow from.
        return error[:, 1:], None if deviation is None else deviation.float()[:, 1:]

    def _as_remembered(
        self, network: Dynamics, latents: Tensor, history_levels: Tensor, actions: Tensor
    ) -> Tensor:
        """Frames with the network's own errors in them, as it will remember them when it plays.

        Matrix-Game 3 puts residuals into the history from a bank; here they are the window's own,
        and of either sign. Only what it is told to go back from, it goes back from: errors of its
        own kind, up to ``_LARGEST`` times as large as one step makes them. In half of the windows
        every frame has its own; in the other half one frame's stays through all of them, as what
        has crept into a world stays.

        Args:
            network: predicts each frame from the real ones before it, in one step.
            latents: (B, T, C, h, w), real.
            history_levels: (B, T).
            actions: (B, T, action_width).

        Returns:
            (B, T, C, h, w); as they were in all windows but a share of ``own_errors``.
        """
        shape = latents.shape[:2]
        with torch.no_grad():
            history = interpolate(latents, parts.randn_like(latents), history_levels).x
            noise, top = parts.randn_like(latents), torch.ones_like(history_levels)
            velocity = network.forward_two_copies(history, history_levels, noise, top, actions)
            errors = (data_from_velocity(noise, velocity.float(), top) - latents)[:, 1:]
        # The first frame of a window follows from nothing; it gets the second one's error.
        errors = torch.cat((errors[:, :1], errors), 1)
        rows = parts.rand((shape[0], 5), latents.device)
        chosen = (rows[:, 0] * shape[1]).long()
        lasting = errors[torch.arange(shape[0], device=latents.device), chosen][:, None]
        errors = torch.where(expand(rows[:, 1] < 0.5, errors), lasting, errors)
        size = _LARGEST * rows[:, 2].square() * (rows[:, 3] < self.settings.own_errors)
        # One step makes a mean, whose contrast is too low; who always made up for that would make
        # the contrast of its own frames higher and higher.
        size = size * (2 * (rows[:, 4] < 0.5) - 1)
        return latents + expand(size, errors) * errors

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """``flow``: the error on held-out windows; see also ``_judge``."""
        losses = [
            float(self._errors(network, (x, a))[0].mean())
            for x, a in zip(*(t.split(16) for t in self._held_out), strict=True)
        ]
        return {"flow": float(np.mean(losses)), **self._judge(*self._roll_out(network))}

    def _roll_out(self, network: nn.Module, count: int | None = None) -> tuple[Tensor, Tensor]:
        assert isinstance(network, Dynamics)
        return self._generate(
            network,
            lambda velocity, noise: sample_euler(velocity, noise, level_grid(_STEPS)),
            self.settings.history_level,
            count,
        )

    def strip(self, network: nn.Module) -> np.ndarray:
        """Three held-out episodes, real above generated, at 1, 4, 8, 16, 24 and 32 frames."""
        made, real = self._roll_out(network, 3)
        return self._picture(real[:, CONTEXT:], made)

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the weights with their config."""
        save_weights(path, network, self.settings.model, kind="flow", made_from=self._made_from)
