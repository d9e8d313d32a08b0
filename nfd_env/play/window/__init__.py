"""The keyboard window (pygame-ce): play a learned world, or any Gymnasium env with a keymap."""

from nfd_env.play.window.display import WindowError
from nfd_env.play.window.player import KeyboardPlayer, play

__all__ = ["KeyboardPlayer", "WindowError", "play"]
