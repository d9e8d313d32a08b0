"""The browser player (aiohttp): one page, a WebSocket a player, one batched model a world.

``protocol`` (what goes over the socket), ``access`` (who may come in), ``connection`` (how long a
request may take), ``pictures`` (JPEG and films), ``client`` (one player), ``rooms`` (the worlds
that are played) and ``server``, which puts them together; ``workers`` (several servers behind one
address) and ``serve``, the command.
"""

from pathlib import Path

STATIC = Path(__file__).parent / "static"
