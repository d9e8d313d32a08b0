"""``nfd demo``: play a world with a scripted player and show what came out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete, Space

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.benchmark import describe_device
from nfd_env.evaluation.film import beside
from nfd_env.files import check_writable
from nfd_env.video import enlarge, write_gif, write_mp4, write_png
from nfd_env.worlds.clip import NoClipError, load_clip
from nfd_env.worlds.load import load_world


@dataclass(frozen=True)
class DemoReport:
    """What was played, and how fast.

    Attributes:
        sampling_steps: denoising steps a frame.
        restarts: how often an episode ended and was joined again.
        frames_per_second: of env steps alone, as are the percentiles of their latency.
        time_to_first_frame_s: loading included.
    """

    world: str
    device: str
    threads: int
    sampling_steps: int
    frames: int
    restarts: int
    frames_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    time_to_first_frame_s: float
    video: str
    strip: str


def demo(
    world: str,
    folder: str | Path,
    seconds: float = 20.0,
    seed: int = 0,
    sampling_steps: int | None = None,
    gif: str | Path | None = None,
    **kwargs: Any,
) -> DemoReport:
    """Replay a held-out recording's actions inside a world, and film both side by side.

    The scripted player presses what the recorded player pressed. When the world ends the episode,
    it starts again from the recording's present moment.

    Args:
        world: a world folder or a shipped name.
        folder: where ``demo.mp4`` and ``demo.png`` are written.
        seconds: playing time at the world's native rate.
        seed: of the world's noise.
        sampling_steps: None for the world's default.
        gif: also write the first six seconds as a small moving picture.
        kwargs: of ``nfd_env.worlds.load.load_world``.

    Raises:
        NoClipError: when the world has no recorded clip, or too short a one.
        CheckpointError: when the world or its clip is damaged.
        FolderError: when the films cannot be written.
    """
    begin = time.perf_counter()
    gif = None if gif is None else Path(gif).expanduser()
    check_writable(Path(folder) / "demo.mp4", Path(folder) / "demo.png", gif)
    loaded = load_world(world, **kwargs)
    folder = Path(folder).expanduser()
    clip = load_clip(loaded.folder)
    real, actions = clip.frames, clip.actions
    env = NFDVectorEnv(world, sampling_steps=sampling_steps, **kwargs)
    keep = env.model.dynamics.config.window
    first = keep - 1
    if len(actions) < keep + 2:
        raise NoClipError(
            f"{loaded.folder}: the clip has {len(real)} frames, {keep + 3} are needed to play along"
        )

    def join(frame: int, new_seed: int | None) -> np.ndarray:
        """Start the world at the recording's frame number ``frame``."""
        past = max(0, frame - keep + 1)
        context = {"frames": real[past : frame + 1], "actions": actions[past:frame]}
        observation, _ = env.reset(seed=new_seed, options={"context": context})
        return observation[0]

    join(first, seed)
    observation = env.step(actions[first : first + 1])[0][0]
    to_first_frame = time.perf_counter() - begin
    # Two at least, because the first one is not timed.
    count = min(max(2, int(seconds * loaded.spec.fps)), len(actions) - first - 1)
    made, times, restarts = [observation], [], 0
    ended = False
    for step in range(first + 1, first + count):
        if ended:
            join(step, None)
            restarts += 1
        begin = time.perf_counter()
        observation, _, terminated, truncated, _ = env.step(actions[step : step + 1])
        times.append(time.perf_counter() - begin)
        ended = bool(terminated[0] or truncated[0])
        made.append(observation[0])
    shown = real[first + 1 : first + 1 + len(made)]
    aspect = loaded.spec.source.display_aspect
    names, space = loaded.spec.source.action_names, env.single_action_space

    def picture(index: int) -> np.ndarray:
        name = _name(actions[first + index], space, names)
        return beside(
            [
                (shown[index], f"real recording   {name}"),
                (made[index], f"generated, same actions   frame {index + 1}"),
            ],
            aspect,
        )

    video = folder / "demo.mp4"
    write_mp4(video, (picture(i) for i in range(len(made))), loaded.spec.fps)
    picks = np.linspace(0, len(made) - 1, 6).astype(int)
    strip = write_png(folder / "demo.png", np.concatenate([picture(int(i)) for i in picks]))
    if gif:
        short = range(0, min(len(made), int(6 * loaded.spec.fps)), 3)
        write_gif(
            Path(gif).expanduser(), (enlarge(picture(i), 130) for i in short), loaded.spec.fps / 3
        )
    latency = np.array(times) * 1e3
    p50, p95, p99 = np.percentile(latency, (50, 95, 99))
    return DemoReport(
        loaded.spec.name,
        describe_device(env.model.device),
        torch.get_num_threads(),
        env.sampling.steps,
        len(made),
        restarts,
        1e3 / float(latency.mean()),
        float(p50),
        float(p95),
        float(p99),
        to_first_frame,
        str(video),
        str(strip),
    )


def _name(action: Any, space: Space, names: Sequence[str]) -> str:
    """What an action is called; its numbers where it has no name."""
    index = int(action) - int(space.start) if isinstance(space, Discrete) else len(names)
    if index < len(names):
        return names[index]
    return np.array2string(np.asarray(action), precision=1, suppress_small=True)


def format_report(report: DemoReport) -> str:
    """The report as lines of text."""
    return "\n".join(
        [
            f"{report.world} on {report.device} ({report.threads} threads), "
            f"{report.sampling_steps} sampling steps",
            f"{report.frames} frames at {report.frames_per_second:.1f} frames/s; latency "
            f"p50 {report.p50_ms:.1f} ms, p95 {report.p95_ms:.1f} ms, p99 {report.p99_ms:.1f} ms",
            f"time to first frame {report.time_to_first_frame_s:.2f} s (loading included); "
            f"episodes ended and joined again: {report.restarts}",
            f"video, real beside generated: {report.video}",
            f"strip of frames: {report.strip}",
        ]
    )
