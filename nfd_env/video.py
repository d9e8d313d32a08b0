"""MP4 in and out (H.264, so that any browser shows it), and strips of frames.

PyAV, OpenCV and Pillow are imported where they are used: a world loads and steps without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

from nfd_env.files import atomic_write


def write_mp4(
    path: str | Path, frames: Iterable[np.ndarray], fps: float, crf: int = 18, exact: bool = False
) -> Path:
    """Write uint8 RGB frames (H, W, 3) of even size as H.264.

    Args:
        path: the file to write.
        frames: all of one shape.
        fps: frames a second.
        crf: quality, lower is better.
        exact: keep full colour resolution (yuv444p), which browsers do not show.
    """
    import av

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, av.open(str(temporary), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv444p" if exact else "yuv420p"
                stream.options = {"crf": str(crf)}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if stream is None:
            raise ValueError(f"{path}: no frames to write")
        container.mux(stream.encode())
    return path


def write_gif(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> Path:
    """Write uint8 RGB frames (H, W, 3) as an endless GIF of 64 colours."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(f).quantize(64, dither=Image.Dither.NONE) for f in frames]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0
    )
    return path


def read_mp4(path: str | Path) -> np.ndarray:
    """All frames of a video, uint8 (T, H, W, 3).

    Raises:
        ValueError: when the file is missing, damaged or has no picture.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: cannot be read as a video: {error}") from None
    if not frames:
        raise ValueError(f"{path}: has no frames")
    return np.stack(frames)


def enlarge(frame: np.ndarray, height: int, aspect: float = 0.0) -> np.ndarray:
    """Resize (H, W, 3) to ``height`` rows and, with ``aspect`` > 0, height * aspect columns."""
    import cv2

    width = height * (aspect or frame.shape[1] / frame.shape[0])
    size = (round(width / 2) * 2, round(height / 2) * 2)
    return cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)


def caption(frame: np.ndarray, text: str, rows: int = 24) -> np.ndarray:
    """Put a line of ``text`` above ``frame``."""
    import cv2

    bar = np.full((rows, frame.shape[1], 3), 24, np.uint8)
    cv2.putText(
        bar, text, (6, rows - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (235, 235, 235), 1, cv2.LINE_AA
    )
    return np.concatenate((bar, frame))


def write_png(path: str | Path, picture: np.ndarray) -> Path:
    """Write a uint8 RGB picture (H, W, 3)."""
    import cv2

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    with atomic_write(path) as temporary:  # OpenCV itself crashes on names beyond the locale
        temporary.write_bytes(encoded.tobytes())
    return path
