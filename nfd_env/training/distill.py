"""Stage 5: the flow model becomes a consistency model that draws a frame in 4, 2 or 1 steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nfd_env import parts
from nfd_env.config import check_ranges, config_class
from nfd_env.files import found_file
from nfd_env.flow.consistency import (
    bounded_weight,
    discrete_loss,
    distillation_loss,
    grid_size,
    jump,
    normalise,
    sample_angles,
    sample_grid_steps,
    tangent,
)
from nfd_env.flow.path import data_from_velocity, expand, interpolate
from nfd_env.flow.trigflow import LevelVelocity, consistency, trig_network
from nfd_env.inference.sampling import Sampler
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.weights import CheckpointError, fingerprint_of, load_weights, save_weights
from nfd_env.parts import WHOLE, Part
from nfd_env.training.adversarial import AdversarialConfig, Judge, TeacherFeatures, hinge
from nfd_env.training.continuous import smooth_levels
from nfd_env.training.distill_validation import (
    STEPS,
    energy,
    few_steps,
    follow,
    frechet,
    many_steps,
    texture,
)
from nfd_env.training.initial import initial_weights
from nfd_env.training.latent_stage import CONTEXT, HistoryTrainingConfig, WindowStage, check_fit


@config_class
class DistillTrainingConfig(HistoryTrainingConfig):
    """What to train the student on, and how; see also ``HistoryTrainingConfig``.

    Where ``history_levels`` have a ``draft_share``, the teacher must have been trained with one.

    Attributes:
        teacher: the finished flow model's weights.
        student: weights to begin with instead of the teacher's, e.g. of an earlier distillation.
        discrete_steps: so many steps are discrete-time consistency, cheaper and steadier; the rest
            is continuous-time (sCM). 0 and ``train.steps`` leave only one of the two.
        solver: the teacher's jump in discrete time, "euler" or "midpoint".
        coarsest_grid: intervals of the first discrete grid.
        grid_doublings: how often they are doubled, evenly over ``discrete_steps``.
        level_mean: in continuous time log tan t is normal with this mean, ...
        level_spread: ... and this standard deviation.
        tangent_warmup: continuous steps over which the tangent's derivative part grows to its full
            weight.
        weight_bound: the weight 1 / tan t stays between this and its inverse, >= 1.
        fastest_level: level features turning faster than this many radians a unit of level are
            silenced in teacher and student, see ``smooth_levels``; 0 keeps all.
        adversarial: see there.
        shift: of the levels of 2 and 4 steps in validation, see ``level_grid``; give the finished
            world the same. Flow training with its own level shift hardly visits low levels, and few
            steps do better without them.
        reference_steps: DPM-Solver++ steps of the teacher whose texture validation compares with;
            0 leaves the teacher out.
        long_rollout: frames that validation's long rollouts go on for, to see whether pictures
            last; less where held-out episodes are shorter.
    """

    teacher: str
    student: str = ""
    discrete_steps: int = 0
    solver: str = "midpoint"
    coarsest_grid: int = 4
    grid_doublings: int = 3
    level_mean: float = 0.2
    level_spread: float = 1.6
    tangent_warmup: int = 500
    weight_bound: float = 2.0
    fastest_level: float = 30.0
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    shift: float = 4.0
    rollouts: int = field(default=16, kw_only=True)
    reference_steps: int = 18
    long_rollout: int = 96

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.solver not in ("euler", "midpoint"):
            raise ValueError(f"solver must be euler or midpoint, got {self.solver!r}")
        check_ranges(
            self,
            discrete_steps="[0, inf)",
            grid_doublings="[0, inf)",
            tangent_warmup="[0, inf)",
            weight_bound="[1, inf)",
            shift="(0, inf)",
            level_spread="(0, inf)",
            fastest_level="[0, inf)",
            reference_steps="[0, inf)",
            coarsest_grid="[1, inf)",
            rollouts="[3, inf)",
            long_rollout="[1, inf)",
        )


class Batch(NamedTuple):
    """What a step trains on; the switches are fixed before the loss is compiled."""

    latents: Tensor
    actions: Tensor
    discrete: bool
    adversarial: bool
    ends_step: bool


class Distiller(nn.Module):
    """The student and what is trained along with it; only the student is kept."""

    steps: Tensor

    def __init__(self, student: Dynamics, judge: Judge | None) -> None:
        """Put them together; ``steps`` counts the training steps, and is saved with the weights."""
        super().__init__()
        self.student = student
        self.judge = judge
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class DistillStage(WindowStage):
    """See ``nfd_env.training.loop.Stage``.

    The student is a ``Dynamics`` like its teacher, with the same velocity as its output: TrigFlow's
    consistency function is x_s - s v (see ``nfd_env.flow.trigflow``), so a distilled network goes
    into a world wherever a flow model goes, with the sampler "consistency".
    """

    settings: DistillTrainingConfig

    def __init__(self, settings: DistillTrainingConfig) -> None:
        """Load teacher and data, and make the student a copy of the teacher.

        Raises:
            CheckpointError: when the teacher is missing or belongs to other recordings; see also
                ``LatentStage``.
        """
        self._teacher = load_teacher(settings.teacher)
        super().__init__(settings)
        self._made_from["teacher"] = fingerprint_of(Path(settings.teacher).expanduser())
        student = self._teacher
        check_fit(self._train, self._teacher.config, settings.teacher)
        if settings.student:
            path = initial_weights(settings.student, "distill")
            student = load_weights(path, Dynamics, DynamicsConfig)
            check_fit(self._train, student.config, settings.student)
        student = copy.deepcopy(student)
        if settings.fastest_level:
            for network in (self._teacher, student):
                smooth_levels(network, settings.fastest_level)
        self._teacher.to(self._device).requires_grad_(False)
        torch.manual_seed(settings.train.seed)
        adversarial, judge = settings.adversarial, None
        if adversarial.weight:
            self._features = TeacherFeatures(self._teacher, adversarial.layers)
            maps, width = len(set(adversarial.layers)), self._teacher.config.width
            judge = Judge(maps, width, adversarial.width)
        self.network = Distiller(student, judge)
        rng = np.random.default_rng(0)
        self._hold_out(rng, settings.rollouts)
        self._held_out = self._validation.windows(rng, 3 * settings.rollouts, settings.frames)
        long = CONTEXT + min(settings.long_rollout, self._longest - CONTEXT)
        self._long = self._validation.windows(rng, (settings.rollouts + 1) // 2, long)
        self._reference: dict[str, float] | None = None

    @property
    def lower_is_better(self) -> list[str]:
        """Errors and distances, of the student with 1, 2 and 4 steps."""
        return [
            f"steps{steps}_{name}"
            for steps in STEPS
            for name in (*self._rollout_losses, "frechet", "texture")
        ]

    def batch(self, rng: np.random.Generator, size: int, part: Part = WHOLE) -> Batch:
        """Latents (rows, frames, C, h, w), the actions leading into them, and what to train."""
        latents, actions = self.settings.draw(self._train, rng, size, part)
        step, adversarial = int(self.network.steps), self.settings.adversarial
        return Batch(
            latents,
            actions,
            step < self.settings.discrete_steps,
            adversarial.weight > 0 and step >= adversarial.start,
            part.ends_step,
        )

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Consistency of the student along the teacher's flow, given almost clean history."""
        assert isinstance(network, Distiller)
        latents, actions = batch.latents.to(self._device), batch.actions.to(self._device)
        history_levels = self.settings.history_levels.sample(
            latents.shape[:2], self.settings.shift, self._device
        )
        history = interpolate(latents, parts.randn_like(latents), history_levels).x

        def given_history(dynamics: Dynamics) -> LevelVelocity:
            # Closed over and not passed on: forward mode gives the history no tangent.
            return lambda x, levels: dynamics.forward_two_copies(
                history, history_levels, x, levels, actions
            )

        teacher, student = given_history(self._teacher), given_history(network.student)
        step = network.steps.clone()
        if network.training and batch.ends_step:
            network.steps += 1
        kind = self._discrete if batch.discrete else self._continuous
        error, made, logs = kind(teacher, student, latents, step)
        # The first frame of a window has no history to follow from.
        loss = error[:, 1:].mean()
        if batch.adversarial:
            assert network.judge is not None
            fooling, judging = hinge(network.judge, self._features, teacher, latents, made)
            loss = loss + self.settings.adversarial.weight * fooling + judging
            logs = {**logs, "fooling": fooling.detach(), "judging": judging.detach()}
        return loss, logs

    def _discrete(
        self, teacher: LevelVelocity, student: LevelVelocity, latents: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        s = self.settings
        count = grid_size(step / max(1, s.discrete_steps), s.coarsest_grid, s.grid_doublings)
        now, after = sample_grid_steps(latents.shape[:2], count, self._device)
        x = interpolate(latents, parts.randn_like(latents), now).x
        with torch.no_grad():
            moved = jump(teacher, x, now, after, s.solver)
        velocity = student(x, now)
        error = discrete_loss(velocity, student, x, now, moved, after)
        return error, data_from_velocity(x, velocity, now), {"grid": count}

    def _continuous(
        self, teacher: LevelVelocity, student: LevelVelocity, latents: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        s = self.settings
        angle = sample_angles(latents.shape[:2], s.level_mean, s.level_spread, self._device)
        noise = parts.randn_like(latents)
        x = expand(angle.cos(), latents) * latents + expand(angle.sin(), latents) * noise
        with torch.no_grad():
            drift = trig_network(teacher)(x, angle)
        warmup = ((step - s.discrete_steps) / max(1, s.tangent_warmup)).clamp(0, 1)
        here = tangent(trig_network(student), x, angle, drift, warmup)
        error = distillation_loss(
            here.output,
            normalise(here.direction, 2),
            bounded_weight(angle, s.weight_bound),
        )
        logs = {"tangent": here.direction[:, 1:].square().mean().sqrt(), "warmup": warmup}
        return error, consistency(x, here.output, angle), logs

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """How frames drawn in 1, 2 and 4 steps compare with real ones, by student and by teacher.

        The teacher's once: where little is left to chance, its mean is a good guess.

        Beside what ``LatentStage._judge`` says: ``frechet``, the Fréchet distance of the rollouts'
        frames, ``energy``, of the last latents of long rollouts over that of real ones, and
        ``texture``, the distance of 2 x 2 latent patches of single frames that follow real ones,
        which drift does not hide; that of the teacher's many steps too, than which the network
        knows no better. Judge by all of them: a blurred mean has the smallest error.
        """
        assert isinstance(network, Distiller)
        metrics: dict[str, float] = {}
        for steps in STEPS:
            metrics |= self._compare(network.student, self._few_steps(steps), f"steps{steps}_")
        if self._reference is None and self.settings.reference_steps:
            sampler = many_steps(self.settings.reference_steps)
            self._reference = {"teacher_texture": self._texture(self._teacher, sampler)}
            for steps in STEPS:
                few = self._compare(self._teacher, many_steps(steps), f"teacher{steps}_")
                self._reference |= few
        return {**metrics, **(self._reference or {})}

    def _few_steps(self, steps: int) -> Sampler:
        return few_steps(steps, self.settings.shift, self._device)

    def _compare(self, network: Dynamics, sampler: Sampler, prefix: str) -> dict[str, float]:
        level = self.settings.history_level
        made, latents = self._generate(network, sampler, level)
        metrics = self._judge(made, latents)
        metrics["frechet"] = frechet(latents[:, CONTEXT:], made)
        metrics["texture"] = self._texture(network, sampler)
        made, latents = self._continue(self._long, network, sampler, level)
        metrics["energy"] = energy(latents, made)
        return {prefix + name: value for name, value in metrics.items()}

    def _texture(self, network: Dynamics, sampler: Sampler) -> float:
        windows, actions = (x.to(self._device) for x in self._held_out)
        return texture(*follow(network, sampler, windows, actions, self.settings.history_level))

    def strip(self, network: nn.Module) -> np.ndarray:
        """Three held-out episodes, real above 1 step above 2, after 1, 4, 8, 16, 24, 32 frames."""
        assert isinstance(network, Distiller)
        level = self.settings.history_level
        one, real = self._generate(network.student, self._few_steps(1), level, 3)
        two, _ = self._generate(network.student, self._few_steps(2), level, 3)
        return self._picture(real[:, CONTEXT:], one, two)

    def save(self, network: nn.Module, path: Path) -> None:
        """Write the student's weights with their config."""
        assert isinstance(network, Distiller)
        save_weights(
            path, network.student, network.student.config, kind="student", made_from=self._made_from
        )


def load_teacher(path: str) -> Dynamics:
    """The flow model to distil.

    Raises:
        CheckpointError: when it is missing, saying how to make one; see also ``load_weights``.
    """
    if not path or not found_file(Path(path).expanduser(), CheckpointError):
        raise CheckpointError(
            f"{path or 'teacher'}: no such checkpoint; distilling needs a trained flow model, "
            "so train the flow stage first, or name another one as teacher"
        )
    return load_weights(Path(path).expanduser(), Dynamics, DynamicsConfig)
