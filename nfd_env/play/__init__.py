"""People play a world: a keyboard window, and a browser page for a machine without a screen.

``keys`` -> ``session`` (one person's play) -> ``slots`` (all of them in one batched world), and on
top of it ``window`` (pygame-ce) and ``engine`` + ``server`` (aiohttp).
"""
