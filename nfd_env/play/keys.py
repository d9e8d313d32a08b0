"""From held keys to an action: keymaps by action name, chords, and taps that are never lost."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces

from nfd_env.sources.keys import (
    NAMED_KEYS,
    NOOP,
    Binding,
    KeymapError,
    box_axes,
    controls,
    key_name,
    resting_action,
)

if TYPE_CHECKING:
    from nfd_env.sources.spec import SourceConfig


@dataclass(frozen=True)
class PressedKey:
    """A key that counts now.

    Attributes:
        key: its name.
        tapped: pressed since the last step, whether or not it is still down.
    """

    key: str
    tapped: bool


@dataclass(frozen=True)
class Choice:
    """What the pressed keys mean.

    Attributes:
        action: lies in the action space.
        label: what it is called.
        used: the keys that it came from.
    """

    action: Any
    label: str
    used: frozenset[str]


class Keymap:
    """Turns pressed keys into an action.

    In an exclusive keymap (Discrete, or chords to whole actions) one binding wins: a tap before a
    held key, then the bigger chord, then the key pressed last. In an additive keymap
    (MultiDiscrete, MultiBinary, Box) every pressed binding sets its entry of the action.
    """

    def __init__(
        self,
        space: spaces.Space,
        bindings: Sequence[Binding],
        names: Sequence[str] = (),
        noop: Any = None,
        additive: bool = False,
    ) -> None:
        """Put a keymap together.

        Args:
            space: the action space.
            bindings: see ``Binding``.
            names: a name for each Discrete action.
            noop: the action without any key; None for the space's own resting action.
            additive: see the class.

        Raises:
            KeymapError: when an action does not lie in ``space``.
        """
        self.space, self.bindings, self.names = space, list(bindings), list(names)
        self.additive = additive
        self.noop = resting_action(space, self.names) if noop is None else noop
        self.keys = frozenset(k for b in self.bindings for k in b.keys)
        self.axes = box_axes(space) if isinstance(space, spaces.Box) and additive else []
        for binding in self.bindings:
            action = self._add([binding]) if additive else binding.value
            if not self.contains(action):
                raise KeymapError(
                    f"keys {'+'.join(sorted(binding.keys))} mean {action!r}, which does not lie "
                    f"in {space}"
                )

    @classmethod
    def from_source(cls, source: SourceConfig, space: spaces.Space) -> Keymap:
        """The keymap of a world: its action names and keys; the default ones where it has none.

        The names are in the order of ``default_controls``. A key may be a chord, such as
        "left+space"; see also ``with_chords``.

        Raises:
            KeymapError: when ``keys`` names an action that is not in ``action_names``.
        """
        names, bindings = controls(space, source.action_names, source.keys)
        return cls(space, bindings, names, additive=not isinstance(space, spaces.Discrete))

    @classmethod
    def from_env(
        cls, env: gymnasium.Env, keys_to_action: Mapping[Any, Any] | None = None, noop: Any = None
    ) -> Keymap:
        """The keymap of any Gymnasium environment.

        Args:
            env: its ``get_keys_to_action`` is used unless ``keys_to_action`` is given.
            keys_to_action: Gymnasium's format (a string or tuple of characters or key codes, to an
                action); a tuple may also hold key names such as "left".
            noop: the action without any key.

        Raises:
            KeymapError: when there is no keymap, or it does not fit the action space.
        """
        if keys_to_action is None:
            if not env.has_wrapper_attr("get_keys_to_action"):
                raise KeymapError(
                    f"{env} has no get_keys_to_action(): pass keys_to_action={{'a': 0, ...}}"
                )
            keys_to_action = env.get_wrapper_attr("get_keys_to_action")()
        bindings = []
        for keys, action in (keys_to_action or {}).items():
            chord = [keys] if isinstance(keys, int) else list(keys)
            if isinstance(keys, str) and len(keys) > 1 and key_name(keys) in NAMED_KEYS:
                chord = [keys]
            if not chord:
                noop = action if noop is None else noop
                continue
            label = "+".join(key_name(k) for k in chord)
            bindings.append(Binding(frozenset(key_name(k) for k in chord), action, label))
        return cls(env.action_space, bindings, noop=noop)

    def choose(
        self, pressed: Sequence[PressedKey], deflections: Mapping[int, float] | None = None
    ) -> Choice:
        """The action of the pressed keys, given in the order in which they went down.

        Args:
            pressed: the keys.
            deflections: of a gamepad's sticks, from -1 to 1, for some of ``axes``; a key for the
                same entry wins.
        """
        place = {p.key: i for i, p in enumerate(pressed)}
        tapped = [p.key for p in pressed if p.tapped]
        active = [b for b in self.bindings if b.keys <= place.keys()]
        tilted = {i: d for i, d in (deflections or {}).items() if d and i < len(self.axes)}
        if not active and not tilted:
            return Choice(_own(self.noop), self.label(self.noop), frozenset())
        if self.additive:
            # Later keys come last, so that of two opposite ones the newer wins.
            active.sort(key=lambda b: max(place[k] for k in b.keys))
            labels = [self._axis_label(i, d) for i, d in sorted(tilted.items())]
            labels = list(dict.fromkeys([*(b.label for b in active), *labels]))
            used = frozenset(k for b in active for k in b.keys)
            return Choice(self._add(active, tilted), "+".join(labels), used)

        def rank(binding: Binding) -> tuple[int, int, int]:
            first = min((tapped.index(k) for k in binding.keys if k in tapped), default=len(tapped))
            return -first, len(binding.keys), max(place[k] for k in binding.keys)

        best = max(active, key=rank)
        return Choice(_own(best.value), best.label, best.keys)

    def contains(self, action: Any) -> bool:
        """Whether ``action`` lies in the action space."""
        if isinstance(self.space, spaces.Discrete):
            return self.space.contains(action)
        return self.space.contains(np.asarray(action, self.space.dtype))

    def label(self, action: Any) -> str:
        """What a person calls ``action``."""
        if isinstance(self.space, spaces.Discrete):
            index = int(action) - int(self.space.start)
            if index < len(self.names):
                return self.names[index]
        for binding in self.bindings:
            if not self.additive and np.array_equal(binding.value, action):
                return binding.label
        if np.array_equal(action, self.noop):
            return NOOP
        return str(np.asarray(action).tolist())

    def all_actions(self) -> list[Any]:
        """Every action of a Discrete space, none of any other."""
        if not isinstance(self.space, spaces.Discrete):
            return []
        start = int(self.space.start)
        return list(range(start, start + int(self.space.n)))

    def buttons(self) -> list[dict[str, str]]:
        """One {"label", "key"} an action with a single key, for touch screens."""
        found: dict[str, str] = {}
        for binding in self.bindings:
            if len(binding.keys) == 1:
                found.setdefault(binding.label, next(iter(binding.keys)))
        return [{"label": label, "key": key} for label, key in found.items()]

    def labels(self) -> dict[str, str]:
        """Key -> what it does, alone if it does something alone, else as a part of chords."""
        found: dict[str, str] = {}
        for binding in sorted(self.bindings, key=lambda b: len(b.keys)):
            chord = "" if len(binding.keys) == 1 else f" ({' + '.join(sorted(binding.keys))})"
            for key in binding.keys:
                found.setdefault(key, binding.label + chord)
        return found

    def gamepad(self) -> Gamepad:
        """What the parts of a gamepad do, by their names on a standard one.

        Axes that go both ways lie on the sticks, pedals on the triggers. Where there are none, the
        left stick and the cross press the arrow keys. The buttons press what is left, in order.
        """
        axes: dict[str, int] = {}
        sticks, triggers = iter(("leftx", "lefty", "rightx", "righty")), iter(("rt", "lt"))
        for axis in self.axes:
            name = next(sticks if axis.both_ways else triggers, None)
            if name is not None and axis.low < axis.high:
                axes[name] = axis.entry
        cross = {f"dp{key}": key for key in ("left", "right", "up", "down") if key in self.keys}
        cross_keys = set(cross.values())
        reached = {b.label for b in self.bindings if len(b.keys) == 1 and b.keys <= cross_keys}
        rest: dict[str, str] = {}
        for binding in self.bindings:
            tilts = self.axes and self.names.index(binding.label) // 2 in axes.values()
            if len(binding.keys) == 1 and binding.label not in reached and not tilts:
                rest.setdefault(binding.label, *binding.keys)
        names = ("a", "b", "x", "y", "lb", "rb", "lt", "rt", "ls", "rs")
        free = [name for name in names if name not in axes]
        return Gamepad(axes, {**cross, **dict(zip(free, rest.values(), strict=False))})

    def _axis_label(self, entry: int, deflection: float) -> str:
        axis = self.axes[entry]
        name = self.names[2 * entry + (axis.at(deflection) > axis.rest)] if self.names else ""
        return f"{name} {abs(deflection):.0%}"

    def _add(self, active: Iterable[Binding], tilted: Mapping[int, float] | None = None) -> Any:
        action = np.array(self.noop)
        for entry, deflection in (tilted or {}).items():
            action.flat[entry] = self.axes[entry].at(deflection)
        for binding in active:
            index, value = binding.value
            action[index] = value
        return action


@dataclass(frozen=True)
class Gamepad:
    """What a gamepad's parts do; names as on a standard gamepad ("a", "dpleft", "leftx", "rt").

    Attributes:
        axes: stick or trigger -> entry of the Box action that it sets.
        buttons: button -> key that it presses.
    """

    axes: dict[str, int]
    buttons: dict[str, str]


class KeyLatch:
    """Which keys are down, which were tapped since a step consumed them, and where sticks are.

    Safe to use from several threads.
    """

    def __init__(self, allowed: Iterable[str], axes: int = 0) -> None:
        """Follow the keys in ``allowed`` and the first ``axes`` axes; others are ignored."""
        self._allowed = frozenset(allowed)
        self._axes = axes
        self._deflections: dict[int, float] = {}
        self._held: dict[str, None] = {}
        self._tapped: dict[str, None] = {}
        self._lock = threading.Lock()

    def press(self, key: str) -> bool:
        """A key went down (a repeat is ignored); whether it is one of ours."""
        if key not in self._allowed:
            return False
        with self._lock:
            if key not in self._held:
                self._held[key] = None
                self._tapped[key] = None
        return True

    def release(self, key: str) -> bool:
        """A key went up; whether it is one of ours. A tap stays until a step has consumed it."""
        with self._lock:
            self._held.pop(key, None)
        return key in self._allowed

    def tilt(self, axis: int, deflection: float) -> bool:
        """A stick was moved to ``deflection``, from -1 to 1; whether it is one of ours."""
        if not 0 <= axis < self._axes:
            return False
        with self._lock:
            self._deflections[axis] = deflection
        return True

    def deflections(self) -> dict[int, float]:
        """Where the sticks are now, by axis."""
        with self._lock:
            return dict(self._deflections)

    def release_all(self) -> None:
        """The window lost its focus, or the connection broke: no key counts any more."""
        with self._lock:
            self._held.clear()
            self._tapped.clear()
            self._deflections.clear()

    def pressed(self) -> list[PressedKey]:
        """The keys that count now, in the order in which they went down."""
        with self._lock:
            order = {**{k: None for k in self._held if k not in self._tapped}, **self._tapped}
            return [PressedKey(key, key in self._tapped) for key in order]

    def consume(self, keymap: Keymap) -> Choice:
        """The action for one step; the taps it came from are spent, the others wait."""
        choice = keymap.choose(self.pressed(), self.deflections())
        with self._lock:
            for key in choice.used:
                self._tapped.pop(key, None)
        return choice


def _own(action: Any) -> Any:
    """An action that whoever gets it may change."""
    return action.copy() if isinstance(action, np.ndarray) else action
