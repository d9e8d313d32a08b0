"""The learned world as a batched Gymnasium environment: all the env logic there is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from nfd_env.inference.noise import mix
from nfd_env.inference.speculation import SpeculativeState, Speculator, check_frames
from nfd_env.inference.world_model import Context, WorldState
from nfd_env.models.cache import may_look
from nfd_env.models.captured import CapturedCall
from nfd_env.worlds.format import World, load_starts, load_world

OBSERVATION_TYPES = ("rgb", "latent", "features")
_START = 0x5354  # separates the choice of a start from the noise that follows it
_ENCODED_AT_A_TIME = 64  # frames of a context
_OOD_REFERENCE = 64  # recorded frames that the out-of-distribution signal is relative to


@dataclass
class EnvState:
    """A saved moment of a vector env, see ``NFDVectorEnv.save_state``.

    Attributes:
        world: what the next frames depend on.
        shown: (B, C, h, w), latents of the frames that are observed. Where an episode has ended
            within a ``frame_skip``, the world may have gone on; this and ``memory`` have not.
        memory: (B, width), the heads' recurrent state after these frames.
        steps: int64 (B,), of the running episodes.
        ended: bool (B,), episodes that have ended and wait for a reset.
        seeds: of each environment.
        episodes: number of the episode of its seed that each is in.
    """

    world: WorldState
    shown: Tensor
    memory: Tensor
    steps: np.ndarray
    ended: np.ndarray
    seeds: list[int]
    episodes: list[int]

    def take(self, rows: Sequence[int]) -> EnvState:
        """An independent copy of some environments, in this order, repeated where repeated."""
        listed = [int(r) for r in rows]
        return EnvState(
            self.world.take(listed),
            self.shown[torch.as_tensor(listed, device=self.shown.device)],
            self.memory[torch.as_tensor(listed, device=self.memory.device)],
            self.steps[listed],
            self.ended[listed],
            [self.seeds[r] for r in listed],
            [self.episodes[r] for r in listed],
        )


class NFDVectorEnv(VectorEnv):
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
    Truncation: after ``max_episode_steps`` steps.

    ## Information
    ``hazard``: the probability with which the step could have terminated, float (num_envs,).
    ``ood``, with ``ood=True``: how far the frame is out of the distribution of real frames, float
    (num_envs,); see ``watch_ood``.
    ``speculation``, with ``speculative_frames`` > 1: a dict of int64 (num_envs,) arrays that count
    the frames of each slot since its seed was last set: ``drafted`` ahead of their step,
    ``accepted`` (handed out without a transformer pass) and ``dropped``; the rest still waits.
    ``context``, with ``context_observations`` = n > 0, where an episode begins: the observations
    before its first, (num_envs, n, *observation shape), oldest first, one step apart.
    With ``AutoresetMode.SAME_STEP`` also ``final_obs`` and ``final_info``.

    ## Arguments
    world: a world folder or the name of a shipped world.
    num_envs: copies of the world.
    device: "auto", "cpu", "cuda" or "cuda:N".
    sampling_steps: denoising steps a frame; None for the world's default.
    frame_skip: frames an action is repeated for.
    speculative_frames: n >= 1, frames that one pass draws jointly on the assumption that the action
        is kept; 1 for no speculation. The drafts of an environment whose action changes are
        dropped. Within a ``frame_skip`` the assumption is always right, so that n = ``frame_skip``
        draws each step's frames jointly. A jointly drawn frame sees those before it as they were
        being drawn, not as they came out.
    draft_cost: with ``speculative_frames`` > 1, when to stop drafting: the cost of a pass with
        drafts relative to one without. Drafts are made while that is less than what they are
        expected to save at the current rate of kept actions; 1 or less for always. None: measured.
    obs_type: "rgb", "latent" or "features".
    output: "numpy", or "torch" for tensors on the model's device.
    autoreset_mode: one of Gymnasium's three.
    max_episode_steps: steps after which an episode is truncated; None for the world's default.
    render_mode: None or "rgb_array".
    precision: "fp32", "bf16", or "auto" for bf16 where the machine is much faster in it.
    history_level: noise level in [0, 1) at which past frames are remembered; None for the world's
        default.
    temperature: > 0, scale of the noise that frames are drawn from; None for the world's default.
        See ``SamplingConfig`` for what more of either does.
    ood: report ``info["ood"]``, at the cost of decoding and encoding each frame once.
    context_observations: n of ``info["context"]``, for policies that look back; 0 for none. Where
        the recorded moment does not reach so far back, its first observation is repeated.
    dynamics: "student" or "teacher" in a distilled world that comes with both, the teacher with
        its own number of sampling steps; None for the world's default.
    starts: recorded moments that episodes start from: a sequence of ``Context``, or a file of
        ``nfd_env.worlds.format.save_starts``; None for those that come with the world. With
        thousands of them and a small ``max_episode_steps``, what is generated stays close to what
        was recorded. They are kept as they are given, and go to the device when they are used.

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
        draft_cost: float | None = None,
        dynamics: str | None = None,
        starts: Sequence[Context] | str | PathLike[str] | None = None,
    ) -> None:
        """See the class.

        Raises:
            ValueError: on an argument out of range, or starts of another world.
            CheckpointError: when the world, or a file of starts, cannot be loaded.
            DeviceError: when the device is not there.
        """
        super().__init__()
        _check_choice("obs_type", obs_type, OBSERVATION_TYPES)
        _check_choice("output", output, ("numpy", "torch"))
        _check_choice("render_mode", render_mode, (None, "rgb_array"))
        for name, value in (("num_envs", num_envs), ("frame_skip", frame_skip)):
            _check_at_least_one(name, value)
        if not isinstance(context_observations, int | np.integer) or context_observations < 0:
            raise ValueError(
                "context_observations must be a whole number of at least 0, "
                f"got {context_observations!r}"
            )
        if max_episode_steps is not None:
            _check_at_least_one("max_episode_steps", max_episode_steps)
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            raise ValueError(
                f"autoreset_mode must be one of {[m.value for m in AutoresetMode]}, "
                f"got {autoreset_mode!r}"
            ) from None
        self.world: World = load_world(world, device, precision, dynamics)
        self.model = self.world.model
        self.starts = self._check_starts(starts)
        if sampling_steps is not None:
            _check_at_least_one("sampling_steps", sampling_steps)
        changed = {
            name: value
            for name, value in (
                ("steps", sampling_steps),
                ("history_level", history_level),
                ("temperature", temperature),
            )
            if value is not None
        }
        # A model of its own, of shared networks: envs may be stepped by threads beside each other.
        self.model = self.model.with_sampling(replace(self.model.sampling, **changed))
        check_frames(speculative_frames, self.model.dynamics.config.window)
        if draft_cost is not None and not draft_cost > 0:
            raise ValueError(f"draft_cost must be above 0, or None to measure it, got {draft_cost}")
        self.num_envs, self.frame_skip = num_envs, frame_skip
        self.context_observations = context_observations
        self.speculative_frames = speculative_frames
        self._speculator: Speculator | None = None
        if speculative_frames > 1:
            self._speculator = Speculator(self.model, speculative_frames, frame_skip, draft_cost)
        self.obs_type, self.output, self.render_mode = obs_type, output, render_mode
        self.max_episode_steps = max_episode_steps or self.world.spec.max_episode_steps or None
        fps = float(self.world.spec.fps) / frame_skip
        self.metadata = {
            **self.metadata,
            # An int where it can be: gymnasium.utils.play insists on one.
            "render_fps": int(fps) if fps.is_integer() else fps,
            "autoreset_mode": self.autoreset_mode,
        }
        self.single_observation_space = observation_space(self.world, obs_type)
        self.single_action_space = copy.deepcopy(self.world.action_space)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._state: WorldState | None = None
        self._shown: Tensor | None = None
        self._memory = self.model.heads.initial_state(num_envs)
        self._decoded: Tensor | None = None
        self._decoder = CapturedCall()
        self._steps = np.zeros(num_envs, np.int64)
        self._ended = np.zeros(num_envs, bool)
        self._seeds = [-1] * num_envs
        self._episodes = [0] * num_envs
        self._ood_scale: float | None = None
        self._ood_limit = np.inf
        if ood:
            self.watch_ood()

    def watch_ood(self, limit: float = np.inf) -> None:
        """Report ``info["ood"]`` from now on, and truncate episodes in which it exceeds ``limit``.

        It is the re-encoding error of the frame that a step leads to, relative to its mean over
        the world's recorded starts (see ``WorldModel.reencoding_error``): about 1 for a real frame.

        Raises:
            ValueError: when ``limit`` is not above 0.
        """
        if not limit > 0:
            raise ValueError(f"the out-of-distribution limit must be above 0, got {limit!r}")
        self._ood_limit = limit
        if self._ood_scale is None:
            real = torch.cat([start.latents for start in self.world.starts])
            picked = real[:: -(-len(real) // _OOD_REFERENCE)].to(self.model.device)
            errors = self.model.reencoding_error(picked, self.model.decode(picked))
            self._ood_scale = float(errors.mean())

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each environment, -1 before the first reset."""
        return tuple(self._seeds)

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
            ValueError: on a seed, mask or context that cannot be used.
        """
        seeds = self._check_seeds(seed)
        options = options or {}
        unknown = set(options) - {"context", "start", "reset_mask"}
        if unknown:
            raise ValueError(
                f"unknown reset option {sorted(unknown)[0]!r}; known: context, start, reset_mask"
            )
        mask = self._check_mask(options.get("reset_mask"))
        rows = [int(r) for r in np.flatnonzero(mask)]
        contexts = self._contexts(options, rows)
        for row in rows:
            given = seeds[row]
            if given is not None:
                self._seeds[row], self._episodes[row] = given, 0
            elif self._seeds[row] < 0:
                self._seeds[row] = int(np.random.SeedSequence().generate_state(1)[0])
            else:
                self._episodes[row] += 1
        infos = self._restart(rows, contexts, options.get("start") == "beginning")
        if self.output == "numpy":
            infos = {k: _to_numpy(v) for k, v in infos.items()}
        return self.observe(), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Advance every environment by one action (``frame_skip`` frames).

        Args:
            actions: (num_envs, ...), integers for discrete spaces; array, list or tensor.

        Raises:
            ValueError: when the actions do not lie in the action space.
            gymnasium.error.ResetNeeded: before the first reset, and, with autoreset disabled, when
                an environment has ended and was not reset.
        """
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        checked = self.world.codec.check(actions, self.num_envs)
        waiting = self._ended.copy()
        if self.autoreset_mode == AutoresetMode.DISABLED and waiting.any():
            raise gymnasium.error.ResetNeeded(
                f"environment {int(np.flatnonzero(waiting)[0])} has ended; reset it, for example "
                'with reset(options={"reset_mask": ended})'
            )
        reset_now = (
            waiting if self.autoreset_mode == AutoresetMode.NEXT_STEP else np.zeros_like(waiting)
        )
        rewards, terminated, hazard = self._advance(checked, reset_now)
        self._steps += 1
        begun: dict[str, Any] = {}
        truncated = np.zeros_like(terminated)
        if self.max_episode_steps is not None:
            truncated = self._steps >= self.max_episode_steps
        if reset_now.any():
            rewards = rewards.masked_fill(self._tensor(reset_now), 0.0)
            terminated, truncated = terminated & ~reset_now, truncated & ~reset_now
            begun = self._next_episodes(np.flatnonzero(reset_now))
        infos: dict[str, Any] = {"hazard": hazard, "_hazard": self._tensor(~reset_now)}
        if self._ood_scale is not None:
            assert self._shown is not None
            error = self.model.reencoding_error(self._shown, self.frames()) / self._ood_scale
            infos |= {"ood": error, "_ood": infos["_hazard"].clone()}
            truncated |= (error > self._ood_limit).cpu().numpy() & ~reset_now
        if isinstance(self._state, SpeculativeState):
            infos |= {"speculation": self._state.report(), "_speculation": infos["_hazard"].clone()}
        self._ended = terminated | truncated
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self._ended.any():
            infos = self._finish(infos)
            begun = self._next_episodes(np.flatnonzero(self._ended))
            self._ended = np.zeros_like(self._ended)
        infos |= begun
        observation = self.observe()
        if self.output == "torch":
            return observation, rewards, self._tensor(terminated), self._tensor(truncated), infos
        infos = {k: _to_numpy(v) for k, v in infos.items()}
        return observation, rewards.double().cpu().numpy(), terminated, truncated, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The current frames as uint8 (H, W, 3) arrays, with ``render_mode="rgb_array"``."""
        if self.render_mode is None:
            gymnasium.logger.warn('render() does nothing without render_mode="rgb_array"')
            return None
        return tuple(self.frames().cpu().numpy())

    def frames(self, rows: Sequence[int] | None = None) -> Tensor:
        """The current frames, uint8 (num_envs, H, W, 3), whatever ``obs_type`` is.

        Args:
            rows: of these environments only, which costs less.
        """
        if self._shown is None:
            raise gymnasium.error.ResetNeeded("call reset() before render()")
        if self._decoded is None and rows is not None:
            return self.model.decode(self._shown[list(rows)])
        if self._decoded is None and self.model.captures:
            (self._decoded,) = self._decoder(lambda z: [self.model.decode(z)], self._shown)
        elif self._decoded is None:
            self._decoded = self.model.decode(self._shown)
        return self._decoded.clone() if rows is None else self._decoded[list(rows)]

    def take(self, rows: Sequence[int]) -> NFDVectorEnv:
        """An env of some of these environments, in this order, that goes on from where they are."""
        state = self.save_state(rows)
        taken = copy.copy(self)
        taken.num_envs = len(state.seeds)
        taken._state, taken._decoder = None, CapturedCall()
        taken.observation_space = batch_space(self.single_observation_space, taken.num_envs)
        taken.action_space = batch_space(self.single_action_space, taken.num_envs)
        taken.restore_state(state)
        return taken

    def save_state(self, rows: Sequence[int] | None = None) -> EnvState:
        """An independent copy of everything that the future depends on.

        Args:
            rows: of these environments only, in this order; one may be named repeatedly.
        """
        if self._state is None or self._shown is None:
            raise gymnasium.error.ResetNeeded("call reset() before save_state()")
        here = EnvState(
            self._state,
            self._shown,
            self._memory,
            self._steps,
            self._ended,
            self._seeds,
            self._episodes,
        )
        return here.take(range(self.num_envs) if rows is None else rows)

    def restore_state(self, state: EnvState, rows: Sequence[int] | None = None) -> Any:
        """Go back to a saved state, which may be restored again; returns its observation.

        Args:
            state: as ``save_state`` made it, possibly in another env of the same world.
            rows: the environments to put it into, one for each in ``state``; the others stay as
                they are. All of them by default.

        Raises:
            ValueError: when the state has another number of environments.
            gymnasium.error.ResetNeeded: with ``rows``, before the first reset.
        """
        if rows is not None:
            self._put_rows([int(r) for r in rows], state)
            return self.observe()
        if state.world.batch != self.num_envs:
            raise ValueError(
                f"the state has {state.world.batch} environments, this env has {self.num_envs}"
            )
        self._check_fits(state)
        if self._state is None or self._speculator is not None:
            self._state = state.world.fork()
        else:  # keeps what was captured on its memory
            self._state.put(range(self.num_envs), state.world)
        self._shown, self._decoded = state.shown.clone(), None
        self._memory = state.memory.clone()
        self._steps, self._ended = state.steps.copy(), state.ended.copy()
        self._seeds, self._episodes = list(state.seeds), list(state.episodes)
        return self.observe()

    def _put_rows(self, rows: list[int], state: EnvState) -> None:
        if self._state is None or self._shown is None:
            raise gymnasium.error.ResetNeeded("call reset() before restore_state() of some rows")
        if len(rows) != state.world.batch or len(set(rows)) != len(rows):
            raise ValueError(f"a state of {state.world.batch} environments cannot go into {rows}")
        self._check_fits(state)
        self._state.put(rows, state.world)
        index = torch.tensor(rows, device=self._shown.device)
        self._shown, self._decoded = self._shown.index_copy(0, index, state.shown), None
        self._memory = self._memory.index_copy(0, index, state.memory)
        self._steps[rows], self._ended[rows] = state.steps, state.ended
        for row, seed, episode in zip(rows, state.seeds, state.episodes, strict=True):
            self._seeds[row], self._episodes[row] = seed, episode

    def _check_fits(self, state: EnvState) -> None:
        if state.world.speculative_frames != self.speculative_frames:
            raise ValueError(
                "the state was saved with speculative_frames="
                f"{state.world.speculative_frames}, this env has speculative_frames="
                f"{self.speculative_frames}; use the same for both"
            )

    def _advance(self, actions: Tensor, skip: np.ndarray) -> tuple[Tensor, np.ndarray, Tensor]:
        """Step the model ``frame_skip`` frames; rows in ``skip`` do not count."""
        assert self._state is not None and self._shown is not None
        encoded = self.world.codec.encode(actions)
        running = torch.from_numpy(~skip).to(self.model.device)
        rewards = torch.zeros(self.num_envs, device=self.model.device)
        hazard = torch.zeros_like(rewards)
        terminated = torch.zeros_like(running)
        shown, memory = self._shown, self._memory
        for frame in range(0 if skip.all() else self.frame_skip):
            # A GPU is not waited for; at worst it draws frames that do not count.
            if (may_look(running) or self._speculator) and not bool(running.any()):
                break
            if self._speculator is None:
                transition = self.model.step(self._state, encoded)
            else:
                assert isinstance(self._state, SpeculativeState)
                transition = self._speculator.step(
                    self._state, encoded, self.frame_skip - frame, running.cpu().numpy()
                )
            rewards = rewards + transition.reward * running
            # The probability that the step ends the episode at one of its frames.
            hazard = torch.where(running, 1 - (1 - hazard) * (1 - transition.hazard), hazard)
            shown = torch.where(running[:, None, None, None], transition.latents, shown)
            memory = torch.where(running[:, None], transition.memory, memory)
            terminated = terminated | (running & transition.terminated)
            running = running & ~transition.terminated
        self._shown, self._memory, self._decoded = shown, memory, None
        return rewards, terminated.cpu().numpy(), hazard

    def _finish(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Add ``final_obs`` and ``final_info`` of the environments that have just ended."""
        mask = self._tensor(self._ended)
        final = self.observe()
        if self.output == "torch":
            infos = {**infos, "final_obs": final}
        else:
            rows = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(self._ended):
                rows[row] = final[row]
            infos = {**infos, "final_obs": rows}
        infos["_final_obs"] = mask
        names = [name for name in ("hazard", "ood") if name in infos]
        infos["final_info"] = {name: infos[name] for name in names} | {
            f"_{name}": mask for name in names
        }
        infos["_final_info"] = mask
        return infos

    def _next_episodes(self, rows: np.ndarray) -> dict[str, Any]:
        listed = [int(r) for r in rows]
        for row in listed:
            self._episodes[row] += 1
        return self._restart(listed, [None] * len(listed))

    def _restart(
        self, rows: list[int], contexts: list[Context | None], beginning: bool = False
    ) -> dict[str, Any]:
        """Begin episodes; returns what ``info`` says of that."""
        keys = [(self._seeds[row], self._episodes[row]) for row in rows]
        starts = [s for s in self.starts if s.beginning] if beginning else self.starts
        chosen = [
            context or starts[mix(*key, _START) % len(starts)]
            for context, key in zip(contexts, keys, strict=True)
        ]
        start = self.model.start if self._speculator is None else self._speculator.start
        state = start(chosen, keys)
        if isinstance(state, SpeculativeState) and isinstance(self._state, SpeculativeState):
            # A slot that was seeded anew begins like a new one.
            state.succeed(self._state, [row if self._episodes[row] else None for row in rows])
        shown = torch.stack([c.latents[-1] for c in chosen]).to(self.model.device, torch.float32)
        index = torch.tensor(rows, device=self.model.device)
        # With drafts there is one for each frame of a pass; a start has one frame.
        memory = state.memory if state.memory.ndim == 2 else state.memory[:, 0]
        self._memory = self._memory.index_copy(0, index, memory)
        if self._state is None:
            self._state, self._shown = state, shown
        else:
            assert self._shown is not None
            self._state.put(rows, state)
            self._shown = self._shown.index_copy(0, index, shown)
        self._decoded = None
        self._steps[rows], self._ended[rows] = 0, False
        return self._context_info(rows, chosen) if self.context_observations else {}

    def _context_info(self, rows: list[int], contexts: Sequence[Context]) -> dict[str, Any]:
        """``info["context"]`` of ``rows``, which have begun with ``contexts``."""
        count, skip = self.context_observations, self.frame_skip
        places = [-1 - skip * back for back in range(count, 0, -1)]
        features = self.obs_type == "features"
        seen = torch.stack(
            [
                (self.model.features_along(c) if features else c.latents)[
                    [max(place, -len(c.latents)) for place in places]
                ]
                for c in contexts
            ]
        ).to(self.model.device, torch.float32)
        if self.obs_type == "rgb":
            seen = self.model.decode(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        context = seen.new_zeros(self.num_envs, *seen.shape[1:])
        context[rows] = seen
        mask = np.zeros(self.num_envs, bool)
        mask[rows] = True
        return {"context": context, "_context": self._tensor(mask)}

    def observe(self, obs_type: str | None = None) -> Any:
        """The current observations, of another type if ``obs_type`` is given; see the class.

        Raises:
            ValueError: when there is no such type.
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._state is None or self._shown is None:
            raise gymnasium.error.ResetNeeded("call reset() before observe()")
        _check_choice("obs_type", obs_type or self.obs_type, OBSERVATION_TYPES)
        match obs_type or self.obs_type:
            case "rgb":
                observation = self.frames()
            case "latent":
                observation = self._shown.clone()
            case _:
                # The action of a step leads into each of its frames.
                action = self._state.action[:, 0]
                observation = self.model.features(self._shown, action, self._memory).clone()
        return observation if self.output == "torch" else observation.cpu().numpy()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.model.device)

    def _check_starts(
        self, starts: Sequence[Context] | str | PathLike[str] | None
    ) -> Sequence[Context]:
        if starts is None:
            return self.world.starts
        shape, width = self.model.dynamics.config.latent_shape, self.world.codec.width
        if isinstance(starts, str | PathLike):
            return load_starts(starts, shape, width)
        if not len(starts):
            raise ValueError("starts must hold at least one recorded moment, or be None")
        for number, start in enumerate(starts):
            if not isinstance(start, Context):
                raise ValueError(f"starts must be a file or Contexts, got {start!r}")
            mine = tuple(start.latents.shape[1:]), tuple(start.actions.shape)
            if not len(start.latents) or mine != (shape, (len(start.latents), width)):
                raise ValueError(
                    f"start {number} does not fit this world: it needs latents (K, "
                    f"{', '.join(map(str, shape))}) and actions (K, {width}), K >= 1, got "
                    f"{tuple(start.latents.shape)} and {tuple(start.actions.shape)}"
                )
        return starts

    def _check_seeds(self, seed: Any) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            seeds: list[int | None] = [int(seed) + i for i in range(self.num_envs)]
        elif isinstance(seed, Sequence | np.ndarray) and all(
            s is None or isinstance(s, int | np.integer) for s in seed
        ):
            seeds = [None if s is None else int(s) for s in seed]
        else:
            raise ValueError(f"a seed must be a whole number or one for each slot, got {seed!r}")
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds were given for {self.num_envs} environments")
        if any(s is not None and s < 0 for s in seeds):
            raise ValueError(f"seeds must not be negative, got {seed}")
        return seeds

    def _check_mask(self, mask: Any) -> np.ndarray:
        if mask is None:
            return np.ones(self.num_envs, bool)
        mask = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(
                f"reset_mask must be a bool array of shape ({self.num_envs},), "
                f"got {mask.dtype} {mask.shape}"
            )
        if not mask.any():
            raise ValueError("reset_mask selects no environment")
        if self._state is None and not mask.all():
            raise gymnasium.error.ResetNeeded("the first reset() must reset every environment")
        return mask

    def _contexts(self, options: Mapping[str, Any], rows: list[int]) -> list[Context | None]:
        given = options.get("context")
        start = options.get("start")
        if given is not None and start is not None:
            raise ValueError("give either the reset option context or start, not both")
        if isinstance(start, str) and start == "beginning":
            if not any(s.beginning for s in self.starts):
                raise ValueError("none of the starts is the beginning of an episode")
            return [None] * len(rows)
        if start is not None:
            known = isinstance(start, int | np.integer) and 0 <= start < len(self.starts)
            if not known:
                raise ValueError(
                    f'start must be from 0 to {len(self.starts) - 1} or "beginning", got {start!r}'
                )
            return [self.starts[int(start)]] * len(rows)
        if given is None:
            return [None] * len(rows)
        if not isinstance(given, Mapping | Sequence):
            raise ValueError(f"context must be a mapping or a list of them, got {given!r}")
        entries = [given] * self.num_envs if isinstance(given, Mapping) else list(given)
        if len(entries) != self.num_envs:
            raise ValueError(
                f"context needs one entry per environment, got {len(entries)} for {self.num_envs}"
            )
        return [None if entries[r] is None else self._encode_context(entries[r]) for r in rows]

    def _encode_context(self, entry: Mapping[str, Any]) -> Context:
        """Latents and encoded actions of recorded frames.

        Raises:
            ValueError: on frames or actions of the wrong shape, type or number.
        """
        if not isinstance(entry, Mapping) or "frames" not in entry:
            raise ValueError('a context is {"frames": (T, H, W, 3), "actions": (T-1, ...)}')
        frames = np.asarray(entry["frames"])
        height, width = self.world.spec.frame_size
        if frames.ndim != 4 or frames.shape[1:] != (height, width, 3) or not len(frames):
            raise ValueError(
                f"context frames must have shape (T, {height}, {width}, 3) with T >= 1, "
                f"got {frames.shape}"
            )
        if frames.dtype != np.uint8:
            raise ValueError(f"context frames must be uint8, got {frames.dtype}")
        given = entry.get("actions")
        actions = np.atleast_1d(() if given is None else given)
        codec = self.world.codec
        if len(actions) != len(frames) - 1:
            raise ValueError(
                f"{len(frames)} context frames need {len(frames) - 1} actions, one between each "
                f"two, got {len(actions)}"
            )
        into = torch.zeros(len(frames), codec.width)
        if len(actions):
            encoded = codec.encode(codec.check(actions, len(actions)))
            into[-len(encoded) :] = encoded
        parts = torch.from_numpy(frames.copy()).split(_ENCODED_AT_A_TIME)
        return Context(torch.cat([self.model.encode(part) for part in parts]), into)


def observation_space(world: World, obs_type: str) -> spaces.Box:
    """What one environment of a world observes; see ``NFDVectorEnv``."""
    if obs_type == "rgb":
        return spaces.Box(0, 255, (*world.spec.frame_size, 3), np.uint8)
    model = world.model
    latent = obs_type == "latent"
    shape = model.dynamics.config.latent_shape if latent else (model.feature_size,)
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _check_at_least_one(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _to_numpy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu().numpy().copy()
    if isinstance(value, dict):
        return {k: _to_numpy(v) for k, v in value.items()}
    return value
