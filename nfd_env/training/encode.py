"""Stage 2: the trained tokenizer turns recordings into latents, once, on disk."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from nfd_env.config import config_class
from nfd_env.data.shards import RecordedDataset
from nfd_env.devices import resolve_device
from nfd_env.files import atomic_write, found_file, owned_folder, save_text, writing
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import fingerprint_of, load_weights
from nfd_env.precision import autocast, choose_precision
from nfd_env.progress import progress_bar
from nfd_env.stopping import stopping
from nfd_env.training.loop import Progress
from nfd_env.training.ranks import ALONE, Ranks
from nfd_env.training.recorded import open_recordings

_CHUNK = 64  # frames encoded at a time
STAMP = "tokenizer.sha256"


class NotEncodedError(ValueError):
    """There are no latents of these recordings by this tokenizer."""


@config_class
class EncodeConfig:
    """What to encode.

    Attributes:
        recordings: the data-set folder.
        tokenizer: the finished tokenizer's weights.
        latents: folder of the latents.
        device: see ``nfd_env.devices.resolve_device``.
    """

    recordings: str
    tokenizer: str
    latents: str
    device: str = "cpu"


def encode(
    settings: EncodeConfig,
    progress: bool = True,
    on_step: Progress | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write one ``SHARD.npy`` of float16 latents (frames, C, h, w) a shard.

    Shards that are there already, by the same tokenizer, are kept: run it again to go on after a
    stop, or after more has been recorded.

    Args:
        settings: what to encode.
        progress: show a bar.
        on_step: called with frames done and frames in all.
        ranks: processes that call this together, and encode a share of the shards each.

    Raises:
        CheckpointError: when there is no such tokenizer.
        RecordingError: when the recordings cannot be used.
        FolderInUseError: when another process encodes into the folder.
        FolderError: when the folder cannot be written to.
    """
    device = resolve_device(settings.device)
    recordings = open_recordings(settings.recordings)
    tokenizer, folder = (Path(p).expanduser() for p in (settings.tokenizer, settings.latents))
    network = load_weights(tokenizer, Tokenizer, TokenizerConfig).to(device)
    identity = fingerprint_of(tokenizer)
    precision = choose_precision("auto", device)
    shards = list(recordings.shard_frames().items())[ranks.rank :: ranks.count]
    done, total = 0, sum(len(frames) for _, frames in shards)
    with (
        owned_folder(folder) if ranks.first else nullcontext(),
        stopping() as stop,
        ranks.losing_none(stop),
        stop.at_once(),
        progress_bar(None, "encoding", progress, total=total, unit="frame") as bar,
    ):

        def advance(frames: int) -> None:
            nonlocal done
            done += frames
            bar.update(frames)
            if on_step is not None:
                on_step(done, total)

        if ranks.first:
            _clear(folder, identity)
        ranks.wait()
        for shard, frames in shards:
            if _stored(folder, shard) == len(frames):
                advance(len(frames))
                continue
            parts = []
            for start in range(0, len(frames), _CHUNK):
                chunk = torch.from_numpy(np.array(frames[start : start + _CHUNK])).to(device)
                with torch.inference_mode(), autocast(device, precision):
                    latents = network.encode_frames(chunk)
                parts.append(latents.half().cpu().numpy())
                advance(len(chunk))
            with writing(folder), atomic_write(folder / f"{shard}.npy") as temporary:
                np.save(temporary, np.concatenate(parts))
        ranks.wait()


def _clear(folder: Path, identity: str) -> None:
    """Take away what another tokenizer has made, or a process that was killed while it wrote."""
    for left in folder.glob(".*.tmp.*"):
        left.unlink(missing_ok=True)
    stamp = folder / STAMP
    if not found_file(stamp, NotEncodedError) or stamp.read_text(encoding="utf-8") != identity:
        for old in folder.glob("*.npy"):
            old.unlink()
        save_text(stamp, identity)


def check_encoded(recordings: RecordedDataset, tokenizer: str | Path, latents: str | Path) -> None:
    """Check that ``encode`` has done its work, and for this tokenizer.

    Raises:
        NotEncodedError: saying what to run, when it has not.
        CheckpointError: when there is no such tokenizer.
    """
    folder, stamp = Path(latents), Path(latents) / STAMP
    identity = fingerprint_of(tokenizer)
    shards = recordings.shard_frames()
    missing = sum(_stored(folder, shard) != len(frames) for shard, frames in shards.items())
    if not found_file(stamp, NotEncodedError):
        reason = "holds no latents"
    elif stamp.read_text(encoding="utf-8") != identity:
        reason = f"holds the latents of another tokenizer than {tokenizer}"
    elif missing:
        reason = f"lacks the latents of {missing} of {len(shards)} shards of {recordings.folder}"
    else:
        return
    raise NotEncodedError(f"{latents} {reason}: run the stage encode first")


def _stored(folder: Path, shard: str) -> int:
    """Latents on disk of a shard; 0 where the file is missing or damaged."""
    found_file(folder / f"{shard}.npy", NotEncodedError)
    try:
        return len(np.load(folder / f"{shard}.npy", mmap_mode="r"))
    except (OSError, EOFError, ValueError, TypeError):
        return 0
