"""Whether a window can be opened here, and if not, what to do instead."""

from __future__ import annotations

import os
from typing import Any

from nfd_env.play import PlayError

# SDL falls back to these when it finds no screen: a window that nobody sees.
_INVISIBLE = {"dummy", "offscreen", "evdev"}
# How a person, or a test, chooses SDL's driver.
_CHOICES = ("SDL_VIDEODRIVER", "SDL_VIDEO_DRIVER")


class WindowError(PlayError):
    """The window cannot be opened here; the message says what to do."""


def import_pygame() -> Any:
    """The pygame module.

    Raises:
        WindowError: naming the package to install.
    """
    try:
        import pygame
    except ImportError:
        raise WindowError("nfd play needs pygame: pip install 'nfd-env[play]'") from None
    return pygame


def open_display() -> None:
    """Connect to the display; once is enough.

    Raises:
        WindowError: when pygame is missing or there is no display that anybody can see. One that
            was asked for by SDL_VIDEODRIVER need not be seen.
    """
    pygame = import_pygame()
    try:
        pygame.display.init()
    except pygame.error as error:
        raise WindowError(_advice(str(error))) from None
    driver = pygame.display.get_driver()
    if driver in _INVISIBLE and not any(os.environ.get(name) for name in _CHOICES):
        pygame.display.quit()
        raise WindowError(_advice("there is no screen"))


def _advice(what: str) -> str:
    return (
        f"no window can be opened here ({what}). Without a screen use `nfd serve` and a browser; "
        "in tests set SDL_VIDEODRIVER=dummy"
    )
