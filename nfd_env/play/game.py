"""What can be played: the interface that the engine needs, and any Gymnasium env behind it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.wrappers import TimeLimit

from nfd_env.play.keys import Keymap
from nfd_env.sources.frames import frame_rate
from nfd_env.sources.source import SourceConfig, make_source

_AMPLIFIED = 3  # differences that matter are too dark to be seen as they are


@dataclass(frozen=True)
class Sampling:
    """How a player's frames are drawn.

    Attributes:
        steps: denoising steps a frame, at least 1.
        speculation: several frames are drawn jointly while the action is kept.
        teacher: by the many-step dynamics that the world's own were distilled from.
    """

    steps: int
    speculation: bool = False
    teacher: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one action brought about.

    Attributes:
        frame: uint8 (H, W, 3).
        reward: of this step.
        terminated: the episode has ended.
        truncated: the episode was cut off.
        info: plain values, e.g. "hazard"; "acceptance" is the share of speculative frames used.
        guessed: the frame had been generated before the action was known.
        dreamed: by the learned world, not by the game.
        error: why the real game is over for good; "" where it is not.
    """

    frame: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    guessed: bool = False
    dreamed: bool = False
    error: str = ""


class Game(Protocol):
    """What an engine plays: ``Slots`` of a learned world, or any Gymnasium env (``EnvGame``).

    Who derives from it need not say that nothing is generated ahead.

    Attributes:
        name: of the world.
        count: players at a time.
        fps: native frames a second.
        display_aspect: width / height as shown; 0 for square pixels.
        display: "smooth", or "pixelated": enlarged with hard edges, by whole numbers.
        keymap: from keys to actions.
        frame_shape: (H, W, 3).
        default_sampling: None for a game that is not generated.
        steps_of: denoising steps of (student, teacher); None where there is no choice.
        views: what its players may see, the first one first; see ``nfd_env.play.twin``.
        source: the real game; None where nothing is known of one.
    """

    name: str
    count: int
    fps: float
    display_aspect: float
    display: str
    keymap: Keymap
    frame_shape: tuple[int, ...]
    default_sampling: Sampling | None
    steps_of: tuple[int, int] | None
    views: tuple[str, ...]
    source: SourceConfig | None

    def reset(self, slot: int, seed: int | None = None) -> np.ndarray:
        """Start an episode; returns its first frame."""
        ...

    def seed_of(self, slot: int) -> int | None:
        """The seed of a slot's episodes."""
        ...

    def step(self, actions: Mapping[int, Any]) -> dict[int, Outcome]:
        """Advance some slots."""
        ...

    def take_drafts(self, actions: Mapping[int, Any]) -> dict[int, Outcome]:
        """Hand out what was generated ahead."""
        return {}

    def draft(self, guesses: Mapping[int, Sequence[Any]]) -> None:
        """Generate ahead."""

    def has_draft(self, slot: int) -> bool:
        """Whether something was generated ahead."""
        return False

    def cost(self, rows: Mapping[int, int]) -> float:
        """Expected seconds for a batch with so many rows of each slot."""
        return 0.0

    def set_sampling(self, slot: int, sampling: Sampling) -> None:
        """How a slot's frames are drawn from now on."""

    def view(self, slot: int) -> str:
        """What a slot shows: "dream", "real" or "split"."""
        ...

    def set_view(self, slot: int, view: str) -> np.ndarray:
        """Change that; returns the frame from which it goes on."""
        ...

    def beside(self, slot: int) -> np.ndarray | None:
        """The dream's frame in the view "split"."""
        ...

    def close(self) -> None:
        """Let go of what it holds; nobody plays any more."""
        ...


