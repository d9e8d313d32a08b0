"""Gamepads (SDL's controllers): sticks tilt the axes of an action, buttons press keys."""

from __future__ import annotations

from typing import Any

from nfd_env.play.keys import Gamepad
from nfd_env.play.session import Session

_DEAD = 0.12  # of a stick's way: where worn ones rest
_CROSS = 0.5  # from there on a stick presses an arrow key
_SPACING = 1 / 50  # a stick trembles: smaller changes are no input

_BUTTONS = {
    "a": "A",
    "b": "B",
    "x": "X",
    "y": "Y",
    "lb": "LEFTSHOULDER",
    "rb": "RIGHTSHOULDER",
    "ls": "LEFTSTICK",
    "rs": "RIGHTSTICK",
    "dpleft": "DPAD_LEFT",
    "dpright": "DPAD_RIGHT",
    "dpup": "DPAD_UP",
    "dpdown": "DPAD_DOWN",
}
_AXES = {
    "leftx": "LEFTX",
    "lefty": "LEFTY",
    "rightx": "RIGHTX",
    "righty": "RIGHTY",
    "lt": "TRIGGERLEFT",
    "rt": "TRIGGERRIGHT",
}


class Gamepads:
    """All gamepads that are plugged in play together."""

    def __init__(self, pygame: Any, plan: Gamepad, session: Session) -> None:
        """Listen to gamepads; ``plan`` says what they do to ``session``."""
        self._pygame, self._plan, self._session = pygame, plan, session
        self._controllers: dict[int, Any] = {}
        self._tilts: dict[str, dict[int, float]] = {}  # axis -> gamepad -> deflection
        self._pressed: set[tuple[int, str]] = set()
        self._module: Any = None
        try:
            from pygame._sdl2 import controller

            controller.init()
            self._module = controller
        except (ImportError, pygame.error):  # a pygame without them: the keyboard is enough
            return
        names = vars(pygame)
        self._buttons = {names[f"CONTROLLER_BUTTON_{n}"]: k for k, n in _BUTTONS.items()}
        self._axes = {names[f"CONTROLLER_AXIS_{n}"]: k for k, n in _AXES.items()}

    def event(self, event: Any) -> bool:
        """Act on an event of a gamepad; whether it was one."""
        pygame = self._pygame
        if self._module is None:
            return False
        which = event.dict.get("instance_id", 0)
        if event.type == pygame.CONTROLLERDEVICEADDED:
            pad = self._module.Controller(event.device_index)
            # Not by the index, which another one gets when one is unplugged.
            self._controllers[pad.as_joystick().get_instance_id()] = pad
        elif event.type == pygame.CONTROLLERDEVICEREMOVED:
            self._controllers.pop(which, None)
            self.release()
        elif event.type in (pygame.CONTROLLERBUTTONDOWN, pygame.CONTROLLERBUTTONUP):
            name = self._buttons.get(event.button)
            if name is not None:
                self._press(which, name, event.type == pygame.CONTROLLERBUTTONDOWN)
        elif event.type == pygame.CONTROLLERAXISMOTION:
            name = self._axes.get(event.axis)
            if name is not None:
                self._move(which, name, max(-1.0, event.value / 32767))
        else:
            return False
        return True

    def release(self) -> None:
        """Let go of everything, e.g. when a gamepad is unplugged."""
        self._tilts.clear()
        self._pressed.clear()
        self._session.release_all()

    def _press(self, which: int, name: str, down: bool) -> None:
        key = self._plan.buttons.get(name)
        if key is None or down == ((which, name) in self._pressed):
            return
        if down:
            self._pressed.add((which, name))
            self._session.press(key)
        else:
            self._pressed.discard((which, name))
            if not any(self._plan.buttons.get(other) == key for _, other in self._pressed):
                self._session.release(key)

    def _move(self, which: int, name: str, value: float) -> None:
        size = max(0.0, (abs(value) - _DEAD) / (1 - _DEAD))
        value = round(size / _SPACING) * _SPACING * (1 if value > 0 else -1)
        if name.endswith("y"):  # SDL counts downwards
            value = -value
        tilts = self._tilts.setdefault(name, {})
        if tilts.get(which, 0.0) == value:
            return
        tilts[which] = value
        if name in self._plan.axes:
            # One that rests does not hold back another.
            self._session.tilt(self._plan.axes[name], max(tilts.values(), key=abs))
        elif name in ("lt", "rt"):
            self._press(which, name, value > _CROSS)
        elif name in ("leftx", "lefty"):
            low, high = ("dpleft", "dpright") if name == "leftx" else ("dpdown", "dpup")
            self._press(which, low, value < -_CROSS)
            self._press(which, high, value > _CROSS)
