"""Pictures on their way to a browser: JPEG or PNG for each, MP4 for the last minute."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from nfd_env.play.drift import Moment, save_trail
from nfd_env.play.game import Game
from nfd_env.play.recording import display_size
from nfd_env.video import write_mp4

# Small pictures of games have hard edges of pure colours: little loss, no colour subsampling.
_QUALITY = 92


def compress(frame: np.ndarray, pixelated: bool) -> bytes:
    """A frame, uint8 (H, W, 3), as JPEG; as PNG where every pixel is enlarged to be seen."""
    target = io.BytesIO()
    if pixelated:  # 1.7 times the bytes of 64 x 64 pixels, where JPEG is off by up to 34 levels
        Image.fromarray(frame).save(target, "PNG", compress_level=3)
    else:
        Image.fromarray(frame).save(target, "JPEG", quality=_QUALITY, subsampling=0)
    return target.getvalue()


def film(pictures: Sequence[bytes], game: Game) -> bytes:
    """The MP4 of a play from its pictures."""

    def frames() -> Iterator[np.ndarray]:
        for picture in pictures:
            yield np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))

    first = next(frames())
    target = io.BytesIO()
    pixelated = game.display == "pixelated"
    size = display_size(first.shape, game.display_aspect, 288, pixelated)
    write_mp4(target, frames(), game.fps, size=size, pixelated=pixelated, live=True)
    return target.getvalue()


def trail_bytes(trail: Sequence[Moment], seed: int | None) -> bytes:
    """See ``save_trail``."""
    target = io.BytesIO()
    save_trail(trail, target, seed)
    return target.getvalue()
