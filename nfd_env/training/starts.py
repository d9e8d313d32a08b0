"""Thousands of recorded moments for episodes to start from."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter

import numpy as np
import torch

from nfd_env.config import check_ranges, config_class
from nfd_env.data.latents import LatentDataset, LatentEpisode
from nfd_env.data.shards import RecordedDataset
from nfd_env.data.windows import Places, actions_into, encoded_into
from nfd_env.inference.state import Context
from nfd_env.progress import progress_bar
from nfd_env.training.recorded import check_of_world
from nfd_env.worlds.load import World

_CHECKED = 64  # frames that the tokenizer is tried on
_CHUNK = 64  # frames encoded at a time
_QUIETLY = 4096  # frames are encoded without a progress bar
_STRANGE = 2.0  # times the re-encoding error of the world's own starts


@config_class
class StartsConfig:
    """Recorded moments to draw.

    Attributes:
        recordings: the data-set folder.
        latents: folder of its latents, as the world's own training left them; "" encodes the
            frames that are drawn.
        count: moments, drawn evenly from all training frames.
        frames: frames that each of them brings along.
        margin: frames that the recorded episode still went on for, so that nothing starts where
            the end cannot be averted any more.
        ending_share: in [0, 1], share of the moments that lie before the recorded ends (not
            truncations) of episodes, where there is something to avert.
        ending_frames: how long before them at most, in frames, from ``margin`` on.
        seed: of the draw.
    """

    recordings: str
    latents: str = ""
    count: int = 4096
    frames: int = 8
    margin: int = 35
    ending_share: float = 0.0
    ending_frames: int = 70
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        some = "[1, inf)"
        check_ranges(self, "starts.", count=some, frames=some, margin=some, ending_share="[0, 1]")
        check_ranges(self, "starts.", seed="[0, 2**63)")
        if self.ending_share and self.ending_frames <= self.margin:
            raise ValueError(
                f"starts.ending_frames must be above starts.margin = {self.margin}, "
                f"got {self.ending_frames}"
            )


def recorded_starts(settings: StartsConfig, world: World) -> list[Context]:
    """Draw moments without repetition from the training split; half-precision, on the CPU.

    Args:
        settings: which and how many.
        world: whose tokenizer has made the latents, or makes them.

    Returns:
        ``settings.count`` contexts for ``NFDVectorEnv(starts=...)``.

    Raises:
        RecordingError: when the recordings cannot be read, or are of another game.
        ValueError: when there are not as many moments, or the latents are those of another
            tokenizer.
    """
    recordings = RecordedDataset(settings.recordings)
    check_of_world(world, recordings)
    dataset = LatentDataset(recordings, settings.latents, "train")
    # Places for the first frame, so that margin frames follow the last one.
    everywhere = Places(dataset.episodes.lengths + 1, settings.frames + settings.margin)
    near = [
        everywhere.number(number, 0)
        + np.arange(max(0, room - settings.ending_frames + settings.margin), room)
        for number, room in enumerate(everywhere.room)
        if dataset.episodes.ended[number]
    ]
    near_ends = np.concatenate([*near, np.arange(0)])
    dangerous = round(settings.ending_share * settings.count)
    for wanted, there, where in (
        (settings.count, len(everywhere), ""),
        (dangerous, len(near_ends), f" at most {settings.ending_frames} frames before an end,"),
    ):
        if there < wanted:
            raise ValueError(
                f"{wanted} starts are wanted, but {settings.recordings} has only {there} "
                f"moments{where} with {settings.frames} frames before and {settings.margin} after "
                "them: lower starts.count or starts.ending_share"
            )
    rng = np.random.default_rng(settings.seed)
    places = rng.choice(near_ends, dangerous, replace=False)
    others = np.setdiff1d(np.arange(len(everywhere)), places, assume_unique=True)
    places = np.append(places, rng.choice(others, settings.count - dangerous, replace=False))
    found = [everywhere.find(place) for place in np.sort(places)]
    if not settings.latents:
        return _encoded(world, dataset, found, settings.frames)
    starts = [episode_context(dataset.episodes[e], first, settings.frames) for e, first in found]
    _check_tokenizer(starts, settings, world)
    return starts


def _encoded(
    world: World, dataset: LatentDataset, found: list[tuple[int, int]], frames: int
) -> list[Context]:
    """Windows by (episode, first frame), sorted; of each episode a frame is encoded once."""
    starts: list[Context] = []
    with progress_bar(
        None, "encoding starts", len(found) * frames > _QUIETLY, total=len(found)
    ) as bar:
        for number, group in groupby(found, itemgetter(0)):
            firsts = [first for _, first in group]
            episode = dataset.episodes.reference(number)
            wanted = np.unique(np.add.outer(firsts, np.arange(frames)))
            # In stretches: reading one frame of a video costs as much as reading many in a row.
            stretches = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)
            pictures = np.concatenate([episode.frames[s[0] : s[-1] + 1] for s in stretches])
            parts = torch.from_numpy(pictures).split(_CHUNK)
            latents = torch.cat([world.model.encode(part) for part in parts]).half().cpu()
            for first in firsts:
                begin = int(np.searchsorted(wanted, first))
                actions = encoded_into(episode, world.codec, first, frames).half()
                kept = latents[begin : begin + frames].clone()
                starts.append(Context(kept, actions, first == 0))
            bar.update(len(firsts))
    return starts


def episode_context(episode: LatentEpisode, first: int, frames: int) -> Context:
    """Frames ``first`` to ``first + frames - 1`` of ``episode``, float16, to start a world from."""
    actions = actions_into(episode.actions, first, frames).astype(np.float16)
    latents = episode.latents[first : first + frames].copy()  # not all of the episode is kept
    return Context(torch.from_numpy(latents), torch.from_numpy(actions), first == 0)


def _check_tokenizer(starts: list[Context], settings: StartsConfig, world: World) -> None:
    """Latents of another tokenizer do not survive decoding and encoding."""

    def error(contexts: list[Context]) -> float:
        picked = contexts[:: -(-len(contexts) // _CHECKED)]
        latents = torch.stack([c.latents[-1] for c in picked]).to(world.model.device, torch.float32)
        return float(world.model.reencoding_error(latents, world.model.decode(latents)).mean())

    shape = world.model.dynamics.config.latent_shape
    if starts[0].latents.shape[1:] != shape or error(starts) > _STRANGE * error(world.starts):
        raise ValueError(
            f"{settings.latents} does not hold latents of the tokenizer of {world.spec.name}: name "
            "the folder that its own training left, or leave starts.latents out"
        )
