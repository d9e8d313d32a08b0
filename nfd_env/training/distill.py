"""Stage 4: the flow model becomes a consistency model that draws a frame in 4, 2 or 1 steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.data.latents import LatentDataset, check_endings, encode_recordings
from nfd_env.data.shards import RecordedDataset
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
from nfd_env.flow.path import data_from_velocity, expand, interpolate, sample_levels
from nfd_env.flow.solvers import Velocity, level_grid, sample_consistency, sample_dpm_solver_pp
from nfd_env.flow.trigflow import LevelVelocity, consistency, trig_network
from nfd_env.inference.rollout import rollout_latents
from nfd_env.inference.sampling import Sampler
from nfd_env.metrics import frechet_distance
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.layers import sinusoid
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import CheckpointError, fingerprint_of, load_weights, save_weights
from nfd_env.training.history import HistoryLevels
from nfd_env.training.loop import TrainConfig

STEPS = (1, 2, 4)
_CONTEXT, _HORIZON = 4, 32


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversarial term of arXiv 2506.01380: a hinge loss in the frozen teacher's features.

    Attributes:
        weight: of the student's part; 0 switches the term off.
        start: steps before it sets in; a judge of early, soft samples learns nothing of use.
        layers: the teacher's blocks whose outputs are judged.
        width: hidden width of the judging heads.
    """

    weight: float = 0.0
    start: int = 0
    layers: list[int] = field(default_factory=lambda: [3, 5, 7])
    width: int = 64

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.weight < 0 or self.start < 0:
            raise ValueError("adversarial weight and start must not be negative")
        if self.weight and not self.layers:
            raise ValueError("the adversarial term needs at least one layer")


@dataclass(frozen=True)
class DistillTrainingConfig:
    """The config file of ``nfd train distill``.

    Attributes:
        recordings: the data-set folder.
        tokenizer: the finished tokenizer's weights.
        latents: folder of the latent cache.
        teacher: the finished flow model's weights.
        train: the loop's settings.
        student: weights to begin with instead of the teacher's, e.g. of an earlier distillation.
        frames: frames a training window.
        history_levels: levels of the clean copy. With a ``draft_share``, the teacher must have been
            trained with one too.
        history_level: the history's level when playing.
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
        log_variance: learn how large the loss is at each angle and divide by it. Off, because it
            takes back what the constant in the tangent's norm is for: angles that are nearly
            consistent, whose tangent is mostly noise, come to outweigh the rest.
        fastest_level: level features turning faster than this many radians a unit of level are
            silenced in teacher and student, see ``smooth_levels``; 0 keeps all.
        adversarial: see there.
        shift: of the levels of 2 and 4 steps in validation, see ``level_grid``; give the finished
            world the same. Flow training with its own level shift hardly visits low levels, and few
            steps do better without them.
        ending_share: share of the windows at the end of episodes, see ``LatentDataset.windows``.
        ending_frames: see there.
        rollouts: held-out rollouts a validation.
        reference_steps: DPM-Solver++ steps of the teacher that the validation compares with; 0
            leaves the teacher out.
    """

    recordings: str
    tokenizer: str
    latents: str
    teacher: str
    train: TrainConfig
    student: str = ""
    frames: int = 16
    history_levels: HistoryLevels = field(default_factory=HistoryLevels)
    history_level: float = 0.15
    discrete_steps: int = 0
    solver: str = "midpoint"
    coarsest_grid: int = 4
    grid_doublings: int = 3
    level_mean: float = 0.2
    level_spread: float = 1.6
    tangent_warmup: int = 500
    weight_bound: float = 2.0
    log_variance: bool = False
    fastest_level: float = 30.0
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    shift: float = 4.0
    ending_share: float = 0.0
    ending_frames: int = 0
    rollouts: int = 16
    reference_steps: int = 18

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_endings(self.ending_share, self.ending_frames)
        if self.solver not in ("euler", "midpoint"):
            raise ValueError(f"solver must be euler or midpoint, got {self.solver!r}")
        if self.frames < 2:
            raise ValueError(f"a window needs at least 2 frames, got {self.frames}")
        if min(self.discrete_steps, self.grid_doublings, self.tangent_warmup) < 0:
            raise ValueError(
                "discrete_steps, grid_doublings and tangent_warmup must not be negative"
            )
        if self.weight_bound < 1:
            raise ValueError(f"weight_bound must be at least 1, got {self.weight_bound}")
        if self.coarsest_grid < 1 or self.rollouts < 3:
            raise ValueError("coarsest_grid must be at least 1 and rollouts at least 3")


