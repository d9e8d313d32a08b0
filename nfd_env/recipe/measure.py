"""What recordings say about a game: how small its moving things are, how long it lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from skimage.measure import label

from nfd_env.data.episodes import Episodes
from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.metrics import MOVED

_PAIRS = 256  # pairs of consecutive frames that are looked at
_OF_A_THING = 24  # grey levels by which a pixel must change to belong to a thing that moves
_ALL_MOVES = 0.25  # share of moved pixels from which on the camera moves, not things
_SMALL = 0.5  # share of the moved pixels that belong to things no larger than those to be kept
_CHANNELS = (8, 12, 16)  # of a tokenizer's latents, to choose from
_LINEAR_PSNR = 29.0  # dB that so many numbers a latent must keep; the tokenizer keeps some dB more


@dataclass(frozen=True)
class GameMeasures:
    """What was measured on recordings.

    Attributes:
        frame_size: [H, W].
        small: side in pixels of small moving things, half of the moved pixels belong to such or
            smaller ones; infinite where the whole picture moves.
        moved: mean share of the pixels that change from one frame to the next.
        episodes: training episodes.
        median_length: of the episodes, in transitions.
        longest: of the held-out episodes, in transitions.
        ends: held-out episodes that terminated.
        mean_return: of all episodes.
        channels: latent channels that the pictures' details need, by levels of the tokenizer, see
            ``channels_needed``.
    """

    frame_size: list[int]
    small: float
    moved: float
    episodes: int
    median_length: float
    longest: int
    ends: int
    mean_return: float
    channels: dict[int, int] = field(default_factory=dict)


def measure(recordings: RecordedDataset, seed: int = 0) -> GameMeasures:
    """Look at ``recordings``.

    Raises:
        RecordingError: when a split is empty, or nothing ever changes in the picture.
    """
    train, held_out = recordings.split("train"), recordings.split("validation")
    for name, episodes in (("training", train), ("held-out", held_out)):
        if not episodes:
            raise RecordingError(
                f"{recordings.folder} has no {name} episodes: record more episodes (frames), or "
                "lower validation_every"
            )
    rng = np.random.default_rng(seed)
    things, shares, changes = list[int](), list[float](), False
    pairs = _pairs(train, rng)
    for before, after in pairs:
        change = np.abs(after.astype(np.int16) - before).max(-1)
        changes |= bool((change > MOVED).any())
        moved = change > _OF_A_THING
        shares.append(float(moved.mean()))
        areas = np.bincount(np.ravel(np.asarray(label(moved, connectivity=2))))[1:]
        things += [int(area) for area in areas if area > 1]
    if not changes:
        raise RecordingError(
            f"{recordings.folder}: nothing moves in the recorded frames; check source.frames, "
            "source.key and source.crop"
        )
    whole = float(np.median(shares)) > _ALL_MOVES or not things
    return GameMeasures(
        frame_size=list(recordings.spec.frame_shape[:2]),
        small=float("inf") if whole else side_of_small(things),
        moved=float(np.mean(shares)),
        episodes=len(train),
        median_length=float(np.median(train.lengths)),
        longest=int(held_out.lengths.max()),
        ends=int(held_out.terminated().sum()),
        mean_return=float(np.mean(recordings.episodes.returns)),
        channels=channels_needed(np.stack([before for before, _ in pairs])),
    )


def side_of_small(areas: Sequence[int]) -> float:
    """How large small things are: these and all smaller ones hold half of the pixels that moved.

    By pixels, not by things: of a textured surface that moves a threshold leaves specks, so that
    counted one by one things of two pixels are the most in any game that is not of plain sprites.

    Args:
        areas: of the things that moved, in pixels, in any order; at least one.

    Returns:
        The side, in pixels, of a square of such an area.
    """
    ordered = np.sort(areas)
    held = np.cumsum(ordered)
    return float(np.sqrt(ordered[np.searchsorted(held, _SMALL * held[-1])]))


def channels_needed(frames: np.ndarray) -> dict[int, int]:
    """How many numbers a latent must have, for each number of levels, to keep frames' details.

    Judged by principal components of the patches that a latent stands for: eight of them hold a
    game of plain sprites (31 dB of Breakout), but not light in water (25 dB of BigFish, whose
    tokenizer of 8 channels lost all fine vertical lines). See docs/trials.md.

    Args:
        frames: uint8 (n, H, W, 3).

    Returns:
        For 2, 3 and 4 levels, where they divide the frame: the fewest of 8, 12 and 16 whose linear
        projection reaches 29 dB, else 16.
    """
    found = {}
    most = 255**2 / 10 ** (_LINEAR_PSNR / 10)  # squared error a number
    count, height, width, colours = frames.shape
    for levels in (2, 3, 4):
        side = 2**levels
        if height % side or width % side:
            continue
        tiles = frames.reshape(count, height // side, side, width // side, side, colours)
        patches = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side * colours)
        patches = patches.astype(np.float32)  # np.cov would make them twice as large, twice
        patches -= patches.mean(0, dtype=np.float64)
        values = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]
        lost = [max(values[n:].sum(), 0.0) / len(values) for n in _CHANNELS]
        enough = (n for n, square in zip(_CHANNELS, lost, strict=True) if square <= most)
        found[levels] = next(enough, _CHANNELS[-1])
    return found


def _pairs(episodes: Episodes, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    lengths = episodes.lengths
    chosen = rng.choice(len(episodes), _PAIRS, p=lengths / lengths.sum())
    pairs = []
    for number in chosen:
        first = int(rng.integers(lengths[number]))
        frames = episodes[number].frames
        pairs.append((np.array(frames[first]), np.array(frames[first + 1])))
    return pairs
