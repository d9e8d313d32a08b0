"""What the window shows: the picture, the bar below it, banners and the help."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from nfd_env.play.engine import Shown
from nfd_env.play.game import Game

BAR = 74  # pixels of the HUD below the picture, before scaling
_DRIFT = 4  # pixels of height of the thin bar
_WIDE = 700  # pixels of a window whose bar has room for large numbers
# The longest that usually stands in the bar's cells.
_USUAL = "down right", "+0.00", "1234.5", "1234", "35.0", "123 ms", "18", "100%", "100%"
_GROUND, _LINE, _TEXT, _DIM = (13, 15, 20), (38, 43, 54), (232, 236, 243), (128, 138, 156)
_ACCENT, _WARN, _LIVE = (110, 168, 255), (255, 184, 77), (255, 92, 92)

CONTROLS = (
    ("F1", "this help"),
    ("F2  P", "pause"),
    ("F3  .", "single step"),
    ("F4  R", "reset: next episode"),
    ("F5  N", "new seed"),
    ("F6 F7  - +", "slower, faster"),
    ("F8  T", "sampling steps"),
    ("F9  G", "generate ahead on / off"),
    ("F10 O", "hand over to the agent"),
    ("F11 V", "record an MP4"),
    ("F12 K", "save the play for nfd train"),
    ("Tab", "dream / real game / both"),
    ("J", "speculation: frames drawn jointly"),
    ("B", "keep what led here (--drift)"),
    ("Bksp M", "student / teacher"),
    ("Esc", "quit"),
)


class Hud:
    """Draws into a pygame window."""

    def __init__(self, pygame: Any, window: Any, game: Game) -> None:
        """Draw ``game`` into ``window``."""
        self._pygame, self._window, self._game = pygame, window, game
        self._fonts = {size: pygame.font.Font(None, size) for size in (18, 22, 26)}
        self._notice, self._notice_until = "", 0.0
        self.help = False

    def say(self, text: str) -> None:
        """Show a line over the picture for some seconds."""
        self._notice, self._notice_until = text, time.monotonic() + 4

    def draw(
        self,
        shown: Shown,
        latency: float | None = None,
        filming: bool = False,
        saving: bool = False,
    ) -> None:
        """Draw everything.

        Args:
            shown: the picture and its numbers.
            latency: seconds from key to picture.
            filming: whether an MP4 is being recorded.
            saving: whether the play is appended to a data set.
        """
        pygame, window, hud = self._pygame, self._window, shown.hud
        width, height = window.get_size()
        room = max(1, height - BAR)
        window.fill(_GROUND)
        self._draw_picture(shown.frame, width, room)
        self._draw_bar(hud, width, height, latency, filming, saving)
        if hud["over"]:
            text = f"return {hud['return']:g} in {hud['step']} steps - any key goes on"
            self._banner("Episode over", text, width)
        elif hud["paused"]:
            self._banner("Paused", "P goes on, . takes one step", width)
        if self.help:
            self._draw_help(width, room)
        notice = self._notice if time.monotonic() < self._notice_until else hud["notice"]
        if notice:
            text = self._fonts[18].render(notice, True, _TEXT)
            box = text.get_rect(midbottom=(width // 2, room - 10)).inflate(20, 12)
            pygame.draw.rect(window, _LINE, box, border_radius=8)
            window.blit(text, text.get_rect(center=box.center))
        pygame.display.flip()

    def _draw_picture(self, frame: np.ndarray, width: int, room: int) -> None:
        pygame = self._pygame
        picture = pygame.image.frombuffer(
            np.ascontiguousarray(frame).tobytes(), frame.shape[1::-1], "RGB"
        )
        pixelated = self._game.display == "pixelated"
        size = fit(frame.shape, self._game.display_aspect, width, room, pixelated)
        enlarge = pygame.transform.scale if pixelated else pygame.transform.smoothscale
        self._window.blit(enlarge(picture, size), ((width - size[0]) // 2, (room - size[1]) // 2))

    def _draw_bar(
        self,
        hud: dict[str, Any],
        width: int,
        height: int,
        latency: float | None,
        filming: bool,
        saving: bool,
    ) -> None:
        pygame, window = self._pygame, self._window
        top = height - BAR
        pygame.draw.line(window, _LINE, (0, top), (width, top))
        drift = hud["drift"]
        if drift is not None:  # red from the middle on
            colour = _LIVE if drift > 1 else _ACCENT
            window.fill(colour, (0, top, round(width * min(drift / 2, 1)), _DRIFT))
            window.fill(_TEXT, (width // 2, top, 1, _DRIFT))
        cells = [
            ("ACTION", hud["action"] or "-"),
            ("REWARD", f"{hud['reward']:+.2f}"),
            ("RETURN", f"{hud['return']:g}"),
            ("STEP", str(hud["step"])),
            ("FPS", f"{hud['fps']:.1f}"),
            ("INPUT", "-" if latency is None else f"{1000 * latency:.0f} ms"),
        ]
        if hud["sampling_steps"] is not None:
            cells.append(("SAMPLING", str(hud["sampling_steps"])))
            cells.append(("AHEAD", _share(hud["lookahead"], hud["guessed"])))
            cells.append(("ACCEPTED", _share(hud["speculation"], hud["acceptance"])))
        labels = [self._fonts[18].render(name, True, _DIM) for name, _ in cells]
        values = self._fonts[26 if width >= _WIDE else 22]
        # What a cell has room for, whatever is in it now: cells that move are hard to read.
        sizes = [
            max(label.get_width(), values.size(usual)[0])
            for label, usual in zip(labels, _USUAL, strict=False)
        ]
        keymap, small = self._game.keymap, self._fonts[18]
        tilted = {binding.label for binding in keymap.bindings} if keymap.axes else ()
        sizes[0] = max(sizes[0], *(small.size(f"{name} 100%")[0] for name in tilted), 0)
        spare = (width - 16 - sum(sizes)) / len(cells)
        x = 16.0
        for label, (_, value), size in zip(labels, cells, sizes, strict=True):
            window.blit(label, (x, top + 10))
            font, lines, cell = values, [value], size + spare
            if font.size(value)[0] > cell - 2 and "+" in value:  # an action of several axes
                parts = value.split("+")
                half = (len(parts) + 1) // 2
                font, lines = small, ["+".join(parts[:half]), "+".join(parts[half:])]
            for number, line in enumerate(lines):
                words = font.render(line, True, _TEXT)
                place = x, top + 25 + (13 * number if len(lines) > 1 else 0)
                window.blit(words, place, (0, 0, cell - 2, words.get_height()))
            x += cell
        apart = "" if hud["apart"] is None else f", {hud['apart']} dB apart"
        marks = [
            ("DRIFT, B keeps it", _LIVE, (drift or 0) > 1),
            ("REC", _LIVE, filming),
            ("SAVING", _WARN, saving),
            ("REAL GAME", _LIVE, hud["view"] == "real"),
            (f"REAL AND DREAM{apart}", _LIVE, hud["view"] == "split"),
            ("AGENT PLAYS", _ACCENT, hud["agent"]),
            ("TEACHER", _WARN, hud["teacher"]),
            (f"x{hud['speed']:g}", _DIM, hud["speed"] != 1.0),
        ]
        hint = self._fonts[18].render("F1 help", True, _DIM)
        x, most = 16.0, width - hint.get_width() - 16
        window.blit(hint, (most, top + 53))
        seed = f"seed {hud['seed']}  episode {hud['episode']}"
        for text, colour, on in [*marks, (seed, _DIM, True)]:
            if on:
                surface = self._fonts[18].render(text, True, colour)
                if x + surface.get_width() > most - 10:  # the first ones matter most
                    break
                window.blit(surface, (x, top + 53))
                x += surface.get_width() + 14

    def _banner(self, title: str, text: str, width: int) -> None:
        """A line at the top: the picture is what a person has stopped to look at."""
        head, rest = (
            self._fonts[26].render(title, True, _TEXT),
            self._fonts[22].render(text, True, _DIM),
        )
        shade = self._pygame.Surface((width, 38), self._pygame.SRCALPHA)
        shade.fill((8, 10, 14, 190))
        self._window.blit(shade, (0, 0))
        x = (width - head.get_width() - rest.get_width() - 16) // 2
        self._window.blit(head, (x, 11))
        self._window.blit(rest, (x + head.get_width() + 16, 13))

    def _draw_help(self, width: int, room: int) -> None:
        pygame = self._pygame
        shade = pygame.Surface((width, room), pygame.SRCALPHA)
        shade.fill((8, 10, 14, 225))
        self._window.blit(shade, (0, 0))
        keymap = self._game.keymap
        own: list[tuple[str, str]] = []
        for label in dict.fromkeys(binding.label for binding in keymap.bindings):
            keys = ["+".join(sorted(b.keys)) for b in keymap.bindings if b.label == label]
            # Of the many ways to hold two keys together one tells enough.
            own.append(("  ".join(keys if "+" not in keys[0] else keys[:1]), label))
        x = 30
        for column, rows in enumerate((own, list(CONTROLS))):
            y = 24
            line = min(24, max(14, (room - 40) // (max(len(own), len(CONTROLS)) + 1)))
            title = ("Play", "Controls")[column]
            self._window.blit(self._fonts[26].render(title, True, _ACCENT), (x, y))
            meant = x + 16 + max((self._fonts[22].size(keys)[0] for keys, _ in rows), default=0)
            for keys, meaning in rows:
                y += line
                self._window.blit(self._fonts[22].render(keys, True, _TEXT), (x, y + 8))
                self._window.blit(self._fonts[22].render(meaning, True, _DIM), (meant, y + 8))
            widest = max((self._fonts[22].size(meaning)[0] for _, meaning in rows), default=0)
            x = max(width // 3, meant + widest + 24)


def fit(
    frame_shape: tuple[int, ...], aspect: float, width: int, height: int, pixelated: bool = False
) -> tuple[int, int]:
    """The largest (width, height) of a picture within the given one.

    Args:
        frame_shape: (H, W, 3).
        aspect: width / height as shown; 0 for square pixels.
        width: most.
        height: most.
        pixelated: every pixel is a whole number of rows high, and of columns wide if pixels are
            square; if there is room for that.
    """
    ratio = aspect or frame_shape[1] / frame_shape[0]
    wide = max(1, min(width, round(height * ratio)))
    high = max(1, round(wide / ratio))
    times = high // frame_shape[0]
    if pixelated and times >= 1:
        high = times * frame_shape[0]
        wide = times * frame_shape[1] if not aspect else round(high * ratio)
    return wide, high


def _share(on: bool, share: float | None) -> str:
    return "off" if not on else "-" if share is None else f"{share:.0%}"
