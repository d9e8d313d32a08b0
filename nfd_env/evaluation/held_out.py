"""Held-out recordings as ``nfd eval`` uses them; each frame is encoded and decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nfd_env.config import check_ranges, config_class
from nfd_env.data.shards import EpisodeReference, RecordedDataset, RecordingError
from nfd_env.data.windows import Places, encoded_into
from nfd_env.inference.state import Context
from nfd_env.inference.world_model import WorldModel
from nfd_env.metrics import (
    Estimate,
    FrechetReference,
    bright_share,
    gradient_correlation,
    luminance,
    moving_pixels,
    psnr,
    sharpness,
    ssim,
    standing_out,
)
from nfd_env.progress import progress_bar
from nfd_env.training.recorded import check_of_world
from nfd_env.worlds.load import World

HORIZONS = (1, 8, 32, 128)
EARLY = 100  # frames 1 to EARLY of a window are compared as a distribution
LONG = 2000  # frames of a long rollout, of which the last EARLY are
EVERY = 10  # of which so many are one decoded frame
BRIGHT = 99.5  # percentile of the luma of real frames above which a pixel is bright
REFERENCE = 4096  # random held-out frames that distributions are compared with
_FLOOR_SETS = 200
_LONGEST = 1_000_000  # frames; a day of any game


@config_class
class EvaluationConfig:
    """How a world is judged; also arguments of ``nfd eval``.

    Attributes:
        windows: rollouts of 128 frames under recorded actions, at least 1.
        long_rollouts: long rollouts for the drift; 0 leaves them out.
        seed: of the choice of windows and of the world's noise.
        speculative_frames: frames drawn jointly wherever the action is kept; 1 for none.
        sampling_steps: denoising steps a frame; default: the world's own.
        long_frames: frames of each long rollout, of which the last 100 are judged; default: 2,000.
    """

    windows: int = 64
    long_rollouts: int = 16
    seed: int = 0
    speculative_frames: int = 1
    sampling_steps: int | None = None
    long_frames: int | None = None

    def __post_init__(self) -> None:
        """Check the seed; the rest is checked by who takes it."""
        check_ranges(self, seed="[0, inf)")


class EncodedEpisodes:
    """Episodes and their latents; a frame is encoded when it is first asked for."""

    def __init__(
        self, model: WorldModel, episodes: Sequence[EpisodeReference], progress: bool = False
    ) -> None:
        """Encode frames of ``episodes`` with the tokenizer of ``model``."""
        self.episodes, self._model, self._progress = episodes, model, progress
        self._places = Places(len(e) + 1 for e in episodes)
        # Untouched rows take no memory.
        self._latents = torch.empty(self.frames, *model.dynamics.config.latent_shape)
        self._known = np.zeros(self.frames, bool)

    @property
    def frames(self) -> int:
        """Frames of all episodes."""
        return len(self._places)

    def number(self, episode: int, frame: int) -> int:
        """Where frame ``frame`` of episode number ``episode`` stands among all frames."""
        return self._places.number(episode, frame)

    def pictures(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Recorded frames, uint8 (n, H, W, 3), by their numbers among all frames."""
        found = (self._places.find(number) for number in numbers)
        return np.stack([self.episodes[episode].frames[frame] for episode, frame in found])

    def latents(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Their latents, float32 (n, C, h, w), on the CPU."""
        wanted = np.asarray(numbers)
        missing = np.unique(wanted[~self._known[wanted]])
        show = self._progress and len(missing) > 1000
        for begin in progress_bar(range(0, len(missing), 64), "encoding, 64 frames a step", show):
            chunk = missing[begin : begin + 64]
            encoded = self._model.encode(torch.from_numpy(self.pictures(chunk)))
            self._latents[torch.from_numpy(chunk)] = encoded.cpu()
        self._known[missing] = True
        return self._latents[torch.from_numpy(wanted)]


@dataclass(frozen=True)
class Rollouts:
    """What rollouts start from and are driven by.

    Attributes:
        contexts: one a rollout.
        actions: encoded, (frames, rollouts, action_width).
        groups: (rollouts,), rollouts of one group may depend on one another.
    """

    contexts: list[Context]
    actions: Tensor
    groups: np.ndarray


@dataclass(frozen=True)
class HorizonErrors:
    """How far the windows' frames of one number are from what happened.

    ``_error``: standard error. ``_frozen``: of the window's last recorded frame before. ``_ratio``:
    generated over real.

    Attributes:
        moving_psnr: PSNR in dB of pixels that differ from this last frame; NaN where none do.
        sharpness_ratio: of gradient energies.
        gradient_correlation: ``nfd_env.metrics.gradient_correlation``.
        standing_ratio: of numbers of pixels that stand out from the still background.
    """

    psnr: float
    psnr_error: float
    ssim: float
    ssim_error: float
    psnr_frozen: float
    ssim_frozen: float
    moving_psnr: float
    moving_psnr_frozen: float
    sharpness_ratio: float
    gradient_correlation: float
    bright_ratio: float
    standing_ratio: float


@dataclass(frozen=True)
class Horizon:
    """The recorded frames that a window's frames of one number are compared with.

    Attributes:
        frames: uint8 (windows, H, W, 3).
        background: uint8 (windows, H, W, 3), what stands still in the windows.
        threshold: luma above which a pixel is bright.
        bright: share of bright pixels as the tokenizer shows the frames: what it loses is not the
            dynamics' loss.
        sharpness: of all frames.
        psnr_frozen: of the window's last frame before, which is what a still picture scores.
        ssim_frozen: likewise.
        moved: bool (windows, H, W), pixels that differ from that last frame.
        moving_psnr_frozen: of that frame at these pixels.
        standing: pixels that stand out from the background.
    """

    frames: np.ndarray
    background: np.ndarray
    threshold: float
    bright: float
    sharpness: float
    psnr_frozen: float
    ssim_frozen: float
    moved: np.ndarray
    moving_psnr_frozen: float
    standing: int

    @classmethod
    def of(
        cls,
        last: np.ndarray,
        real: np.ndarray,
        background: np.ndarray,
        threshold: float,
        bright: float,
    ) -> Horizon:
        """Of the frames ``real``, with the ``last`` ones before the windows."""
        moved = moving_pixels(last, real)
        return cls(
            real,
            background,
            threshold,
            bright,
            sharpness(real),
            psnr(float(_squared_error(real, last).mean())),
            float(ssim(real, last).mean()),
            moved,
            _moving_psnr(real, last, moved),
            int(standing_out(real, background).sum()),
        )

    def errors(self, made: np.ndarray, groups: np.ndarray) -> HorizonErrors:
        """How far frames ``made`` are from these; for ``groups`` see ``Rollouts``."""
        squared, similar = _squared_error(self.frames, made), ssim(self.frames, made)
        error = Estimate.jackknife(lambda used: psnr(float(squared[used].mean())), groups)
        similarity = Estimate.jackknife(lambda used: float(similar[used].mean()), groups)
        standing = float(standing_out(made, self.background).sum())
        return HorizonErrors(
            psnr=error.value,
            psnr_error=error.error,
            ssim=similarity.value,
            ssim_error=similarity.error,
            psnr_frozen=self.psnr_frozen,
            ssim_frozen=self.ssim_frozen,
            moving_psnr=_moving_psnr(self.frames, made, self.moved),
            moving_psnr_frozen=self.moving_psnr_frozen,
            sharpness_ratio=ratio(sharpness(made), self.sharpness),
            gradient_correlation=gradient_correlation(self.frames, made),
            bright_ratio=ratio(bright_share(made, self.threshold), self.bright),
            standing_ratio=ratio(standing, self.standing),
        )


def ratio(made: float, real: float) -> float:
    """``made`` over ``real``; NaN where there is nothing real."""
    return made / real if real else float("nan")


@dataclass(frozen=True)
class HeldOut:
    """What generated frames are compared with.

    Attributes:
        encoded: the held-out episodes.
        reference: fitted to latents of random frames.
        spread: standard deviation of these latents.
        threshold: luma above which a pixel is bright.
        bright: share of bright pixels in random frames, as the tokenizer decodes them.
        sharpness: of the same frames.
        windows: rollouts of max(HORIZONS) frames under recorded actions.
        horizons: what happened in them.
        early_bright: share of bright pixels in every EVERY-th of their first EARLY frames, as the
            tokenizer decodes them.
        early: recorded frames 1 to EARLY of the windows, projected, (windows, EARLY, dimensions).
        early_floor: their Fréchet distance to the reference.
        long: long rollouts under held-out actions, one episode after the other; None without any.
        late_floor: mean and standard deviation of the Fréchet distances of random sets of as many
            stretches of EARLY consecutive recorded frames as there are long rollouts.
    """

    encoded: EncodedEpisodes
    reference: FrechetReference
    spread: float
    threshold: float
    bright: float
    sharpness: float
    windows: Rollouts
    horizons: dict[int, Horizon]
    early_bright: float
    early: Tensor
    early_floor: Estimate
    long: Rollouts | None
    late_floor: tuple[float, float] | None

    @classmethod
    def prepare(
        cls,
        world: World,
        recordings: RecordedDataset,
        settings: EvaluationConfig,
        progress: bool = False,
    ) -> HeldOut:
        """Choose windows and long rollouts from the validation split, and encode what they need.

        Which windows are chosen does not depend on the number of long rollouts.

        Raises:
            ValueError: when there are no windows, or fewer than no long rollouts.
            RecordingError: when the recordings are of another environment or hold too little.
        """
        windows, long_rollouts = settings.windows, settings.long_rollouts
        if windows < 1 or long_rollouts < 0:
            raise ValueError(
                f"evaluation needs windows >= 1 and long_rollouts >= 0, got {windows} and "
                f"{long_rollouts}"
            )
        long_frames = LONG if settings.long_frames is None else settings.long_frames
        if not EARLY < long_frames <= _LONGEST:
            raise ValueError(
                f"long_frames must be above {EARLY} and at most {_LONGEST:,}, got {long_frames}"
            )
        check_fits(world, recordings)
        model = world.model
        encoded = EncodedEpisodes(model, recordings.split("validation"), progress)
        random, window, drift = np.random.default_rng(settings.seed).spawn(3)
        chosen = random.permutation(encoded.frames)[:REFERENCE]
        latents = encoded.latents(chosen)
        reference = FrechetReference(latents.flatten(1))
        pictures = model.decode(latents[:256].to(model.device)).cpu().numpy()
        threshold = float(np.percentile(luminance(pictures), BRIGHT))
        # The floor of the long rollouts is drawn from more stretches than one such set.
        keep = model.dynamics.config.window
        moments = _moments(encoded, max(windows, 4 * long_rollouts), keep, window)
        first = np.array([encoded.number(*moment) for moment in moments])
        real = encoded.latents((first[:, None] + np.arange(1, EARLY + 1)).ravel())
        projected = reference.project(real.flatten(1)).unflatten(0, (len(moments), EARLY))
        shown = real.unflatten(0, (len(moments), EARLY))[:windows, EVERY - 1 :: EVERY]
        groups = np.array([episode for episode, _ in moments[:windows]])
        return cls(
            encoded,
            reference,
            float(latents.std()),
            threshold,
            bright_share(pictures, threshold),
            sharpness(pictures),
            _windows(world, encoded, moments[:windows]),
            _horizons(model, encoded, first[:windows], threshold),
            float(np.mean([_bright(model, part, threshold) for part in shown.unbind(1)])),
            projected[:windows],
            reference.estimate(projected[:windows], groups),
            _long(world, encoded, long_rollouts, long_frames, drift) if long_rollouts else None,
            _floor(reference, projected, long_rollouts, drift) if long_rollouts else None,
        )


def check_fits(world: World, recordings: RecordedDataset) -> None:
    """Raise ``RecordingError`` unless the recordings can judge the world."""
    check_of_world(world, recordings)
    if not recordings.split("validation"):
        raise RecordingError(f"{recordings.folder} has no validation episodes")


def _moments(
    encoded: EncodedEpisodes, count: int, keep: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Random (episode, frame) with ``keep`` frames up to there and a window of frames behind."""
    length = max(*HORIZONS, EARLY)
    # An episode's last frame, which perhaps was not shown, and the one before are left out: so were
    # the windows of all figures drawn that were ever published.
    window = keep + length + 2
    places = Places((len(e) + 1 for e in encoded.episodes), window)
    if not len(places):
        raise RecordingError(f"no held-out episode has {window} frames")
    found = (places.find(place) for place in rng.integers(0, len(places), count))
    return [(episode, first + keep - 1) for episode, first in found]


def _windows(
    world: World, encoded: EncodedEpisodes, moments: Sequence[tuple[int, int]]
) -> Rollouts:
    length = max(*HORIZONS, EARLY)
    actions = [encoded.episodes[e].actions[frame : frame + length] for e, frame in moments]
    return Rollouts(
        [recorded_context(world, encoded, *moment) for moment in moments],
        torch.stack([world.codec.encode(torch.from_numpy(part)) for part in actions], 1),
        np.array([episode for episode, _ in moments]),
    )


def _long(
    world: World, encoded: EncodedEpisodes, count: int, frames: int, rng: np.random.Generator
) -> Rollouts:
    keep = world.model.dynamics.config.window
    usable = [i for i, e in enumerate(encoded.episodes) if len(e) > keep]
    contexts, streams = [], []
    for episode in rng.choice(usable, count):
        frame = int(rng.integers(keep - 1, len(encoded.episodes[episode])))
        contexts.append(recorded_context(world, encoded, int(episode), frame))
        order = rng.permutation(usable)
        joined = np.concatenate([encoded.episodes[i].actions for i in order])
        joined = np.resize(joined, (frames, *joined.shape[1:]))
        streams.append(world.codec.encode(torch.from_numpy(joined)))
    return Rollouts(contexts, torch.stack(streams, 1), np.arange(count))


def recorded_context(world: World, encoded: EncodedEpisodes, episode: int, last: int) -> Context:
    """The recorded frames that the model still sees after number ``last``, as a start."""
    first = max(0, last - world.model.dynamics.config.window + 1)
    actions = encoded_into(encoded.episodes[episode], world.codec, first, last - first + 1)
    begin = encoded.number(episode, first)
    latents = encoded.latents(np.arange(begin, begin + len(actions)))
    return Context(latents, actions, first == 0)


def _horizons(
    model: WorldModel, encoded: EncodedEpisodes, first: np.ndarray, threshold: float
) -> dict[int, Horizon]:
    last = encoded.pictures(first)
    numbers = range(0, max(HORIZONS) + 1, EVERY)
    medians = [np.median(encoded.pictures([n + i for i in numbers]), axis=0) for n in first]
    background = np.stack(medians).astype(np.uint8)
    made = {}
    for horizon in HORIZONS:
        real = encoded.pictures(first + horizon)
        bright = _bright(model, encoded.latents(first + horizon), threshold)
        made[horizon] = Horizon.of(last, real, background, threshold, bright)
    return made


def _squared_error(real: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Mean squared error of each pair of uint8 frames (n, H, W, 3), (n,)."""
    return np.square(real.astype(np.float32) - made).mean((1, 2, 3))


def _moving_psnr(real: np.ndarray, made: np.ndarray, moved: np.ndarray) -> float:
    """PSNR in dB of uint8 frames (n, H, W, 3) at the pixels ``moved`` (n, H, W); NaN without."""
    squares = np.square(real[moved].astype(np.float32) - made[moved])
    return psnr(float(squares.mean())) if squares.size else float("nan")


def _bright(model: WorldModel, latents: Tensor, threshold: float) -> float:
    return bright_share(model.decode(latents.to(model.device)).cpu().numpy(), threshold)


def _floor(
    reference: FrechetReference, stretches: Tensor, count: int, rng: np.random.Generator
) -> tuple[float, float]:
    distances = []
    for _ in range(_FLOOR_SETS):
        chosen = torch.from_numpy(rng.permutation(len(stretches))[:count])
        distances.append(reference.distance(stretches[chosen].flatten(0, 1)))
    return float(np.mean(distances)), float(np.std(distances))
