"""What goes over the WebSocket.

The page sends JSON objects with a type "t": ``key`` {k, d, n}, ``axis`` {i, v, n}, ``release`` {n},
``ack`` {n}, ``control`` {do, value} and ``awake``. The server sends JSON objects (``loading``,
``hello``, ``refused``, ``bye``) as text, and pictures as binary messages: the length of a JSON
header (uint32, little endian), the header, the JPEG or PNG.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nfd_env.play.keys import Keymap
from nfd_env.play.session import SPEEDS
from nfd_env.sources.keys import key_name

# Close codes of the WebSocket, in the range for applications.
FULL, IDLE, BAD_MESSAGE, TOO_FAST, FAILED, GOING = 4001, 4002, 4003, 4004, 4005, 4006

_KEY_LETTERS = 20  # longer than the name of any key
_MOST = 2**53  # whole numbers below it are exact in the page's language


class BadMessage(ValueError):
    """A client sent something that the protocol does not have."""


@dataclass(frozen=True)
class Key:
    """A key went down or up; ``number`` counts the client's inputs."""

    key: str
    down: bool
    number: int


@dataclass(frozen=True)
class Tilt:
    """A stick of a gamepad was moved: entry of the action, from -1 to 1; see ``Key``."""

    entry: int
    deflection: float
    number: int


@dataclass(frozen=True)
class Release:
    """The page lost the focus: nothing is pressed."""


@dataclass(frozen=True)
class Ack:
    """The picture of this number was shown, and all before it."""

    number: int


@dataclass(frozen=True)
class Control:
    """A control of ``Session.control``."""

    name: str
    value: bool | int | float | None


@dataclass(frozen=True)
class Awake:
    """Somebody is there."""


Message = Key | Tilt | Release | Ack | Control | Awake


def parse(text: str) -> Message:
    """Read a message of a page.

    Raises:
        BadMessage: when it is not of the protocol.
    """
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise BadMessage("messages must be JSON") from None
    if not isinstance(message, dict):
        raise BadMessage("messages must be JSON objects")
    kind = message.get("t")
    if kind == "key":
        key, down = message.get("k"), message.get("d")
        if not isinstance(key, str) or len(key) > _KEY_LETTERS or down not in (0, 1):
            raise BadMessage("key takes k, a key's name, and d, 0 or 1")
        return Key(key_name(key), bool(down), _number(message, "n"))
    if kind == "axis":
        value = message.get("v")
        if value is None or not _is_number(value) or not -1 <= value <= 1:
            raise BadMessage("axis takes i, an entry of the action, and v, from -1 to 1")
        return Tilt(_number(message, "i"), float(value), _number(message, "n"))
    if kind == "ack":
        return Ack(_number(message, "n"))
    if kind == "release":
        return Release()
    if kind == "control":
        name, value = message.get("do"), message.get("value")
        if not isinstance(name, str) or not (
            value is None or isinstance(value, bool) or _is_number(value)
        ):
            raise BadMessage("control takes do, a name, and value, a number or a boolean")
        return Control(name, value)
    if kind == "awake":
        return Awake()
    raise BadMessage("unknown type of message")


def about_game(
    world: str, fps: float, aspect: float, display: str, size: tuple[int, int], keymap: Keymap
) -> dict[str, Any]:
    """The part of a ``hello`` that is the same on a server and without one; see ``Game``."""
    return {
        "t": "hello",
        "world": world,
        "fps": fps,
        "aspect": aspect,
        "display": display,
        "size": size,
        "keys": sorted(keymap.keys),
        "labels": keymap.labels(),
        "buttons": keymap.buttons(),
        "gamepad": asdict(keymap.gamepad()),
        "speeds": SPEEDS,
    }


def pack_picture(header: Mapping[str, Any], picture: bytes) -> bytes:
    """A picture as it goes over the wire."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<I", len(text)) + text + picture


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, float) and math.isfinite(value)


def _number(message: Mapping[str, Any], name: str) -> int:
    number = message.get(name, 0)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _MOST:
        raise BadMessage(f"{name} must be a whole number")
    return number
