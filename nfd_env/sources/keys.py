"""Names for the actions of a space, and keys for them, where nobody has given any."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product, zip_longest
from typing import Any

import numpy as np
from gymnasium import spaces

NOOP = "noop"
"""The action that rests; in a MultiDiscrete space the names of its entries' rests begin so."""

# Keys for an axis that goes both ways, (down, up), and for what is on or off.
_PAIRS = [
    tuple(pair.split())
    for pair in ("left right", "down up", "a d", "s w", "j l", "k i", "f h", "g t", "z x", "n m")
]
_PEDALS = ("up", "down", "w", "s", "space", "left shift", "e", "q", "c", "v")
_BUTTONS = tuple("1234567890") + tuple("qwertyuiop")
# What the names of actions mean in many games, and a second key for the hand on the letters. Where
# one turns and steps aside, the arrows turn and the letters step.
_LEFT, _RIGHT, _UP, _DOWN = ("left", "a"), ("right", "d"), ("up", "w"), ("down", "s")
_KNOWN = {
    "left": _LEFT,
    "right": _RIGHT,
    "up": _UP,
    "down": _DOWN,
    "turn_left": _LEFT,
    "turn_right": _RIGHT,
    "move_left": _LEFT[::-1],
    "move_right": _RIGHT[::-1],
    "forward": _UP,
    "move_forward": _UP,
    "backward": _DOWN,
    "move_backward": _DOWN,
    "fire": ("space",),
    "jump": ("space",),
    "shoot": ("space",),
    "attack": ("space",),
    "accelerate": ("up", "w"),
    "gas": ("up", "w"),
    "brake": ("down", "s"),
}


class KeymapError(ValueError):
    """Keys do not fit an action space."""


_ALIASES = {
    " ": "space",
    "enter": "return",
    "esc": "escape",
    "ctrl": "left ctrl",
    "control": "left ctrl",
    "shift": "left shift",
    "alt": "left alt",
    "arrowleft": "left",
    "arrowright": "right",
    "arrowup": "up",
    "arrowdown": "down",
    # SDL's codes, which games have from pygame.
    "1073741903": "right",
    "1073741904": "left",
    "1073741905": "down",
    "1073741906": "up",
}


# Those with more than one letter; the window and the page know them.
NAMED_KEYS = {"left", "right", "up", "down", "space", "return", "tab", "backspace"} | {
    "left shift",
    "right shift",
    "left ctrl",
    "right ctrl",
    "left alt",
}


def key_name(key: str | int) -> str:
    """One name for a key: "a", "left", "space"; an int is a character code, as Gymnasium has it."""
    if isinstance(key, int):
        key = chr(key) if 0 < key < 0x110000 else str(key)
    lowered = key if key == " " else key.strip().lower()
    return _ALIASES.get(lowered, lowered)


def chord_keys(chord: str) -> frozenset[str]:
    """The keys of "left+space", or of a single one."""
    return frozenset(key_name(key) for key in chord.split("+") if key) or frozenset("+")


@dataclass(frozen=True)
class Axis:
    """One number of a Box action.

    Attributes:
        entry: its place in the action, counted through all dimensions.
        low: its value at one end; -1, or one from the other end, where the space has none.
        high: its value at the other end.
        rest: its value without a key: 0 where the space has it, else the middle.
    """

    entry: int
    low: float
    high: float
    rest: float

    @property
    def both_ways(self) -> bool:
        """Whether it rests between its ends, as a steering wheel does, and a pedal does not."""
        return self.low < self.rest < self.high

    def at(self, deflection: float) -> float:
        """Its value for a deflection from -1 (low) over 0 (rest) to 1 (high).

        An axis that rests at one end takes the size of the deflection only.
        """
        deflection = min(max(deflection, -1.0), 1.0)
        if not self.both_ways:
            return self.rest + abs(deflection) * (self.low + self.high - 2 * self.rest)
        side = self.high if deflection > 0 else self.low
        return self.rest + abs(deflection) * (side - self.rest)