class Batch(NamedTuple):
    """What one step trains on; the switches are fixed before the loss is compiled."""

    latents: Tensor
    actions: Tensor
    discrete: bool
    adversarial: bool


class LogVariance(nn.Module):
    """The loss's learned logarithm at each angle, (...) -> (...); 0 at first."""

    def __init__(self) -> None:
        """Build a small network of log tan t."""
        super().__init__()
        last = nn.Linear(32, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), last)

    def forward(self, angle: Tensor) -> Tensor:
        """Angles in (0, pi / 2) -> log variances of the same shape."""
        features = angle.tan().clamp(1e-4, 1e4).log() / 4
        # It must learn faster than a distillation's learning rate lets it, and must not fill the
        # norm that gradients are clipped to: large in value, small in gradient.
        value = 10 * self.layers(features[..., None])[..., 0].float()
        return 0.01 * value + 0.99 * value.detach()


class Judge(nn.Module):
    """One small head a feature map; each token gets a score, high for real frames."""

    def __init__(self, maps: int, width: int, hidden: int) -> None:
        """Build for ``maps`` maps of tokens of ``width`` channels."""
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(width, eps=1e-6, elementwise_affine=False),
                nn.Linear(width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, 1),
            )
            for _ in range(maps)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """``maps`` tensors (B, T, P, width) -> scores (maps, B, T, P)."""
        pairs = zip(self.heads, features, strict=True)
        return torch.stack([head(x)[..., 0] for head, x in pairs]).float()


