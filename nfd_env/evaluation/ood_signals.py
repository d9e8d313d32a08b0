"""``nfd eval --ood-signals``: can a world tell which of its frames are wrong?

A world is run from recorded frames under recorded actions, so that the real continuation says which
frames went wrong. Then each signal is asked: with what probability does it give a wrong frame a
higher value than a good one (the area under the receiver operating characteristic, AUROC)?

Two things make a signal look better than it is. Later frames are worse and stranger: so frames of
the same number are compared. And where much of the picture moves, errors are larger, and so is
every difference of latents: so the motion itself is listed as a signal, which costs nothing, and
frames are also compared with frames that move about as much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.data.windows import Places
from nfd_env.evaluation.held_out import (
    BRIGHT,
    EncodedEpisodes,
    EvaluationConfig,
    check_fits,
    recorded_context,
)
from nfd_env.evaluation.tables import table
from nfd_env.inference.noise import mix
from nfd_env.inference.state import Context
from nfd_env.inference.world_model import WorldModel
from nfd_env.metrics import Estimate, luminance, moving_pixels
from nfd_env.progress import progress_bar
from nfd_env.worlds.load import World

FRAMES = 32  # of a window
EARLY = 8  # of which so many are also compared alone
SMOOTHED = 8  # frames that the mean of a signal is taken over
ALIKE = 1.25  # most ratio of the motions of frames that move about as much
_LEAST_MOTION = 0.1  # of the mean recorded motion, added to the motion that a signal is divided by
_LEAST_MOVING, _LEAST_BRIGHT = 0.005, 0.001  # shares of a picture, for an error to be measured
_NEAR = 4  # pixels that a bright thing may be off and still counts as there
_KEPT, _LOST = 0.75, 0.25  # shares of the bright pixels that are there
_CONTROL, _CONTROLLED = 2.0, 16  # times the temperature: wrong beyond doubt; most such windows
_SALT = 0x4F4F44  # separates the second noise from the first
_CHUNK = 256  # frames that are decoded together


@dataclass(frozen=True)
class SignalRow:
    """How well one signal tells wrong frames from good ones: AUROCs with their standard errors.

    0.5 is chance, 1 is always. Each is (value, error), the jackknife's over episodes.

    Attributes:
        signal: its name, see ``measure_signals``.
        far: frames far from the real continuation; see ``SignalsReport``. "any" compares frames of
            any number, "same" frames of the same number, "early" those of the first ``EARLY``, and
            "alike" frames of the same number that move about as much.
        lost: likewise, frames that lack a bright thing.
        control: frames drawn at twice the temperature against those of the same number drawn as
            usual.
    """

    signal: str
    far: dict[str, tuple[float, float]]
    lost: dict[str, tuple[float, float]]
    control: tuple[float, float]


@dataclass(frozen=True)
class SignalsReport:
    """What was measured.

    Attributes:
        world: its name.
        sampling: how frames were drawn.
        windows: rollouts.
        frames: of each.
        episodes: that the windows are of.
        far: numbers of wrong and good frames: at each frame number the worst quarter and the best
            half of the windows by what the dynamics adds to the tokenizer's error, in dB of the
            PSNR of pixels that differ from the last recorded frame before.
        lost: numbers of wrong and good frames among those in which the game shows something bright,
            as it did in the last frame before the window: less than a quarter and at least three
            quarters of its pixels are there, give or take 4 pixels.
        rows: one a signal.
    """

    world: str
    sampling: str
    windows: int
    frames: int
    episodes: int
    far: tuple[int, int]
    lost: tuple[int, int]
    rows: list[SignalRow]


def measure_signals(
    world: World, recordings: RecordedDataset, settings: EvaluationConfig, progress: bool = True
) -> SignalsReport:
    """Measure what tells wrong frames of a world from good ones.

    The signals: "re-encoding", ``info["ood"]``'s; "spread", the mean squared difference of the
    latents drawn from two noises; "shift", that of the frames that n and n + 1 denoising steps draw
    from one noise; each of them divided by the motion; "motion", the mean squared difference of
    the latents of the last two frames; and the means over the last ``SMOOTHED`` frames.

    Args:
        world: the world.
        recordings: of its game, with a validation split.
        settings: ``windows``, ``seed`` and ``sampling_steps`` count.
        progress: show progress bars.

    Raises:
        RecordingError: when the recordings are of another game or too short.
        ValueError: when a number is out of range.
    """
    if settings.windows < 2:
        raise ValueError(f"signals are compared between windows >= 2, got {settings.windows}")
    check_fits(world, recordings)
    sampling = world.model.sampling
    sampling = replace(sampling, steps=settings.sampling_steps or sampling.steps)
    model = world.model.with_sampling(sampling)
    keep = model.dynamics.config.window
    encoded = EncodedEpisodes(model, recordings.split("validation"), progress)
    held = encoded.episodes
    places = Places((len(episode) for episode in held), keep + FRAMES)
    if not len(places):
        raise RecordingError(f"no held-out episode has {keep + FRAMES + 1} frames; record longer")
    chosen = np.random.default_rng(settings.seed).permutation(len(places))[: settings.windows]
    moments = [(e, first + keep - 1) for e, first in map(places.find, chosen.tolist())]
    taken = np.stack([held[e].actions[last : last + FRAMES] for e, last in moments], 1)
    actions = torch.stack([world.codec.encode(torch.from_numpy(part)) for part in taken])
    contexts = [recorded_context(world, encoded, *moment) for moment in moments]
    numbers = np.array([encoded.number(*m) for m in moments])[:, None] + np.arange(FRAMES + 1)
    real = encoded.pictures(numbers.ravel()).reshape(*numbers.shape, *world.spec.frame_size, 3)
    latents = encoded.latents(numbers.ravel())
    passed = [model.decode(part.to(model.device)).cpu().numpy() for part in latents.split(_CHUNK)]
    passed = np.concatenate(passed).reshape(real.shape)
    latents = latents.unflatten(0, numbers.shape)
    least = _LEAST_MOTION * float(_difference(latents[:, 1:], latents[:, :-1]).mean())

    made, signals = _roll_out(model, contexts, actions, settings.seed, least, progress)
    hot = model.with_sampling(replace(sampling, temperature=_CONTROL * sampling.temperature))
    few = min(_CONTROLLED, len(contexts))
    _, controls = _roll_out(hot, contexts[:few], actions[:, :few], settings.seed, least, progress)

    groups = np.array([episode for episode, _ in moments])
    error = _added_error(real, passed, made)
    any_far, far = _worst(error, None), _worst(error, 0)
    lost = _lost(passed, made)
    motion, rows = signals["motion"], []
    for name, signal in signals.items():
        both = np.concatenate((controls[name], signal[:few]))
        strange = np.arange(2 * few)[:, None] < few + np.zeros(FRAMES)
        control = _auroc(both, strange, ~strange, np.tile(groups[:few], 2))
        rows.append(
            SignalRow(
                name,
                _compared(signal, any_far, far, groups, motion),
                _compared(signal, lost, lost, groups, motion),
                control,
            )
        )
    return SignalsReport(
        world.spec.name,
        f"{sampling.steps} steps of the {world.dynamics}, {sampling.sampler}",
        len(moments),
        FRAMES,
        len(np.unique(groups)),
        (int(far[0].sum()), int(far[1].sum())),
        (int(lost[0].sum()), int(lost[1].sum())),
        rows,
    )


def _roll_out(
    model: WorldModel,
    contexts: list[Context],
    actions: Tensor,
    seed: int,
    least: float,
    progress: bool,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Frames, uint8 (windows, frames, H, W, 3), and signals of them, each (windows, frames).

    Args:
        model: with the sampling to judge; it is told to capture nothing.
        contexts: one a window.
        actions: encoded, (frames, windows, action_width).
        seed: of the noise.
        least: added to the motion that signals are divided by.
        progress: show a progress bar.
    """
    model.captures = False  # states are forked for every frame
    count = len(contexts)
    state = model.start(contexts, [(seed, i) for i in range(count)])
    other = torch.tensor([mix(seed, i, _SALT) for i in range(count)], device=model.device)
    finer = replace(model.sampling, steps=model.sampling.steps + 1)
    before = torch.stack([c.latents[-1] for c in contexts]).to(model.device)
    frames, found = [], {name: [] for name in ("re-encoding", "spread", "shift", "motion")}
    for action in progress_bar(actions, "frames to find wrong ones among", progress):
        beside, longer = state.fork(), state.fork()
        beside.keys = other
        again = model.draw(beside, action).latents[:, 0]
        shifted = model.draw(longer, action, 1, finer).latents[:, 0]
        made = model.step(state, action).latents
        picture = model.decode(made)
        frames.append(picture.cpu().numpy())
        found["re-encoding"].append(model.reencoding_error(made, picture).square())
        found["spread"].append(_difference(again, made))
        found["shift"].append(_difference(shifted, made))
        found["motion"].append(_difference(made, before))
        before = made
    plain = {name: torch.stack(parts, 1).cpu().numpy() for name, parts in found.items()}
    moved = plain["motion"] + least
    divided = {f"{name} / motion": plain[name] / moved for name in plain if name != "motion"}
    smooth = {f"{name}, mean of {SMOOTHED}": _smoothed(signal) for name, signal in plain.items()}
    return np.stack(frames, 1), plain | divided | smooth