def box_axes(space: spaces.Box) -> list[Axis]:
    """The axes of a Box, in C order."""
    axes = []
    most = float(np.finfo(np.float32).max)  # which also stands for no bound
    for entry, ends in enumerate(zip(space.low.ravel(), space.high.ravel(), strict=True)):
        low, high = map(float, ends)
        if low <= -most and high >= most:
            low, high = -1.0, 1.0
        elif low <= -most:
            low = min(-1.0, high - 1)
        elif high >= most:
            high = max(1.0, low + 1)
        rest = 0.0 if low <= 0 <= high else (low + high) / 2
        if np.issubdtype(space.dtype, np.integer):
            rest = float(round(rest))
        axes.append(Axis(entry, low, high, rest))
    return axes


def resting_action(space: spaces.Space, names: Sequence[str] = ()) -> Any:
    """The action of a person who does nothing.

    Discrete: the one named "noop", else the first. MultiDiscrete: the same for each entry, where
    a name may also begin with "noop". Box: see ``Axis.rest``. MultiBinary: nothing set.

    Args:
        space: the action space.
        names: of the actions, in the order of ``default_controls``.

    Raises:
        KeymapError: for a space of another kind.
    """
    if isinstance(space, spaces.Discrete):
        return int(space.start) + (list(names).index(NOOP) if NOOP in names else 0)
    if isinstance(space, spaces.MultiDiscrete):
        rest = np.array(space.start, space.dtype)
        first = 0
        for index, count in np.ndenumerate(space.nvec):
            own = [name.split()[:1] == [NOOP] for name in names[first : first + int(count)]]
            rest[index] += own.index(True) if True in own else 0
            first += int(count)
        return rest
    if isinstance(space, spaces.MultiBinary):
        return np.zeros(space.shape, space.dtype)
    if isinstance(space, spaces.Box):
        rest = [axis.rest for axis in box_axes(space)]
        return np.array(rest).reshape(space.shape).astype(space.dtype)
    raise KeymapError(f"a person cannot play {space}: give the resting action as noop=")


@dataclass(frozen=True)
class Binding:
    """Keys that together mean something.

    Attributes:
        keys: all of them must be pressed.
        value: the whole action; or, of a space other than Discrete, (index, value) of one of its
            entries.
        label: the name of the action.
    """

    keys: frozenset[str]
    value: Any
    label: str


def controls(
    space: spaces.Space, names: Sequence[str], keys: Mapping[str, Sequence[str]]
) -> tuple[list[str], list[Binding]]:
    """What a world's keys mean, by its names and keys or, where it has none, the default ones.

    Args:
        space: its action space.
        names: of the actions, in the order of ``default_controls``.
        keys: action name -> keys, which may be chords; see also ``with_chords``.

    Returns:
        The names, and what each key or chord does.

    Raises:
        KeymapError: when ``keys`` names an action that is not in ``names``.
    """
    values, names = _entries(space), list(names)
    if not keys:
        names, keys = default_controls(space, names)
    names = names or default_controls(space)[0]
    if isinstance(space, spaces.Discrete):
        keys = with_chords(names, keys)
    bindings = []
    for name, alternatives in keys.items():
        if name not in names or names.index(name) >= len(values):
            raise KeymapError(f"keys are given for {name!r}, which is no action of {names}")
        for chord in alternatives:
            bindings.append(Binding(chord_keys(chord), values[names.index(name)], name))
    return names, bindings


def keys_to_action(
    space: spaces.Space, names: Sequence[str], keys: Mapping[str, Sequence[str]]
) -> dict[tuple[str, ...], Any]:
    """``controls`` as ``gymnasium.utils.play`` has them: single letters to whole actions.

    An action is the resting one with the entry of the key set; two keys of different entries
    together set both.
    """
    names, bindings = controls(space, names, keys)
    bindings = [binding for binding in bindings if all(len(key) == 1 for key in binding.keys)]
    if isinstance(space, spaces.Discrete):
        return {tuple(sorted(binding.keys)): binding.value for binding in bindings}
    meant = {}
    for held in chain(combinations(bindings, 1), combinations(bindings, 2)):
        if len({binding.value[0] for binding in held}) < len(held):
            continue  # the two ends of one axis, or two keys of one end
        action = resting_action(space, names)
        for binding in held:
            index, value = binding.value
            action[index] = value
        meant[tuple(sorted(key for binding in held for key in binding.keys))] = action
    return meant


