"""``nfd bench``: how fast a world steps, next to what the machine could do."""

from __future__ import annotations

import math
import platform
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.streams import ActionStream
from nfd_env.evaluation.tables import table
from nfd_env.inference.world_model import WorldModel
from nfd_env.models.dynamics import CONTEXT
from nfd_env.worlds.load import World

_MATMUL_SIZE, _MATMUL_SIZE_GPU = 1024, 8192


@dataclass(frozen=True)
class Pace:
    """Env steps a second of all environments together, and how long a step took."""

    env_steps_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class BatchReport:
    """What was measured at one number of environments.

    Attributes:
        rgb: with frames decoded.
        latent: without.
        transformer_gflop: arithmetic of an env step in the dynamics, ``step_gflop``.
        transformer_gflops: the same a second.
        matmul_gflops: of a large matrix product, in turn.
        matmul_share: transformer over matrix product.
        acceptance: share of drafted frames that were used; None without speculation.
    """

    rgb: Pace
    latent: Pace
    transformer_gflop: float
    transformer_gflops: float
    matmul_gflops: float
    matmul_share: float
    acceptance: float | None


@dataclass(frozen=True)
class LateFrame:
    """Cost of a frame number ``frame`` over that of number 10; memory that grew in between, MiB.

    NaN where the system does not say.
    """

    frame: int
    ratio: float
    memory_growth_mb: float


@dataclass(frozen=True)
class BenchReport:
    """How fast a world steps; ``envs`` by the number of environments."""

    world: str
    device: str
    torch: str
    threads: int
    sampling_steps: int
    speculative_frames: int
    precision: str
    matmul_size: int
    envs: dict[int, BatchReport]
    late_frame: LateFrame | None


def benchmark(
    world: World,
    sampling_steps: int | None = None,
    batches: tuple[int, ...] = (1, 8, 32),
    seconds: float = 5.0,
    long_frames: int = 10_000,
    speculative_frames: int = 1,
) -> BenchReport:
    """Time a world's env; every figure of one report comes from one run.

    Args:
        world: a loaded world; the env is made on its device.
        sampling_steps: None for the world's default.
        batches: numbers of environments.
        seconds: time spent on each figure.
        long_frames: the frame number at which the cost of a frame is compared with frame 10; 0
            leaves the comparison out.
        speculative_frames: see ``NFDVectorEnv``; with more than 1, actions are held for 5 to 20
            frames instead of being random.

    Raises:
        ValueError: on a number out of range, before anything is measured.
    """
    if not batches:
        raise ValueError("there are no batches to measure: give numbers of environments")
    device = world.model.device
    model = world.model
    if sampling_steps is not None:
        model = model.with_sampling(replace(model.sampling, steps=sampling_steps))
    size = _MATMUL_SIZE if device.type == "cpu" else _MATMUL_SIZE_GPU
    drawing = {"sampling_steps": sampling_steps, "speculative_frames": speculative_frames}
    made = {c: {o: make_env(world, c, o, **drawing) for o in ("rgb", "latent")} for c in batches}
    envs = {}
    for count in list(made):
        paces, accepted = {}, {}
        for obs_type, env in made.pop(count).items():
            _start(env)
            times, accepted[obs_type] = _step_times(env, seconds)
            p50, p95, p99 = (float(np.percentile(times, p) * 1e3) for p in (50, 95, 99))
            paces[obs_type] = Pace(float(count * len(times) / times.sum()), p50, p95, p99)
        transformer, matmul = _transformer_and_matmul(world, model, count, seconds, size)
        gflop, fastest = step_gflop(model) * count, 2 * size**3 / 1e9 / matmul
        envs[count] = BatchReport(
            paces["rgb"],
            paces["latent"],
            gflop,
            gflop / transformer,
            fastest,
            gflop / transformer / fastest,
            accepted["rgb"] if speculative_frames > 1 else None,
        )
    return BenchReport(
        world.spec.name,
        describe_device(device),
        str(torch.__version__),
        torch.get_num_threads(),
        model.sampling.steps,
        speculative_frames,
        model.precision,
        size,
        envs,
        _late_frame(world, sampling_steps, long_frames) if long_frames else None,
    )


