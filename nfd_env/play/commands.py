"""The commands ``nfd play`` and ``nfd serve``, and what they are told."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from nfd_env.config import ConfigError, check_ranges, config_class
from nfd_env.play import PlayError


@dataclass(frozen=True)
class Chosen:
    """A world to play, and who else may play it.

    Attributes:
        world: world folder or shipped world; default: the first shipped one.
        device: auto, cpu, cuda or cuda:N.
        sampling_steps: denoising steps a frame; default: the world's own.
        speculative_frames: frames drawn jointly while the action is kept; with 1 players can still
            switch to 2.
        dynamics: in a world that has both; players can switch.
        agent: whom players can hand over to: random, a file or name, or module:Class.
        trust: an agent's .zip (Stable-Baselines3) may run its author's code, and the world's real
            game may import any module.
        drift: show by a thin bar how unlike real ones the pictures are (not whether they are right;
            costs an encoding a frame); what led to a red one can be kept.
    """

    world: Positional[str] = ""
    device: str = "auto"
    sampling_steps: int | None = None
    speculative_frames: int = 1
    dynamics: Literal["student", "teacher"] | None = None
    agent: str | None = None
    trust: bool = False
    drift: bool = False

    def sampling(self) -> dict[str, Any]:
        """Arguments of ``Slots``, by which frames are drawn."""
        names = ("device", "sampling_steps", "speculative_frames", "dynamics", "drift")
        return {name: getattr(self, name) for name in names}


@config_class
class PlayConfig(Chosen):
    """A play in a window; see also ``Chosen``.

    Attributes:
        world: world folder, shipped world (default: the first), or a game file: the real game.
        seed: of the first episode.
        scale: size of the window; 1 is about 480 pixels high; default: to fit the screen.
        record: an MP4 file to write; or a folder, which means the same as save.
        save: folder of a data set that the play is appended to.
        max_episode_steps: cut episodes off there.
        max_frames: stop after so many pictures.
    """

    world: Positional[str] = ""
    seed: int | None = None
    scale: float | None = None
    record: str | None = None
    save: str | None = None
    max_episode_steps: int | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self, scale="[0.1, 20]", max_frames="[1, inf)", seed="[0, inf)")
        check_ranges(self, max_episode_steps="[1, inf)")
        if self.record is None or self.film is not None:
            return
        if not self.record or (Path(self.record).suffix and not Path(self.record).is_dir()):
            raise ConfigError(
                "record takes a film, such as play.mp4, or a folder for recordings to train on, "
                f"got {self.record!r}"
            )
        if self.save is not None:
            raise ConfigError(
                f"both {self.record} (record) and {self.save} (save) are folders of recordings: "
                "give one, and a film as record, such as play.mp4"
            )

    @property
    def film(self) -> str | None:
        """The MP4 to write."""
        is_film = self.record is not None and self.record.lower().endswith(".mp4")
        return self.record if is_film else None

    @property
    def folder(self) -> str | None:
        """The data set to append to."""
        return self.record if self.save is None and self.film is None else self.save


@config_class
class ServeConfig(Chosen):
    """A server of the browser player; see also ``Chosen``.

    Attributes:
        host: address to bind to; beyond 127.0.0.1 players need a token.
        port: TCP port, 0 for a free one.
        max_clients: players at a time, of all workers together.
        workers: processes that share the players and the processor's cores, behind one address.
        token_file: holds the secret that players need; or set NFD_TOKEN. Made up where needed.
        token: the secret itself, which others can read in the list of processes.
        allow_origin: addresses of proxies (JupyterHub, code-server) that the page is opened at,
            such as https://hub.example.org.
        idle_seconds: a player without any input for so long loses the place.
        real: players can change to the real game, which then runs on this machine for each.
        save: folder of data sets, one a world, that the play of all is appended to; the page says
            so to its players.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_clients: int = 8
    workers: int = 1
    token_file: str | None = None
    token: str | None = None
    allow_origin: tuple[str, ...] = ()
    idle_seconds: float = 180.0
    real: bool = False
    save: str | None = None


def play(settings: PlayConfig) -> int:
    """Play a world, or the real game, in a window, with the keyboard or a gamepad."""
    from nfd_env.play.window.display import import_pygame

    import_pygame()  # before anything that takes longer
    from nfd_env.play.window.player import play as play_world

    play_world(settings)
    return 0


def serve(settings: ServeConfig) -> int:
    """Play a world in a browser."""
    logging.basicConfig(format="nfd serve: %(message)s", level=logging.WARNING)
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise PlayError("nfd serve needs aiohttp: pip install 'nfd-env[serve]'") from None
    from nfd_env.play.web.serve import serve as serve_world

    serve_world(settings)
    return 0
