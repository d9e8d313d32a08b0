"""MP4 in and out (H.264, so that any browser shows it), and strips of frames.

PyAV and Pillow are imported where they are used: a world loads and steps without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from nfd_env.files import atomic_write

_LARGEST = 2_000_000_000  # bytes of pixels that are read of one film


@contextmanager
def mp4_writer(
    target: str | Path | IO[bytes],
    fps: float,
    size: tuple[int, int] | None = None,
    crf: int = 18,
    exact: bool = False,
    pixelated: bool = False,
    live: bool = False,
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends a frame, uint8 RGB (H, W, 3), to an H.264 MP4.

    The file is there, whole, when the block has ended; after an error or a kill ``target`` is what
    it was before.

    Args:
        target: the file to write, or an open binary one.
        fps: frames a second.
        size: even (width, height) that frames are scaled to; None for that of the first frame.
        crf: quality, lower is better.
        exact: keep full colour resolution (yuv444p), which browsers do not show.
        pixelated: scale with hard edges.
        live: spend little time, on one core, because something is played meanwhile.

    Raises:
        ValueError: when the block ends without a frame.
        OSError: when the file cannot be written.
    """
    import av
    from av.video.reformatter import Interpolation

    pixels = "yuv444p" if exact else "yuv420p"
    how = Interpolation.POINT if pixelated else Interpolation.BICUBIC
    stream: Any = None
    with ExitStack() as stack:
        opened: Any = target
        if isinstance(target, str | Path):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(atomic_write(target))
            temporary.touch()  # PyAV would find out at the first frame only
            opened = str(temporary)
        container = stack.enter_context(av.open(opened, "w", format="mp4"))

        def append(frame: np.ndarray) -> None:
            nonlocal stream
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
                stream.width, stream.height = size or frame.shape[1::-1]
                stream.pix_fmt, stream.options = pixels, {"crf": str(crf)}
                if live:
                    stream.codec_context.thread_count = 1
                    stream.options = {"crf": str(crf), "preset": "veryfast"}
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            if size is not None:
                picture = picture.reformat(*size, pixels, interpolation=how)
            container.mux(stream.encode(picture))

        yield append
        if stream is None:
            raise ValueError(f"{target}: no frames to write")
        container.mux(stream.encode())


def write_mp4(
    target: str | Path | IO[bytes], frames: Iterable[np.ndarray], fps: float, **kwargs: Any
) -> None:
    """Write a whole MP4 of frames of even size; see ``mp4_writer`` for the other arguments."""
    with mp4_writer(target, fps, **kwargs) as append:
        for frame in frames:
            append(frame)


def write_gif(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> Path:
    """Write uint8 RGB frames (H, W, 3) as an endless GIF of 64 colours."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(f).quantize(64, dither=Image.Dither.NONE) for f in frames]
    kwargs: dict[str, Any] = {"append_images": images[1:], "duration": round(1000 / fps), "loop": 0}
    with atomic_write(path) as temporary:
        images[0].save(temporary, "GIF", save_all=True, **kwargs)
    return path


def read_mp4(path: str | Path, most: int | None = None) -> np.ndarray:
    """All frames of a video, uint8 (T, H, W, 3).

    A small file can hold more pictures than there is memory for, so that nothing is read beyond
    what may be.

    Args:
        path: the file.
        most: frames that it may have; None for as many as 2 GB.

    Raises:
        ValueError: when the file is missing, damaged, has no picture or too many or large ones.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            context, frames, size = container.streams.video[0].codec_context, [], 0
            _check_pixels(path, 3 * context.width * context.height)
            for frame in container.decode(video=0):
                size += 3 * frame.width * frame.height
                _check_pixels(path, size)
                if len(frames) == most:
                    raise ValueError(f"{path}: has more than {most} frames")
                frames.append(frame.to_ndarray(format="rgb24"))
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: cannot be read as a video: {error}") from None
    if not frames:
        raise ValueError(f"{path}: has no frames")
    return np.stack(frames)


def _check_pixels(path: str | Path, size: int) -> None:
    if size > _LARGEST:
        raise ValueError(f"{path}: its frames take more than {_LARGEST / 1e9:.0f} GB")


def enlarge(frame: np.ndarray, height: int, aspect: float = 0.0) -> np.ndarray:
    """Resize (H, W, 3) to ``height`` rows and, with ``aspect`` > 0, height * aspect columns."""
    from PIL import Image

    width = height * (aspect or frame.shape[1] / frame.shape[0])
    size = (max(2, round(width / 2) * 2), round(height / 2) * 2)
    return np.array(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))


def caption(frame: np.ndarray, text: str) -> np.ndarray:
    """Put a line of ``text`` above ``frame``, 24 pixels high; smaller letters where it is long."""
    from PIL import Image, ImageDraw, ImageFont

    width = frame.shape[1]
    bar = Image.new("RGB", (width, 24), (24, 24, 24))
    fonts = [ImageFont.load_default(size) for size in range(14, 7, -1)]
    font = next((f for f in fonts if f.getlength(text) <= width - 12), fonts[-1])
    ImageDraw.Draw(bar).text((6, 12), text, (235, 235, 235), font, anchor="lm")
    return np.concatenate((np.array(bar), frame))


def write_png(path: str | Path, picture: np.ndarray) -> Path:
    """Write a uint8 RGB picture (H, W, 3)."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")
    return path
