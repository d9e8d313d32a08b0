"""The learned world as a batched Gymnasium environment: how it is made, reset and stepped.

Longer than other files because the class's docstring is the reference of all its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from nfd_env.envs import checks
from nfd_env.envs.base import DYNAMICS, one_thread
from nfd_env.envs.moment import Moment
from nfd_env.envs.observing import observe_before
from nfd_env.envs.state import EnvState, check_state
from nfd_env.inference.cuda_graph import CapturedCall
from nfd_env.inference.noise import mix
from nfd_env.inference.speculation import advance, check_frames
from nfd_env.inference.state import Context
from nfd_env.sources.spec import short
from nfd_env.worlds.load import load_world

START_SALT = 0x5354  # separates the choice of a start from the noise that follows it
_OOD_REFERENCE = 64  # recorded frames that the out-of-distribution signal is relative to
_MOST_CONTEXT = 4096  # observations before the first; far more than any policy looks back
_MOST_SAMPLING_STEPS = 1000  # of the finest samplers in the literature
_BITS = {"fp32": 32, "bf16": 16}


class NFDVectorEnv(Moment, VectorEnv):  # named again for skrl, which looks no deeper
    """A batch of copies of a learned world, stepped together by one model.

    ## Description
    A Next-Frame Diffusion model (arXiv 2506.01380), trained on recorded play, draws the frame that
    follows from the frames so far and the action. Each copy has its own history, seed and episode.

    ## Action Space
    ``num_envs`` times the action space of the recorded environment.

    ## Observation Space
    With ``obs_type="rgb"`` uint8 frames (num_envs, H, W, 3); with ``obs_type="latent"`` the
    tokenizer's float32 latents (num_envs, C, h, w), which saves decoding; with
    ``obs_type="features"`` float32 (num_envs, C * h * w + F), the latents, flattened, and behind
    them what the world's heads make of the whole episode so far (see ``WorldModel.features``):
    a memory that an agent need not learn.

    ## Rewards
    Predicted from the generated frames; the sum over the frames of a step. float64 (num_envs,), or
    float32 with ``output="torch"``.

    ## Starting State
    Recorded moments that come with the world, or those of ``starts``, chosen by seed and episode;
    or, per reset, frames of the caller's own through ``options``.

    ## Episode End
    Termination: the model predicts each frame's probability of ending the episode, and it is drawn.
    Truncation: after ``max_episode_steps`` steps. A world's own limit is in frames: with
    ``frame_skip`` k it is reached after so many steps of k frames.

    ## Information
    The same keys at ``reset`` and ``step``, but for the last two, and arrays or tensors of one
    type each. Beside each ``name`` there is a mask ``_name``: False where no step was taken.
    ``hazard``: the probability with which the step could have terminated, at any of its
    ``frame_skip`` frames, float32 (num_envs,): the mean of ``terminated`` is its expectation.
    ``precision``: bits of the numbers that frames are drawn in, int64 (num_envs,): 32 or 16.
    ``ood``, with ``ood=True``: how far the frame is out of the distribution of real frames, float32
    (num_envs,); see ``watch_ood``.
    ``speculation``, with ``speculative_frames`` > 1: a dict of int64 (num_envs,) arrays that count
    the frames of each slot since its seed was last set: ``drafted`` ahead of their step,
    ``accepted`` (handed out without a transformer pass) and ``dropped``; the rest still waits.
    ``context``, with ``context_observations`` = n > 0: where an episode begins (see ``_context``),
    the observations before its first, (num_envs, n, *observation shape), oldest first, one step
    apart; zeros elsewhere.
    With ``AutoresetMode.SAME_STEP`` also ``final_obs`` and ``final_info``.

    ## Arguments
    world: a world folder or the name of a shipped world.
    num_envs: copies of the world.
    device: "auto", "cpu", "cuda", "cuda:N" or "mps".
    sampling_steps: denoising steps a frame; None for the world's default.
    frame_skip: frames an action is repeated for.
    speculative_frames: n >= 1, frames that one pass draws jointly on the assumption that the action
        is kept; 1 for no speculation. The drafts of an environment whose action changes are
        dropped, and one whose actions are rarely kept makes none (see
        ``nfd_env.inference.speculation.worthwhile``); ``nfd bench`` tells whether it pays. Within a
        ``frame_skip`` the assumption is always right, so that n = ``frame_skip`` draws each step's
        frames jointly. A jointly drawn frame sees those before it as they were being drawn, not as
        they came out.
    obs_type: "rgb", "latent" or "features".
    output: "numpy", or "torch" for tensors on the model's device.
    autoreset_mode: one of Gymnasium's three.
    max_episode_steps: steps, of ``frame_skip`` frames each, after which an episode is truncated;
        None for the world's own limit, which is in frames and rounded up to whole steps.
    render_mode: None or "rgb_array".
    precision: "fp32", "bf16", or "auto" for bf16 where the processor multiplies it in hardware.
    history_level: noise level in [0, 1) at which past frames are remembered; None for the world's
        default.
    temperature: > 0, at most 100, scale of the noise that frames are drawn from; None for the
        world's default. See ``SamplingConfig`` for what more of either does.
    ood: report ``info["ood"]``, at the cost of decoding and encoding each frame once.
    context_observations: n of ``info["context"]``, for policies that look back; 0 for none. Where
        the recorded moment does not reach so far back, its first observation is repeated.
    dynamics: "student" or "teacher" in a distilled world that comes with both, the teacher with
        its own number of sampling steps; "autoregressive" or "autoregressive_parallel" where that
        baseline was trained (``nfd train-baseline``); None for the world's default.
    starts: recorded moments that episodes start from: a sequence of ``Context``, or a file of
        ``nfd_env.worlds.starts.save_starts``; None for those that come with the world. With
        thousands of them and a small ``max_episode_steps``, what is generated stays close to what
        was recorded. They are copied as they are given, and go to the device when they are used.

    ## Reset options
    ``context``: {"frames": uint8 (T, H, W, 3), "actions": (T-1, ...)}, T >= 1, or a list of
    ``num_envs`` such entries (None: a recorded start): continue from these frames. Each of them
    costs encoding; the next frame depends on the latest few, rewards and ends remember all.
    ``start``: number of the recorded start to use, for every environment; or "beginning", to choose
    among those that are the beginning of an episode.
    ``reset_mask``: bool (num_envs,), which environments to reset.

    ## Reproducibility
    All noise is a function of (seed, episode, frame number): the same seed gives the same rollout
    bit for bit on one device, and slot i of a batch equals the single env with that slot's seed up
    to floating-point tolerance. An int seed s gives slot i the seed s + i.

    ## Copies and other processes
    ``copy.deepcopy`` and pickles hold the options and the running episodes; the world itself is
    loaded again from its folder. A copy goes on as the original does. In worker processes, e.g. of
    ``AsyncVectorEnv``, an env takes one thread unless OMP_NUM_THREADS says otherwise. One batch of
    n is faster than n workers. On a machine that is busy with other work, set
    OMP_WAIT_POLICY=PASSIVE or OMP_NUM_THREADS=1 before Python starts: see docs/env.md.

    ## Gymnasium's wrappers
    Those in ``gymnasium.wrappers.vector`` compute with numpy: use ``output="numpy"`` with them.
    ``NormalizeObservation`` needs ``autoreset_mode`` NEXT_STEP; ``RecordEpisodeStatistics`` and
    ``NormalizeReward`` know NEXT_STEP and SAME_STEP; ``RecordVideo`` shows an episode's last frame
    with NEXT_STEP only. Wrappers from elsewhere: Stable-Baselines3 needs SAME_STEP (see
    ``nfd_env.sb3``), TorchRL SAME_STEP or DISABLED (see ``nfd_env.torchrl``).
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(
        self,
        world: str | PathLike[str],
        num_envs: int = 1,
        device: str | torch.device = "auto",
        sampling_steps: int | None = None,
        frame_skip: int = 1,
        obs_type: str = "rgb",
        output: str = "numpy",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        precision: str = "auto",
        history_level: float | None = None,
        temperature: float | None = None,
        ood: bool = False,
        context_observations: int = 0,
        speculative_frames: int = 1,
        dynamics: str | None = None,
        starts: Sequence[Context] | str | PathLike[str] | None = None,
    ) -> None:
        """See the class.

        Raises:
            ValueError: on an argument out of range, or starts of another world.
            CheckpointError: when the world, or a file of starts, cannot be loaded.
            DeviceError: when the device is not there.
            RuntimeError: in a process that was forked from one that used the GPU.
        """
        super().__init__()
        self._check_common(num_envs, frame_skip, obs_type, output, max_episode_steps)
        checks.check_choice("render_mode", render_mode, (None, "rgb_array"))
        self.render_mode = render_mode
        self.context_observations = checks.check_whole(
            "context_observations", context_observations, 0, _MOST_CONTEXT
        )
        try:
            mode = AutoresetMode(autoreset_mode)
        except ValueError:
            raise ValueError(
                f"autoreset_mode must be one of {[m.value for m in AutoresetMode]}, "
                f"got {short(autoreset_mode)}"
            ) from None
        loaded = self._load(world, device, precision, dynamics)
        self._look_like(loaded, mode)
        size = int(np.prod(self.observation_space.shape or ())) * 4  # as float32 latents or so
        contexts = self.context_observations
        checks.check_room("context_observations", contexts, contexts * size)
        self.model = loaded.model
        self.starts = checks.check_starts(loaded, starts)
        if self.max_episode_steps is None:  # the world's own, which is in frames
            limit = math.ceil(loaded.spec.max_episode_steps / self.frame_skip)
            self.max_episode_steps = limit or None
        check_frames(speculative_frames, self.model)
        self.speculative_frames, self.drafting = speculative_frames, True
        self._changed: dict[str, Any] = {}
        self.set_sampling(sampling_steps, history_level, temperature)
        self._now: EnvState | None = None
        self._torn = np.zeros(self.num_envs, bool)
        self._decoded: Tensor | None = None
        self._decoder = CapturedCall()
        self._ood_scale: float | None = None
        self._ood_limit = np.inf
        if checks.check_flag("ood", ood):
            self.watch_ood()
        self._made = True

    @one_thread
    def set_sampling(
        self,
        sampling_steps: int | None = None,
        history_level: float | None = None,
        temperature: float | None = None,
        dynamics: str | None = None,
    ) -> None:
        """Change how the next frames are drawn; the episodes go on.

        Args:
            sampling_steps: see the class; None leaves it as it is.
            history_level: likewise.
            temperature: likewise.
            dynamics: likewise. The number of steps is that of the new dynamics, unless it was
                given. What an episode remembers was read by the old ones: reset soon.

        Raises:
            ValueError: on a value out of range, or dynamics that cannot go on from what the
                running episodes remember; nothing is changed then.
        """
        world, changed = self.world, dict(self._changed)
        if sampling_steps is not None:
            changed["steps"] = checks.check_whole(
                "sampling_steps", sampling_steps, 1, _MOST_SAMPLING_STEPS
            )
        for name, value in (("history_level", history_level), ("temperature", temperature)):
            if value is not None:
                changed[name] = checks.check_number(name, value)
        checks.check_choice("dynamics", dynamics, DYNAMICS)
        if dynamics not in (None, world.dynamics):
            world = load_world(world.folder, self.model.device, self.model.precision, dynamics)
            check_frames(self.speculative_frames, world.model)
            if self._now is not None:
                world.model.check_fits(self._now.world, self.speculative_frames)
        self._draw_by(world, changed)

    def watch_ood(self, limit: float = np.inf) -> None:
        """Report ``info["ood"]`` from now on, and truncate episodes in which it exceeds ``limit``.

        It is the re-encoding error of the frame that a step leads to, relative to its mean over
        the world's recorded starts (see ``WorldModel.reencoding_error``): about 1 for a real frame.
        It tells broken pictures, not sound-looking ones in which the game would have gone on
        otherwise: for these it is no better than chance (docs/results.md).

        Raises:
            ValueError: when ``limit`` is not above 0.
        """
        if not checks.check_number("the out-of-distribution limit", limit) > 0:
            raise ValueError(f"the out-of-distribution limit must be above 0, got {short(limit)}")
        self._ood_limit = limit
        if self._ood_scale is None:
            real = torch.cat([start.latents for start in self.world.starts])
            picked = real[:: -(-len(real) // _OOD_REFERENCE)].to(self.model.device)
            errors = self.model.reencoding_error(picked, self.model.decode(picked))
            self._ood_scale = float(errors.mean())

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each environment, -1 before the first reset."""
        return (-1,) * self.num_envs if self._now is None else tuple(self._now.seeds)

    @one_thread
    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | np.ndarray | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; see the class for ``options``.

        Args:
            seed: an int (slot i gets ``seed`` + i), or one a slot; a slot without one goes on to
                the next episode of the seed it has.
            options: see the class.

        Raises:
            ValueError: on a seed, mask or context that cannot be used; nothing is changed then.
            gymnasium.error.ResetNeeded: when the first reset leaves environments out.
        """
        self._need_open()
        seeds = checks.check_seeds(seed, self.num_envs)
        given = checks.check_options(options, checks.RESET_OPTIONS)
        mask = checks.check_mask(given.get("reset_mask"), self.num_envs, self._now is not None)
        rows = [int(r) for r in np.flatnonzero(mask)]
        contexts = checks.chosen_contexts(self.world, self.starts, given, rows, self.num_envs)
        keys = []
        for row in rows:
            chosen, now = seeds[row], self._now
            if chosen is None and now is not None:
                keys.append((now.seeds[row], now.episodes[row] + 1))
            elif chosen is None:
                fresh = np.random.SeedSequence().generate_state(1, np.uint64)
                keys.append((int(fresh[0]) >> 1, 0))  # people keep seeds in int64 arrays
            else:
                keys.append((chosen, 0))
        beginning = isinstance(given.get("start"), str)
        begun = self._restart(rows, keys, contexts, beginning)
        self._torn[rows] = False
        self._seed_np_random(seeds)
        none = np.zeros(self.num_envs, bool)
        infos = self._infos(torch.zeros(self.num_envs, **self._numbers), none)
        return self.observe(), self._output(infos | begun)

    @one_thread
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Advance every environment by one action (``frame_skip`` frames).

        Args:
            actions: (num_envs, ...), integers for discrete spaces; array, list or tensor.

        Raises:
            ValueError: when the actions do not lie in the action space.
            gymnasium.error.ResetNeeded: before the first reset, after a step that an exception
                interrupted, and, with autoreset disabled, when an environment has ended and was
                not reset.
            gymnasium.error.ClosedEnvironmentError: after ``close``.
        """
        now = self._whole("step")
        checked = self.world.codec.check(actions, self.num_envs)
        waiting = now.ended.copy()
        if self.autoreset_mode == AutoresetMode.DISABLED and waiting.any():
            raise gymnasium.error.ResetNeeded(
                f"environment {int(np.flatnonzero(waiting)[0])} has ended; reset it, for example "
                'with reset(options={"reset_mask": ended})'
            )
        reset_now = (
            waiting if self.autoreset_mode == AutoresetMode.NEXT_STEP else np.zeros_like(waiting)
        )
        self._torn[:] = True  # until all of the step is done: parts of it change in turn
        rewards, terminated, hazard = self._advance(checked, reset_now)
        now.frames += self.frame_skip
        begun: dict[str, Any] = {}
        truncated = np.zeros_like(terminated)
        if self.max_episode_steps is not None:
            truncated = now.frames >= self.max_episode_steps * self.frame_skip
        if reset_now.any():
            rewards = rewards.masked_fill(self._tensor(reset_now), 0.0)
            terminated, truncated = terminated & ~reset_now, truncated & ~reset_now
            begun = self._next_episodes(np.flatnonzero(reset_now))
        infos = self._infos(hazard, ~reset_now)
        if "ood" in infos:
            truncated |= (infos["ood"] > self._ood_limit).cpu().numpy() & ~reset_now
        now.ended = terminated | truncated
        if self.autoreset_mode == AutoresetMode.SAME_STEP and now.ended.any():
            infos = self._finish(infos)
            begun = self._next_episodes(np.flatnonzero(now.ended))
        infos |= begun
        stepped = self._step_output(self.observe(), rewards, terminated, truncated, infos)
        self._torn[:] = False
        return stepped

    @one_thread
    def restore_state(self, state: EnvState, rows: Sequence[int] | None = None) -> Any:
        """See ``Moment.restore_state``; ``state`` may have been damaged in a file."""
        check_state(state, self.model, self.speculative_frames, self.world.codec.width)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and state.ended.any():
            raise ValueError(
                f"environment {int(np.flatnonzero(state.ended)[0])} of the state has ended and "
                "waits for a reset, which no environment does with autoreset_mode SameStep: reset "
                "it before it is saved, or take another mode"
            )
        return super().restore_state(state, rows)

    def _infos(self, hazard: Tensor, stepped: np.ndarray) -> dict[str, Any]:
        """What ``info`` says at any time; ``stepped`` tells who took a step."""
        bits = np.full(self.num_envs, _BITS[self.model.precision])
        infos: dict[str, Any] = {"hazard": hazard, "_hazard": self._told(stepped)}
        infos |= {"precision": self._told(bits), "_precision": self._told(np.ones_like(stepped))}
        now = self._begun("step")
        if self._ood_scale is not None:
            error = self.model.reencoding_error(now.shown, self.frames()) / self._ood_scale
            infos |= {"ood": error, "_ood": self._told(stepped)}
        if self.speculative_frames > 1:
            counts = {name: self._told(part) for name, part in now.world.report().items()}
            infos |= {"speculation": counts, "_speculation": self._told(stepped)}
        if self.context_observations:
            infos |= self._context([], [])
        return infos

    def _advance(self, actions: Tensor, skip: np.ndarray) -> tuple[Tensor, np.ndarray, Tensor]:
        """Step the model ``frame_skip`` frames; rows in ``skip`` do not count."""
        now = self._begun("step")
        encoded = self.world.codec.encode(actions)
        how = self.sampling, self.drafting
        if self.frame_skip == 1 and not skip.any():  # most steps, in few operations
            made = advance(self.model, now.world, encoded, 1, None, *how)
            now.shown, now.memory, self._decoded = made.latents, made.memory, None
            # Copies: what is handed out is no part of the state.
            return made.reward.clone(), made.terminated.cpu().numpy().copy(), made.hazard.clone()
        begun = ~skip
        running = torch.from_numpy(begun).to(self.model.device)
        rewards = hazard = torch.zeros(self.num_envs, **self._numbers)
        terminated = torch.zeros_like(running)
        shown, memory = now.shown, now.memory
        for frame in range(0 if skip.all() else self.frame_skip):
            # Frames behind a drawn end are drawn too, and count for the hazard alone: the
            # probability that the step ends the episode at one of its frames. Without them it
            # would be too low just where an end was drawn, and not be the mean of the ends.
            certain = self.frame_skip - frame
            made = advance(self.model, now.world, encoded, certain, begun, *how)
            rewards = rewards + made.reward * running
            hazard = hazard + (1 - hazard) * made.hazard
            shown = torch.where(running[:, None, None, None], made.latents, shown)
            memory = torch.where(running[:, None], made.memory, memory)
            terminated = terminated | (running & made.terminated)
            running = running & ~made.terminated
        now.shown, now.memory, self._decoded = shown, memory, None
        return rewards, terminated.cpu().numpy(), hazard.masked_fill(self._tensor(skip), 0.0)

    def _finish(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Add ``final_obs`` and ``final_info`` of the environments that have just ended."""
        ended = self._begun("step").ended
        mask, final = self._told(ended), self.observe()
        if self.output == "torch":
            infos = {**infos, "final_obs": final}
        else:
            rows = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(ended):
                rows[row] = final[row]
            infos = {**infos, "final_obs": rows}
        infos["_final_obs"] = mask
        names = [name for name in ("hazard", "precision", "ood", "speculation") if name in infos]
        infos["final_info"] = {name: infos[name] for name in names} | {
            f"_{name}": mask for name in names
        }
        infos["_final_info"] = mask
        return infos

    def _next_episodes(self, rows: np.ndarray) -> dict[str, Any]:
        now, listed = self._begun("step"), [int(r) for r in rows]
        keys = [(now.seeds[row], now.episodes[row] + 1) for row in listed]
        return self._restart(listed, keys, [None] * len(listed))

    def _restart(
        self,
        rows: list[int],
        keys: list[tuple[int, int]],
        contexts: list[Context | None],
        beginning: bool = False,
    ) -> dict[str, Any]:
        """Begin episodes with (seed, episode) ``keys``; returns what ``info`` says of that."""
        starts = [s for s in self.starts if s.beginning] if beginning else self.starts
        chosen = [
            context or starts[mix(*key, START_SALT) % len(starts)]
            for context, key in zip(contexts, keys, strict=True)
        ]
        state = self.model.start(chosen, keys, self.speculative_frames, self.sampling)
        if self._now is not None:
            # A slot that was seeded anew begins like a new one.
            goes_on = [row if key[1] else None for row, key in zip(rows, keys, strict=True)]
            state.count_on(self._now.world, goes_on)
        begun = EnvState(
            state,
            torch.stack([c.latents[-1].to(self.model.device, torch.float32) for c in chosen]),
            state.memory,
            np.zeros(len(rows), np.int64),
            np.zeros(len(rows), bool),
            [seed for seed, _ in keys],
            [episode for _, episode in keys],
        )
        if self._now is None:
            self._now = begun
        else:
            self._torn[rows] = True  # whoever asked for it says when it is done
            self._now.put(rows, begun)
        self._decoded = None
        return self._context(rows, chosen) if self.context_observations else {}

    def _context(self, rows: list[int], contexts: Sequence[Context]) -> dict[str, Any]:
        """``info["context"]``: of ``rows``, which have begun with ``contexts``."""
        space, count = self.single_observation_space, self.context_observations
        zeros = np.zeros((self.num_envs, count, *(space.shape or ())), space.dtype)
        context, mask = self._tensor(zeros), np.zeros(self.num_envs, bool)
        if rows:
            mask[rows] = True
            context[rows] = observe_before(
                self.world, self.obs_type, contexts, count, self.frame_skip
            )
        return {"context": context, "_context": self._told(mask)}
