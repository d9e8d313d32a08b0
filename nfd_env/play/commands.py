"""The commands ``nfd play`` and ``nfd serve``."""

from __future__ import annotations

import logging
from typing import Literal

from tyro.conf import Positional

from nfd_env.play import PlayError

Dynamics = Literal["student", "teacher"]


def play(
    world: Positional[str] = "",
    device: str = "auto",
    seed: int | None = None,
    scale: float | None = None,
    sampling_steps: int | None = None,
    speculative_frames: int = 1,
    dynamics: Dynamics | None = None,
    agent: str | None = None,
    trust: bool = False,
    record: str | None = None,
    save: str | None = None,
    max_episode_steps: int | None = None,
    max_frames: int | None = None,
) -> int:
    """Play a world, or the real game, in a window, with the keyboard or a gamepad.

    Args:
        world: world folder, shipped world (default: the first), or a game file: the real game.
        device: auto, cpu, cuda or cuda:N.
        seed: of the first episode.
        scale: size of the window; 1 is about 480 pixels high.
        sampling_steps: denoising steps a frame; default: the world's own.
        speculative_frames: frames drawn jointly while the action is kept; a key can switch to 2.
        dynamics: in a world that has both.
        agent: whom F10 hands over to: random, a file or name, or module:Class.
        trust: an agent's .zip (Stable-Baselines3) may run its author's code.
        record: an MP4 file to write.
        save: folder of a data set that the play is appended to.
        max_episode_steps: cut episodes off there.
        max_frames: stop after so many pictures.
    """
    from nfd_env.play.window.display import import_pygame

    import_pygame()  # before anything that takes longer
    from nfd_env.play.window.player import play as play_world

    play_world(
        _chosen(world),
        device=device,
        seed=seed,
        scale=scale,
        sampling_steps=sampling_steps,
        speculative_frames=speculative_frames,
        dynamics=dynamics,
        agent=agent,
        trust=trust,
        record=record,
        save=save,
        max_episode_steps=max_episode_steps,
        max_frames=max_frames,
    )
    return 0


def serve(
    world: Positional[str] = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    max_clients: int = 8,
    token_file: str | None = None,
    token: str | None = None,
    allow_origin: tuple[str, ...] = (),
    device: str = "auto",
    sampling_steps: int | None = None,
    speculative_frames: int = 1,
    dynamics: Dynamics | None = None,
    agent: str | None = None,
    trust: bool = False,
    idle_seconds: float = 180.0,
) -> int:
    """Play a world in a browser.

    Args:
        world: world folder or shipped world; default: the first shipped one.
        host: address to bind to; beyond 127.0.0.1 players need a token.
        port: TCP port, 0 for a free one.
        max_clients: players at a time.
        token_file: holds the secret that players need; or set NFD_TOKEN. Made up where needed.
        token: the secret itself, which others can read in the list of processes.
        allow_origin: addresses of proxies (JupyterHub, code-server) that the page is opened at.
        device: auto, cpu, cuda or cuda:N.
        sampling_steps: denoising steps a frame; default: the world's own.
        speculative_frames: frames drawn jointly while the action is kept; a key can switch to 2.
        dynamics: in a world that has both.
        agent: whom players can hand over to: random, a file or name, or module:Class.
        trust: an agent's .zip (Stable-Baselines3) may run its author's code.
        idle_seconds: a player without any input for so long loses the place.
    """
    logging.basicConfig(format="nfd serve: %(message)s", level=logging.WARNING)
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise PlayError("nfd serve needs aiohttp: pip install 'nfd-env[serve]'") from None
    from nfd_env.play.web.server import serve as serve_world

    serve_world(
        _chosen(world),
        host=host,
        port=port,
        max_clients=max_clients,
        token=token,
        token_file=token_file,
        allow_origin=allow_origin,
        device=device,
        sampling_steps=sampling_steps,
        speculative_frames=speculative_frames,
        dynamics=dynamics,
        agent=agent,
        trust=trust,
        idle_seconds=idle_seconds,
    )
    return 0


def _chosen(world: str) -> str:
    from nfd_env.worlds.load import shipped_worlds

    return world or shipped_worlds()[0]