class Distiller(nn.Module):
    """The student and what is trained along with it; only the student is kept."""

    steps: Tensor

    def __init__(self, student: Dynamics, judge: Judge | None) -> None:
        """Put them together; ``steps`` counts the training steps, and is saved with the weights."""
        super().__init__()
        self.student = student
        self.log_variance = LogVariance()
        self.judge = judge
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class DistillStage:
    """See ``nfd_env.training.loop.Stage``.

    The student is a ``Dynamics`` like its teacher, with the same velocity as its output: TrigFlow's
    consistency function is x_s - s v (see ``nfd_env.flow.trigflow``), so a distilled network goes
    into a world wherever a flow model goes, with the sampler "consistency".
    """

    def __init__(self, settings: DistillTrainingConfig) -> None:
        """Load teacher and data, and make the student a copy of the teacher.

        Raises:
            CheckpointError: when the teacher is missing or belongs to other recordings.
        """
        self.settings = settings
        self._device = torch.device(settings.train.device)
        self._teacher = load_teacher(settings.teacher)
        first = settings.student or settings.teacher
        student = load_weights(first, Dynamics, DynamicsConfig)
        recordings = RecordedDataset(settings.recordings)
        self._made_from = {
            "tokenizer": fingerprint_of(settings.tokenizer),
            "recordings": recordings.spec.fingerprint,
            "teacher": fingerprint_of(settings.teacher),
        }
        encode_recordings(recordings, settings.tokenizer, settings.latents, settings.train.device)
        self._train = LatentDataset(recordings, settings.latents, "train")
        self._validation = LatentDataset(recordings, settings.latents, "validation")
        self._tokenizer = load_weights(settings.tokenizer, Tokenizer, TokenizerConfig)
        self._check_fit(student)
        if settings.fastest_level:
            for network in (self._teacher, student):
                smooth_levels(network, settings.fastest_level)
        self._teacher.to(self._device).requires_grad_(False)
        torch.manual_seed(settings.train.seed)
        adversarial, config = settings.adversarial, self._teacher.config
        judge = None
        self._maps: list[Tensor] | None = None
        if adversarial.weight:
            if not all(0 <= layer < config.layers for layer in adversarial.layers):
                raise ValueError(
                    f"adversarial layers must be from 0 to {config.layers - 1}, "
                    f"got {adversarial.layers}"
                )
            judge = Judge(len(set(adversarial.layers)), config.width, adversarial.width)
            for layer in sorted(set(adversarial.layers)):
                self._teacher.blocks[layer].register_forward_hook(self._keep)
        self.network = Distiller(student, judge)
        rng = np.random.default_rng(0)
        self._rollout = self._validation.windows(rng, settings.rollouts, _CONTEXT + _HORIZON)
        self._held_out = self._validation.windows(rng, 3 * settings.rollouts, settings.frames)
        self._reference: dict[str, float] | None = None

    def _check_fit(self, student: Dynamics) -> None:
        episode = self._train.episodes[0]
        paths = (self.settings.teacher, self.settings.student)
        for path, network in zip(paths, (self._teacher, student), strict=True):
            config = network.config
            if (
                config.latent_shape != tuple(episode.latents.shape[1:])
                or config.action_width != episode.actions.shape[1]
            ):
                raise CheckpointError(
                    f"{path}: was trained on latents {config.latent_shape} and "
                    f"actions of width {config.action_width}; {self.settings.recordings} has "
                    f"{tuple(episode.latents.shape[1:])} and {episode.actions.shape[1]}"
                )

    def batch(self, rng: np.random.Generator, size: int) -> Batch:
        """Latents (size, frames, C, h, w), the actions leading into them, and what to train."""
        s = self.settings
        latents, actions = self._train.windows(rng, size, s.frames, s.ending_share, s.ending_frames)
        step, adversarial = int(self.network.steps), self.settings.adversarial
        return Batch(
            latents,
            actions,
            step < self.settings.discrete_steps,
            adversarial.weight > 0 and step >= adversarial.start,
        )

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Consistency of the student along the teacher's flow, given almost clean history."""
        assert isinstance(network, Distiller)
        latents, actions = batch.latents.to(self._device), batch.actions.to(self._device)
        history_levels = self.settings.history_levels.sample(
            latents.shape[:2], self.settings.shift, self._device
        )
        history = interpolate(latents, torch.randn_like(latents), history_levels).x

        def given_history(dynamics: Dynamics) -> LevelVelocity:
            # Closed over and not passed on: forward mode gives the history no tangent.
            return lambda x, levels: dynamics.forward_two_copies(
                history, history_levels, x, levels, actions
            )

        teacher, student = given_history(self._teacher), given_history(network.student)
        step = network.steps.clone()
        if network.training:
            network.steps += 1
        kind = self._discrete if batch.discrete else self._continuous
        error, made, logs = kind(network, teacher, student, latents, step)
        # The first frame of a window has no history to follow from.
        loss = error[:, 1:].mean()
        if batch.adversarial:
            assert network.judge is not None
            fooling, judging = self._hinge(network.judge, teacher, latents, made)
            loss = loss + self.settings.adversarial.weight * fooling + judging
            logs = {**logs, "fooling": fooling.detach(), "judging": judging.detach()}
        return loss, logs

    def _discrete(
        self,
        network: Distiller,
        teacher: LevelVelocity,
        student: LevelVelocity,
        latents: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        s = self.settings
        count = grid_size(step / max(1, s.discrete_steps), s.coarsest_grid, s.grid_doublings)
        now, after = sample_grid_steps(latents.shape[:2], count, self._device)
        x = interpolate(latents, torch.randn_like(latents), now).x
        with torch.no_grad():
            moved = jump(teacher, x, now, after, s.solver)
        velocity = student(x, now)
        error = discrete_loss(velocity, student, x, now, moved, after)
        return error, data_from_velocity(x, velocity, now), {"grid": count}

    def _continuous(
        self,
        network: Distiller,
        teacher: LevelVelocity,
        student: LevelVelocity,
        latents: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        s = self.settings
        angle = sample_angles(latents.shape[:2], s.level_mean, s.level_spread, self._device)
        noise = torch.randn_like(latents)
        x = expand(angle.cos(), latents) * latents + expand(angle.sin(), latents) * noise
        with torch.no_grad():
            drift = trig_network(teacher)(x, angle)
        warmup = ((step - s.discrete_steps) / max(1, s.tangent_warmup)).clamp(0, 1)
        here = tangent(trig_network(student), x, angle, drift, warmup)
        error = distillation_loss(
            here.output,
            normalise(here.direction, 2),
            bounded_weight(angle, s.weight_bound),
            network.log_variance(angle) if s.log_variance else None,
        )
        logs = {"tangent": here.direction[:, 1:].square().mean().sqrt(), "warmup": warmup}
        return error, consistency(x, here.output, angle), logs

    def _hinge(
        self, judge: Judge, teacher: LevelVelocity, real: Tensor, made: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The student's loss, which leaves the judge alone, and the judge's, vice versa."""
        levels = sample_levels(real.shape[:2], 1.0, self._device)
        with torch.no_grad():
            of_real = self._features(
                teacher, interpolate(real, torch.randn_like(real), levels).x, levels
            )
        of_made = self._features(
            teacher, interpolate(made, torch.randn_like(made), levels).x, levels
        )
        frozen = {name: p.detach() for name, p in judge.named_parameters()}
        scores = torch.func.functional_call(judge, frozen, (of_made,))
        judging = functional.relu(1 - judge(of_real)).mean()
        judging = judging + functional.relu(1 + judge([x.detach() for x in of_made])).mean()
        return -scores.mean(), judging

    def _features(self, teacher: LevelVelocity, x: Tensor, levels: Tensor) -> list[Tensor]:
        maps = self._maps = []
        teacher(x, levels)
        self._maps = None
        # Of [history | noisy] only the noisy half, without the frame that has no history.
        return [each[:, x.shape[1] + 1 :] for each in maps]

    def _keep(self, block: nn.Module, inputs: object, output: Tensor) -> None:
        if self._maps is not None:
            self._maps.append(output)

    def validate(self, network: nn.Module) -> Mapping[str, float]:
        """How frames drawn in 1, 2 and 4 steps compare with real ones, and the teacher's once.

        ``error_N``: squared error of the latents after N frames of a held-out rollout. ``spread``:
        their standard deviation over the real one. ``frechet``: Fréchet distance of the rollouts'
        frames. ``texture``: Fréchet distance of 2 x 2 latent patches of single frames that follow
        real ones, which drift does not hide. Judge by all of them: a blurred mean has the smallest
        error.
        """
        assert isinstance(network, Distiller)
        metrics: dict[str, float] = {}
        for steps in STEPS:
            metrics |= self._compare(network.student, self._few_steps(steps), f"steps{steps}_")
        if self._reference is None and self.settings.reference_steps:
            self._reference = self._compare(
                self._teacher, _many_steps(self.settings.reference_steps), "teacher_"
            )
        return {**metrics, **(self._reference or {})}

    def _compare(self, network: Dynamics, sampler: Sampler, prefix: str) -> dict[str, float]:
        made, real = self._generate(network, sampler)
        metrics = {
            f"error_{h}": float(functional.mse_loss(made[:, h - 1], real[:, h - 1]))
            for h in (1, 8, _HORIZON)
        }
        metrics["spread"] = float(made.std() / real.std())
        frames, drawn = (x.flatten(2).flatten(0, 1).cpu() for x in (real, made))
        metrics["frechet"] = frechet_distance(frames, drawn)
        followed, following = self._follow(network, sampler)
        metrics["texture"] = frechet_distance(_patches(followed), _patches(following))
        return {prefix + name: value for name, value in metrics.items()}

    @torch.inference_mode()
    def _follow(self, network: Dynamics, sampler: Sampler) -> tuple[Tensor, Tensor]:
        """Real frames, and frames drawn after real history: two tensors (B, T, C, h, w)."""
        latents, actions = (x.to(self._device) for x in self._held_out)
        generator = torch.Generator(self._device).manual_seed(2)
        fresh, noise = torch.randn((2, *latents.shape), generator=generator, device=self._device)
        level = latents.new_full(latents.shape[:2], self.settings.history_level)
        history = interpolate(latents, fresh, level).x

        def velocity(x: Tensor, now: float) -> Tensor:
            return network.forward_two_copies(
                history, level, x, torch.full_like(level, now), actions
            )

        # Not the first frames, which have hardly any history.
        known = min(_CONTEXT, self.settings.frames - 1)
        return latents[:, known:], sampler(velocity, noise)[:, known:]

    def _generate(
        self, network: Dynamics, sampler: Sampler, rollouts: int | None = None
    ) -> tuple[Tensor, Tensor]:
        latents, actions = (x[:rollouts].to(self._device) for x in self._rollout)
        made = rollout_latents(
            network,
            latents[:, :_CONTEXT],
            actions,
            sampler,
            self.settings.history_level,
            torch.Generator(self._device).manual_seed(0),
        )
        return made, latents[:, _CONTEXT:]

    def _few_steps(self, steps: int) -> Sampler:
        levels = level_grid(steps, self.settings.shift)
        generator = torch.Generator(self._device).manual_seed(1)

        def sample(velocity: Velocity, noise: Tensor) -> Tensor:
            further = [
                torch.randn(noise.shape, generator=generator, device=self._device)
                for _ in range(steps - 1)
            ]
            return sample_consistency(velocity, noise, levels, further)

        return sample

    def strip(self, network: nn.Module) -> np.ndarray:
        """Three held-out episodes, real above 1 step above 2, after 1, 4, 8, 16, 24, 32 frames."""
        assert isinstance(network, Distiller)
        one, real = self._generate(network.student, self._few_steps(1), 3)
        two, _ = self._generate(network.student, self._few_steps(2), 3)
        frames = torch.tensor([1, 4, 8, 16, 24, 32]) - 1
        rows = []
        for episode in range(3):
            for latents in (real, one, two):
                pictures = self._tokenizer.decode_frames(latents[episode].cpu()[frames])
                rows.append(torch.cat(list(pictures), 1))
        return torch.cat(rows, 0).numpy()

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
    if not path or not Path(path).is_file():
        raise CheckpointError(
            f"{path or 'teacher'}: no such checkpoint; distilling needs a trained flow model, "
            "so run `nfd train flow CONFIG` first, or name another one with teacher=PATH"
        )
    return load_weights(path, Dynamics, DynamicsConfig)


@torch.no_grad()
def smooth_levels(network: Dynamics, fastest: float) -> None:
    """Make ``network``'s response to the level smooth, in place and for good.

    A sinusoidal feature that turns f radians a unit of level contributes f times its weight to the
    derivative by the level. Flow training leaves random weight on the fast ones, which does nothing
    to the velocity but drowns the tangent. Their part is replaced by what the slower features can
    express of it, by least squares over the levels, and their weights stay zero in training.

    Args:
        network: changed only in ``embed_level[0]``.
        fastest: radians a unit of level; faster features are silenced.

    Raises:
        ValueError: when no feature would be left.
    """
    linear = network.embed_level[0]
    assert isinstance(linear, nn.Linear)
    levels = torch.linspace(0, 1, 4001)
    features = sinusoid(levels, linear.in_features).double()
    # A feature turns by its speed over the whole range of levels: read the speed off ``sinusoid``.
    half = linear.in_features // 2
    first = torch.atan2(features[1, half:], features[1, :half])
    slow = (first / levels[1].double() <= fastest).repeat(2)
    if not slow.any():
        raise ValueError(f"no level feature turns as slowly as {fastest} radians")
    weight, bias = linear.weight.double().cpu(), linear.bias.double().cpu()
    kept = torch.cat((features[:, slow], torch.ones(len(levels), 1)), 1)
    missing = features[:, ~slow] @ weight[:, ~slow].T
    # The slowest features are nearly constant, so the change is kept small by a ridge.
    gram = kept.T @ kept / len(levels) + 1e-4 * torch.eye(kept.shape[1])
    change = torch.linalg.solve(gram, kept.T @ missing / len(levels)).T
    weight[:, slow] += change[:, :-1]
    weight[:, ~slow] = 0
    linear.weight.copy_(weight)
    linear.bias.copy_(bias + change[:, -1])
    if linear.weight.requires_grad:
        mask = slow.float()
        linear.weight.register_hook(lambda gradient: gradient * mask.to(gradient.device))


def _patches(latents: Tensor) -> Tensor:
    """(B, T, C, h, w) -> every 2 x 2 patch, (n, 4 C)."""
    return functional.unfold(latents.flatten(0, 1), 2, stride=2).mT.flatten(0, 1).cpu()


def _many_steps(steps: int) -> Sampler:
    return lambda velocity, noise: sample_dpm_solver_pp(velocity, noise, level_grid(steps))