def _difference(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of latents (..., C, h, w), (...)."""
    return (first.float() - second.float()).square().flatten(-3).mean(-1)


def _smoothed(signal: np.ndarray) -> np.ndarray:
    """The mean over the last ``SMOOTHED`` frames, of (windows, frames)."""
    means = [signal[:, max(0, t + 1 - SMOOTHED) : t + 1].mean(1) for t in range(signal.shape[1])]
    return np.stack(means, 1)


def _added_error(real: np.ndarray, passed: np.ndarray, made: np.ndarray) -> np.ndarray:
    """What the dynamics adds to the tokenizer's error, dB (windows, frames); NaN where unknown.

    Args:
        real: uint8 (windows, 1 + frames, H, W, 3), the first one being the last before.
        passed: the same through the tokenizer.
        made: uint8 (windows, frames, H, W, 3).
    """
    added = np.full(made.shape[:2], np.nan)
    for t in range(made.shape[1]):
        moved = moving_pixels(real[:, 0], real[:, t + 1])
        count = moved.sum((1, 2))
        target = real[:, t + 1].astype(np.float32)
        errors = [
            (np.square(target - frames).mean(-1) * moved).sum((1, 2))
            for frames in (made[:, t], passed[:, t + 1])
        ]
        known = count >= max(1, _LEAST_MOVING * moved[0].size)
        with np.errstate(divide="ignore", invalid="ignore"):
            added[known, t] = 10 * np.log10(errors[0] / errors[1])[known]
    return added


def _worst(error: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The worst quarter and the best half, bool like ``error``; NaN is in neither."""
    if np.isnan(error).all(axis).any():
        raise RecordingError("nothing moves in the recordings' windows; use more --windows")
    most, half = (np.nanquantile(error, q, axis=axis) for q in (0.75, 0.5))
    return error > most, error <= half


def _lost(passed: np.ndarray, made: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames that lack, and that show, the bright things; see ``SignalsReport.lost``."""
    light = np.stack([luminance(window) for window in passed])
    threshold = np.percentile(light, BRIGHT)
    there, least = light > threshold, max(1, _LEAST_BRIGHT * light[0, 0].size)
    bright = torch.from_numpy(np.stack([luminance(window) > threshold for window in made])).float()
    near = functional.max_pool2d(bright, 2 * _NEAR + 1, 1, _NEAR).numpy() > 0
    count = there.sum((2, 3))
    share = (there[:, 1:] & near).sum((2, 3)) / np.maximum(count[:, 1:], 1)
    shown = (count[:, 1:] >= least) & (count[:, :1] >= least)
    return shown & (share < _LOST), shown & (share >= _KEPT)


def _compared(
    signal: np.ndarray,
    any_number: tuple[np.ndarray, np.ndarray],
    same_number: tuple[np.ndarray, np.ndarray],
    groups: np.ndarray,
    motion: np.ndarray,
) -> dict[str, tuple[float, float]]:
    """See ``SignalRow.far``; labels are wrong and good frames, as among frames of any number."""
    wrong, good = same_number
    early = np.arange(signal.shape[1]) < EARLY
    return {
        "any": _auroc(signal, *any_number, groups, any_number=True),
        "same": _auroc(signal, wrong, good, groups),
        "early": _auroc(signal, wrong & early, good & early, groups),
        "alike": _auroc(signal, wrong, good, groups, motion),
    }


def _auroc(
    signal: np.ndarray,
    wrong: np.ndarray,
    good: np.ndarray,
    groups: np.ndarray,
    motion: np.ndarray | None = None,
    any_number: bool = False,
) -> tuple[float, float]:
    """The share of pairs of a wrong and a good frame in which the wrong one has more ``signal``.

    Args:
        signal: (windows, frames).
        wrong: bool (windows, frames).
        good: likewise.
        groups: (windows,), see ``Estimate.jackknife``.
        motion: (windows, frames), to pair only frames that move about as much; None for all.
        any_number: also pair frames of different numbers.

    Returns:
        The share, ties counting half, and its standard error; NaN without such pairs.
    """
    (bad, at), (fine, when) = np.nonzero(wrong), np.nonzero(good)
    paired = np.ones((len(bad), len(fine)), bool) if any_number else at[:, None] == when
    if motion is not None:
        logs = np.log(np.maximum(motion, 1e-12))
        paired &= np.abs(logs[bad, at][:, None] - logs[fine, when]) < np.log(ALIKE)
    left, right = signal[bad, at][:, None], signal[fine, when]
    more = ((left > right) + 0.5 * (left == right)) * paired
    names, group = np.unique(groups, return_inverse=True)
    into = np.eye(len(names), dtype=np.float32)
    # Sums over the pairs of each two groups, so that leaving one out is cheap.
    won, pairs = (
        into[group[bad]].T @ matrix.astype(np.float32) @ into[group[fine]]
        for matrix in (more, paired)
    )

    def share(used: np.ndarray) -> float:
        chosen = np.ix_(used, used)
        count = pairs[chosen].sum()
        return float(won[chosen].sum() / count) if count else float("nan")

    estimate = Estimate.jackknife(share, np.arange(len(names)))
    return estimate.value, estimate.error


def format_signals(report: SignalsReport) -> str:
    """The report as Markdown."""
    header = ["signal"]
    for label in ("far", "lost"):
        header += [f"{label}, any frames", "same number", f"1 to {EARLY}", "and alike in motion"]
    rows = [
        [row.signal, *map(_told, (*row.far.values(), *row.lost.values(), row.control))]
        for row in report.rows
    ]
    far, lost = report.far, report.lost
    return "\n".join(
        [
            f"{report.world}, {report.sampling}: {report.windows} windows of {report.frames} "
            f"frames from {report.episodes} held-out episodes. AUROC of telling wrong frames from "
            f"good ones: {far[0]:,} far from the real continuation against {far[1]:,}, "
            f"{lost[0]:,} that lost something bright against {lost[1]:,}.",
            "",
            table([*header, "temperature doubled"], rows),
        ]
    )


def _told(estimate: tuple[float, float]) -> str:
    return "{:.2f} ± {:.2f}".format(*estimate)
