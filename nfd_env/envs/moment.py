"""The present moment of a batch of learned worlds: to look at, to keep, to go back to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Self

import gymnasium
import numpy as np
from torch import Tensor

from nfd_env.envs import checks, guests
from nfd_env.envs.base import WorldVectorEnv
from nfd_env.envs.observing import OBSERVATION_TYPES, observe
from nfd_env.envs.state import EnvState
from nfd_env.inference.cuda_graph import CapturedCall
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.inference.world_model import WorldModel
from nfd_env.sources.spec import short
from nfd_env.worlds.load import World, load_again


class Moment(WorldVectorEnv):
    """The part of ``NFDVectorEnv`` that does not move on."""

    model: WorldModel
    starts: Sequence[Any]
    speculative_frames: int
    sampling: SamplingConfig
    _ood_scale: float | None
    _changed: dict[str, Any]
    _now: EnvState | None
    _torn: np.ndarray  # bool (num_envs,), those whose last change was interrupted
    _decoded: Tensor | None
    _decoder: CapturedCall

    _FIXED = {
        **WorldVectorEnv._FIXED,
        **dict.fromkeys(("speculative_frames", "context_observations"), "make another env"),
        **{
            name: f"call set_sampling({name}=...)"
            for name in ("sampling_steps", "history_level", "temperature", "dynamics")
        },
        "ood": "call watch_ood()",
    }

    # What __getstate__ leaves out: it is loaded anew, or is part of the saved state.
    _NOT_COPIED = ("world", "model", "_decoder", "_decoded", "_now", "_torn")

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The current frames as uint8 (H, W, 3) arrays, with ``render_mode="rgb_array"``."""
        self._begun("render")
        if self.render_mode is None:
            gymnasium.logger.warn('render() does nothing without render_mode="rgb_array"')
            return None
        return tuple(self.frames().cpu().numpy())

    def frames(self, rows: Sequence[int] | None = None) -> Tensor:
        """The current frames, uint8 (num_envs, H, W, 3), whatever ``obs_type`` is.

        Args:
            rows: of these environments only, which costs less.
        """
        shown = self._begun("frames").shown
        listed = None if rows is None else checks.check_rows(rows, self.num_envs)
        if self._decoded is None and listed is not None:
            return self.model.decode(shown[listed])
        if self._decoded is None and self.model.captures:
            (self._decoded,) = self._decoder(lambda z: [self.model.decode(z)], shown)
        elif self._decoded is None:
            self._decoded = self.model.decode(shown)
        return self._decoded.clone() if listed is None else self._decoded[listed]

    def observe(self, obs_type: str | None = None) -> Any:
        """The current observations, of another type if ``obs_type`` is given; see the class.

        Raises:
            ValueError: when there is no such type.
            gymnasium.error.ResetNeeded: before the first reset.
        """
        now = self._begun("observe")
        checks.check_choice("obs_type", obs_type or self.obs_type, OBSERVATION_TYPES)
        # The action of a step leads into each of its frames.
        here = now.shown, now.world.action[:, 0], now.memory
        return self._output(observe(self.world, obs_type or self.obs_type, self.frames, *here))

    def take(self, rows: Sequence[int]) -> Self:
        """An env of some of these environments, in this order, that goes on from where they are.

        It shares the networks, so it costs little; sampling can then be set for it alone.
        """
        state = self.save_state(rows)
        taken = object.__new__(type(self))
        taken.__dict__.update(self.__dict__, num_envs=len(state), _now=None)
        taken._torn = np.zeros(len(state), bool)
        taken._decoder = CapturedCall()
        taken._batch_spaces()
        taken.restore_state(state)
        return taken

    def save_state(self, rows: Sequence[int] | None = None) -> EnvState:
        """An independent copy of everything that the future depends on.

        Args:
            rows: of these environments only, in this order; one may be named repeatedly.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset, or after a step that an exception
                interrupted.
        """
        listed = None if rows is None else checks.check_rows(rows, self.num_envs)
        now = self._whole("save_state", listed)
        return now.take(range(self.num_envs) if listed is None else listed)

    def restore_state(self, state: EnvState, rows: Sequence[int] | None = None) -> Any:
        """Go back to a saved state, which may be restored again; returns its observation.

        Args:
            state: as ``save_state`` made it, possibly in another env of the same world.
            rows: the environments to put it into, one for each in ``state``; the others stay as
                they are. All of them by default.

        Raises:
            ValueError: when the state is of another world, or has another number of environments;
                nothing is changed then.
            gymnasium.error.ResetNeeded: with ``rows``, before the first reset.
        """
        self._need_open()
        if not isinstance(state, EnvState):
            raise ValueError(f"a state is what save_state() returned, got {short(state)}")
        if rows is not None:
            self._begun("restore_state() of some rows")
            listed = checks.check_rows(rows, self.num_envs)
            if len(listed) != len(state) or len(set(listed)) != len(listed):
                raise ValueError(f"a state of {len(state)} environments cannot go into {listed}")
        elif len(state) != self.num_envs:
            raise ValueError(
                f"the state has {len(state)} environments, this env has {self.num_envs}"
            )
        else:
            listed = list(range(self.num_envs))
        self.model.check_fits(state.world, self.speculative_frames)
        if self._now is None:
            self._now = state.take(listed)
        else:  # keeps what was captured on its memory
            self._torn[listed] = True
            self._now.put(listed, state)
        self._torn[listed] = False
        self._decoded = None
        return self.observe()

    def __getstate__(self) -> dict[str, Any]:
        """All but the world, which is loaded again where the copy is made."""
        state = {k: v for k, v in self.__dict__.items() if k not in self._NOT_COPIED}
        if self.starts is self.world.starts:
            state["starts"] = None
        state["saved"] = None if self._now is None else self.save_state()
        return state | {"loaded": self.world.loaded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See ``__getstate__``."""
        state = dict(state)
        saved, loaded, world = state.pop("saved"), state.pop("loaded"), state.pop("world", None)
        guests.settle(loaded[1])
        self.__dict__.update(state)
        self._draw_by(world or load_again(*loaded), self._changed)
        if self.starts is None:
            self.starts = self.world.starts
        self._decoder, self._decoded, self._now = CapturedCall(), None, None
        self._torn = np.zeros(self.num_envs, bool)
        if saved is not None:
            self.restore_state(saved)

    def _draw_by(self, world: World, changed: dict[str, Any]) -> None:
        """Draw frames as ``world`` does, but for what was ``changed``."""
        self.__dict__["sampling"] = replace(world.model.sampling, **changed)
        self.model, self._changed = world.model, changed
        self.__dict__["world"] = world  # which others cannot set

    def __setattr__(self, name: str, value: Any) -> None:
        """See the base class; ``sampling`` may be set as a whole, and copies then have it too."""
        super().__setattr__(name, value)
        if name == "sampling":
            self._changed = asdict(self.sampling)

    @property
    def sampling_steps(self) -> int:
        """Denoising steps a frame."""
        return self.sampling.steps

    @property
    def history_level(self) -> float:
        """Noise level at which past frames are remembered."""
        return self.sampling.history_level

    @property
    def temperature(self) -> float:
        """Scale of the noise that frames are drawn from."""
        return self.sampling.temperature

    @property
    def dynamics(self) -> str:
        """Which dynamics draw, see ``World``."""
        return self.world.dynamics

    @property
    def ood(self) -> bool:
        """Whether ``info["ood"]`` is reported."""
        return self._ood_scale is not None

    def _settable(self, name: str, value: Any) -> Any:
        """See the base class."""
        value = super()._settable(name, value)
        if name == "starts":
            return checks.check_starts(self.world, value)
        kinds = {"sampling": SamplingConfig, "model": WorldModel, "drafting": bool}
        if not isinstance(value, kinds.get(name, object)):
            raise ValueError(f"{name} of an env must be a {kinds[name].__name__}")
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy in the same process has the same world, whatever lies in its folder by now."""
        memo[id(self)] = made = object.__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo) | {"world": self.world})
        return made

    def __copy__(self) -> Self:
        """A copy goes its own way, also a shallow one."""
        return copy.deepcopy(self)

    def close_extras(self, **kwargs: Any) -> None:
        """Free what the episodes hold."""
        self._now = self._decoded = None
        self._decoder = CapturedCall()

    def _begun(self, what: str) -> EnvState:
        """The present moment, which ``what`` needs."""
        self._need_open()
        if self._now is None:
            raise gymnasium.error.ResetNeeded(f"call reset() before {what}()")
        return self._now

    def _whole(self, what: str, rows: Sequence[int] | None = None) -> EnvState:
        """The present moment, of which ``what`` needs ``rows``, or all, as a finished step left."""
        now = self._begun(what)
        if (self._torn if rows is None else self._torn[rows]).any():
            raise gymnasium.error.ResetNeeded(
                "a step was interrupted: call reset() or restore_state()"
            )
        return now