def default_controls(
    space: spaces.Space, names: Sequence[str] = ()
) -> tuple[list[str], dict[str, list[str]]]:
    """Names for the actions of ``space``, and the keys that a person holds for them.

    ============== =================================================================
    Discrete       a name an action; the first, or the one named "noop", has no key, nor has one
                   that ``with_chords`` gives some
    MultiDiscrete  a name a value: all of the first entry, then of the second, ...;
                   an entry rests at its first value, or at one named "noop ..."
    MultiBinary    a name a bit; keys held together set several
    Box            two names a number: its low end, then its high end; the first axis
                   that goes both ways is steered by the left and right keys, pedals
                   (axes that rest at one end) are pressed by up and down
    ============== =================================================================

    Args:
        space: the action space.
        names: given ones are kept, and one such as "left" or "fire" gets the usual key.

    Returns:
        The names, all different, and action name -> key names (see ``key_name``). Spaces
        with more actions than there are handy keys leave the last ones without.

    Raises:
        KeymapError: for a space of another kind, or another number of names.
    """
    if isinstance(space, spaces.Box):
        made, wanted = _box_controls(box_axes(space))
    else:
        made = list(_plain_names(space))
        wanted = {}
    given = list(names) or made
    if len(given) != len(made):
        raise KeymapError(f"{space} has {len(made)} actions to name, but {len(given)} names")
    keys: dict[str, list[str]] = {}
    taken: set[str] = set()
    if isinstance(space, spaces.Box):
        renamed = dict(zip(made, given, strict=True))
        return given, {renamed[name]: [key] for name, key in wanted.items()}
    usual = {name: _KNOWN.get(name.lower(), ()) for name in given}
    for turn in range(2):  # the first key of each goes before the second key of another
        for name, wanted_keys in usual.items():
            for key in wanted_keys[turn : turn + 1]:
                if key not in taken:
                    keys.setdefault(name, []).append(key)
                    taken.add(key)
    acting = [name for name in given if name.split()[:1] != [NOOP]]
    if isinstance(space, spaces.Discrete):
        chords = with_chords(given, keys).keys() - keys.keys()
        acting = [name for name in acting if name not in chords]
    # The number keys count a Discrete space's actions, the resting one too.
    counted = given if isinstance(space, spaces.Discrete) else acting
    for name, key in zip(counted, _BUTTONS, strict=False):
        if name in acting and name not in keys and key not in taken:
            keys[name] = [key]
            taken.add(key)
    return given, keys