def describe_device(device: torch.device) -> str:
    """Name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def step_gflop(model: WorldModel) -> float:
    """Arithmetic of one env step in the dynamics, in GFLOP, with a full window.

    Only what is really computed counts: of the finished frame, the last block's keys and values.
    """
    c = model.dynamics.config
    hidden = -(-(8 * c.width) // (3 * 256)) * 256
    embedding = c.latent_channels * c.patch**2 * c.width
    output, moving = embedding, 0
    if c.recent:
        output = CONTEXT * c.patch**2 * c.width
        seen = CONTEXT + c.latent_channels + c.recent * (c.latent_channels + 1)
        kernels = seen + 2 * c.local_blocks * c.local_width + c.latent_channels
        moving = 9 * c.latent_height * c.latent_width * c.local_width * kernels
        moving += 2 * c.local_blocks * c.local_width * c.width
    attention = 2 * c.tokens * c.window * c.width
    block = 4 * c.width**2 + 3 * c.width * hidden + attention
    modulated, rank = (6 * c.layers + 2) * c.width, c.modulation_rank
    per_frame = rank * (c.width + modulated) if rank else c.width * modulated
    per_frame += 2 * c.width**2 + (256 + c.action_width) * c.width
    unfinished = c.tokens * (c.layers * block + embedding + output) + per_frame + moving
    finished = c.tokens * ((c.layers - 1) * block + 2 * c.width**2 + embedding) + per_frame
    return 2 * (finished + model.sampling.steps * unfinished) / 1e9


def make_env(world: World, count: int, obs_type: str, **kwargs: Any) -> NFDVectorEnv:
    """An env to time, of a world that is loaded, on its device and in its precision."""
    return NFDVectorEnv(
        world.folder,
        count,
        device=world.model.device,
        precision=world.model.precision,
        obs_type=obs_type,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        **{"dynamics": world.dynamics, **kwargs},
    )


def _start(env: NFDVectorEnv) -> NFDVectorEnv:
    env.reset(seed=0)
    env.action_space.seed(0)
    return env


def _step_times(env: NFDVectorEnv, seconds: float) -> tuple[np.ndarray, float]:
    """Seconds of each env step, and the share of drafted frames that were accepted."""
    stream = ActionStream("held keys" if env.speculative_frames > 1 else "random", env)
    actions = [stream.next(None).copy() for _ in range(512)]
    for i in range(env.model.dynamics.config.window + 2):
        env.step(actions[i])
    times: list[float] = []
    info: dict[str, Any] = {}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 20:
        begin = time.perf_counter()
        info = env.step(actions[len(times) % 512])[-1]
        times.append(time.perf_counter() - begin)
    counts = info.get("speculation", {"accepted": np.zeros(1), "dropped": np.zeros(1)})
    return np.array(times), acceptance_rate(counts["accepted"].sum(), counts["dropped"].sum())


def acceptance_rate(accepted: float, dropped: float) -> float:
    """The share of drafted frames that were used, of those whose fate is known; 0 without any."""
    return float(accepted / (accepted + dropped)) if accepted + dropped else 0.0


def _transformer_and_matmul(
    world: World, model: WorldModel, count: int, seconds: float, size: int
) -> tuple[float, float]:
    """What an env step's transformer passes and a large matrix product take.

    They take turns, so that whatever slows the machine slows both, and of both the median counts.
    Where a step is replayed as one CUDA graph, all of it counts as passes.

    Returns:
        Seconds of the passes, and of one ``size``^3 product in the model's number format.
    """
    dynamics, device = model.dynamics, model.device
    state = model.start([world.starts[0]] * count, [(0, i) for i in range(count)])
    passes: list[float] = []
    products: list[float] = []
    stream = dynamics.stream

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        out = stream(*args, **kwargs)
        _synchronise(device)
        passes[-1] += time.perf_counter() - begin
        return out

    action = torch.zeros(count, world.codec.width, device=device)
    dtype = dynamics.embed.weight.dtype
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if not model.captures:
        dynamics.stream = timed  # type: ignore[method-assign]
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(passes) < 2 * dynamics.config.window:
            passes.append(0.0)
            begin = time.perf_counter()
            model.step(state, action)
            if model.captures:
                _synchronise(device)
                passes[-1] = time.perf_counter() - begin
            begin = time.perf_counter()
            torch.mm(a, b)
            _synchronise(device)
            products.append(time.perf_counter() - begin)
    finally:
        dynamics.__dict__.pop("stream", None)
    full = slice(dynamics.config.window, None)
    return float(np.median(passes[full])), float(np.median(products[full]))


def _late_frame(world: World, sampling_steps: int | None, frames: int) -> LateFrame:
    """Time frames near number ``frames`` and near number 10 in turn."""
    young, old = (
        _start(make_env(world, 1, "rgb", sampling_steps=sampling_steps)) for _ in range(2)
    )
    fresh = young.save_state()
    memory = _peak_memory()
    for i in range(frames):
        old.step([old.single_action_space.sample()])
        if i == frames // 10:
            memory = _peak_memory()
    grown = _peak_memory() - memory
    times: dict[str, list[float]] = {"young": [], "old": []}
    for i in range(400):
        if i % 20 == 0:
            young.restore_state(fresh)
            for _ in range(10):
                young.step([young.single_action_space.sample()])
        for name, env in (("young", young), ("old", old)):
            action = [env.single_action_space.sample()]
            begin = time.perf_counter()
            env.step(action)
            times[name].append(time.perf_counter() - begin)
    ratio = float(np.median(times["old"]) / np.median(times["young"]))
    return LateFrame(frames, ratio, grown)


def _peak_memory() -> float:
    """The most that this process has had, MiB; NaN where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def format_report(report: BenchReport) -> str:
    """The report as Markdown."""
    header = ["envs", "env steps/s", "p50 / p95 / p99 ms", "without decoding"]
    header += ["dynamics GFLOP/s", f"{report.matmul_size}³ matrix product GFLOP/s, in turn"]
    rows = [
        [
            str(count),
            f"{row.rgb.env_steps_per_second:.0f}",
            f"{row.rgb.p50_ms:.1f} / {row.rgb.p95_ms:.1f} / {row.rgb.p99_ms:.1f}",
            f"{row.latent.env_steps_per_second:.0f}",
            f"{row.transformer_gflops:.0f}",
            f"{row.matmul_gflops:.0f}",
            f"{row.matmul_share:.2f}",
        ]
        for count, row in report.envs.items()
    ]
    lines = [
        f"{report.world} on {report.device}: {report.sampling_steps} sampling steps, "
        f"torch {report.torch}, {report.threads} threads, {report.precision}",
        "",
        table([*header, "share of it"], rows),
    ]
    if report.speculative_frames > 1:
        rates = ", ".join(f"{r.acceptance:.2f} ({n})" for n, r in report.envs.items())
        lines += [
            "",
            f"Speculation draws {report.speculative_frames} frames jointly; actions held for 5 "
            f"to 20 frames. Accepted of the drafted frames (envs): {rates}.",
        ]
    if (late := report.late_frame) is not None:
        grown = late.memory_growth_mb
        memory = "" if math.isnan(grown) else f"; memory grew by {grown:.1f} MiB in between"
        lines += [
            "",
            f"A frame at number {late.frame:,} costs {late.ratio:.3f} times one at number "
            f"10{memory}.",
        ]
    return "\n".join(lines)
