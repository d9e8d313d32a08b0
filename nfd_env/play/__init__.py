"""People play a world: a keyboard window, and a browser page for a machine without a screen.

``keys`` -> ``session`` (one person's play) -> ``slots`` (all of them in one batched world) and
``engine`` (when each is stepped), and on top of it ``window`` (pygame-ce) and ``web`` (aiohttp).
"""


class PlayError(RuntimeError):
    """Nothing can be played here; the message says what to do."""