def with_chords(names: Sequence[str], keys: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """``keys``, and chords for the actions that are named after several others.

    Such as "left_up", where "left" and "up" have keys, or Atari's "uprightfire": whoever holds both
    means it.

    Args:
        names: of the actions of a Discrete space.
        keys: action name -> key names.
    """
    # A single letter or a number is too little to tell what a name is made of.
    single = {
        name: [key for key in own if len(key) == 1 or "+" not in key]
        for name, own in keys.items()
        if len(name) > 1 and name.replace("_", "").isalpha()
    }
    word = "|".join(sorted(map(re.escape, single), key=len, reverse=True))
    found = {name: list(own) for name, own in keys.items()}
    for name in names if word else ():
        if name not in found and re.fullmatch(f"({word})([\\W_]*({word}))+", name):
            parts = re.findall(word, name)
            if len(set(parts)) == len(parts):
                found[name] = ["+".join(chord) for chord in product(*(single[p] for p in parts))]
    return found


def check_controls(
    space: spaces.Space, names: Sequence[str], keys: Mapping[str, Sequence[str]]
) -> None:
    """Refuse names and keys that a finished world could not be saved or played with.

    Args:
        space: the action space.
        names: of its actions, see ``SourceConfig.action_names``; none for the usual ones.
        keys: action name -> key names.

    Raises:
        KeymapError: when there are more names than actions, names that are empty or alike, keys of
            an action of no such name, one key for two actions, keys that there are not, or
            another number of names than there are to name where keys are to follow from them.
    """
    for name in names:
        if not name.strip():
            raise KeymapError("action_names must not be empty")
    if alike := sorted({name for name in names if list(names).count(name) > 1}):
        raise KeymapError(f"action_names has {alike[0]!r} twice")
    if isinstance(space, spaces.Discrete) and len(names) > space.n:
        raise KeymapError(f"there are {len(names)} action_names for {space.n} actions")
    known = list(names) or (default_controls(space)[0] if keys else [])
    for name in keys:
        if name not in known:
            raise KeymapError(f"keys are given for {name!r}, which is no action of {known}")
    means: dict[frozenset[str], str] = {}
    for name, own in keys.items():
        for key in own:
            pressed = chord_keys(key)
            unknown = sorted(k for k in pressed if len(k) != 1 and k not in NAMED_KEYS)
            if unknown or not key:
                raise KeymapError(
                    f"{name!r} has the key {[*unknown, ''][0]!r}, which is none: give a letter, a "
                    f"number, or one of {', '.join(sorted(NAMED_KEYS))}; several at once as "
                    "'left+space'"
                )
            other = means.setdefault(pressed, name)
            if other != name:
                raise KeymapError(f"the key {key!r} is given for both {other!r} and {name!r}")
    controls(space, names, keys)  # as those who play call it


def _entries(space: spaces.Space) -> list[Any]:
    """The values of a binding for each of the names of ``default_controls``."""
    if isinstance(space, spaces.Discrete):
        return [int(space.start) + i for i in range(int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        starts = np.asarray(space.start)
        entries = np.ndenumerate(space.nvec)
        return [(i, int(starts[i]) + value) for i, n in entries for value in range(int(n))]
    if isinstance(space, spaces.MultiBinary):
        return [(i, 1) for i in np.ndindex(space.shape)]
    if isinstance(space, spaces.Box):
        entries = zip(np.ndindex(space.shape), box_axes(space), strict=True)
        return [(i, end) for i, axis in entries for end in (axis.low, axis.high)]
    raise KeymapError(f"no keymap is known for {space}")


def _plain_names(space: spaces.Space) -> Iterator[str]:
    if isinstance(space, spaces.Discrete):
        yield from (str(int(space.start) + i) for i in range(int(space.n)))
    elif isinstance(space, spaces.MultiDiscrete):
        starts = np.asarray(space.start).ravel()
        for i, count in enumerate(np.asarray(space.nvec).ravel()):
            yield f"{NOOP} {i + 1}"
            yield from (f"dial {i + 1} at {int(starts[i]) + v}" for v in range(1, int(count)))
    elif isinstance(space, spaces.MultiBinary):
        yield from (f"button {i + 1}" for i in range(math.prod(space.shape)))
    else:
        raise KeymapError(f"no keys are known for {space}")


def _box_controls(axes: list[Axis]) -> tuple[list[str], dict[str, str]]:
    """Names of both ends of each axis, and a key for those that are not where it rests."""
    names: list[str] = []
    keys: dict[str, str] = {}
    taken: set[str] = set()
    # Wheels choose first: a pedal must not take the up key from the second of two sticks.
    pairs = iter(_PAIRS)
    wheels = {axis.entry: next(pairs, None) for axis in axes if axis.both_ways}
    taken.update(chain.from_iterable(pair for pair in wheels.values() if pair))
    pedals = iter([key for key in _PEDALS if key not in taken])
    words = chain(("accelerate", "brake"), (f"pedal {i}" for i in range(3, len(axes) + 3)))
    for axis in axes:
        number = axis.entry + 1
        if axis.both_ways:
            pair = wheels[axis.entry]
            plain = pair in _PAIRS[:2]
            ends = pair if pair and plain else (f"axis {number} low", f"axis {number} high")
            names += ends
            keys |= {n: k for n, k in zip_longest(ends, pair or ()) if k}
        elif axis.low == axis.high:
            names += (f"fixed {number}", f"fixed {number} too")
        else:
            word = next(words)
            ends = (f"{word} off", word) if axis.rest == axis.low else (word, f"{word} off")
            names += ends
            key = next(pedals, None)
            if key is not None:
                keys[word] = key
    return names, keys