class EnvGame(Game):
    """Any Gymnasium environment with ``render_mode="rgb_array"`` as a game for one player."""

    default_sampling: Sampling | None = None
    steps_of: tuple[int, int] | None = None
    views: tuple[str, ...] = ("real",)

    def __init__(self, env: gymnasium.Env, keymap: Keymap, fps: float | None = None) -> None:
        """Play ``env``.

        Args:
            env: its ``render()`` must return a uint8 (H, W, 3) array.
            keymap: see ``Keymap.from_env``.
            fps: steps a second; None for the environment's own rate.
        """
        self.env, self.keymap, self.count = env, keymap, 1
        self.name = env.spec.id if env.spec else type(env.unwrapped).__name__
        self.fps = float(fps or frame_rate(env))
        self.display_aspect, self.display = 0.0, "smooth"
        self.source: SourceConfig | None = None
        self._seed: int | None = None
        env.reset()
        self.frame_shape: tuple[int, ...] = self._frame().shape

    @classmethod
    def from_file(cls, path: str | PathLike[str], max_episode_steps: int | None = None) -> EnvGame:
        """The real game of a game file, seen exactly as a world of it would be.

        Args:
            path: see ``nfd_env.recipe.game.load_game``.
            max_episode_steps: instead of the file's.

        Raises:
            ConfigError: when the file is not one.
            SourceError: when the game cannot be made.
            KeymapError: when its keys do not fit its actions.
        """
        from nfd_env.recipe.game import load_game

        about = load_game(path)
        env = make_source(about.source, render_mode="rgb_array")
        try:
            env = TimeLimit(env, max_episode_steps or about.max_episode_steps)
            keymap = Keymap.from_source(about.source, env.action_space)
            game = cls(env, keymap)
        except BaseException:
            env.close()
            raise
        game.name, game.source = about.name, about.source
        game.display_aspect = about.source.display_aspect
        game.display = about.export.get("display", game.display)
        return game

    def reset(self, slot: int, seed: int | None = None) -> np.ndarray:
        """See ``Game``."""
        self._seed = self._seed if seed is None else seed
        self.env.reset(seed=seed)
        return self._frame()

    def seed_of(self, slot: int) -> int | None:
        """See ``Game``."""
        return self._seed

    def step(self, actions: Mapping[int, Any]) -> dict[int, Outcome]:
        """See ``Game``."""
        _, reward, terminated, truncated, info = self.env.step(copy.deepcopy(actions[0]))
        plain = {k: v for k, v in info.items() if isinstance(v, int | float)}
        return {0: Outcome(self._frame(), float(reward), bool(terminated), bool(truncated), plain)}

    def view(self, slot: int) -> str:
        """See ``Game``."""
        return "real"

    def set_view(self, slot: int, view: str) -> np.ndarray:
        """There is no other."""
        return self._frame()

    def beside(self, slot: int) -> np.ndarray | None:
        """There is no dream."""
        return None

    def close(self) -> None:
        """See ``Game``."""
        self.env.close()

    def _frame(self) -> np.ndarray:
        frame = self.env.render()
        if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.dtype != np.uint8:
            raise ValueError(
                f'{self.name} must be made with render_mode="rgb_array": its render() gave '
                f"{type(frame).__name__}"
            )
        return np.array(frame, order="C")  # a copy: the environment may draw over its own


def shape_of_both(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Of ``side_by_side``'s picture, for frames of ``shape`` (H, W, 3)."""
    return 2 * shape[0] + 2, 2 * shape[1] + 2, 3


def side_by_side(real: np.ndarray, dream: np.ndarray) -> np.ndarray:
    """One picture of a frame's aspect: the game, the dream, and below them thrice what differs.

    Args:
        real: uint8 (H, W, 3).
        dream: likewise.

    Returns:
        uint8 (2 H + 2, 2 W + 2, 3).
    """
    height, width = real.shape[:2]
    picture = np.full(shape_of_both(real.shape), 24, np.uint8)
    picture[:height, :width], picture[:height, width + 2 :] = real, dream
    left = (width + 2) // 2
    difference = np.abs(real.astype(np.int16) - dream)
    picture[height + 2 :, left : left + width] = np.minimum(_AMPLIFIED * difference, 255)
    return picture
