"""The keyboard window (pygame-ce): play a learned world, or any Gymnasium env with a keymap."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from nfd_env.play.agents import load_agent
from nfd_env.play.engine import Engine, Shown
from nfd_env.play.game import EnvGame, Game
from nfd_env.play.keys import Keymap, key_name
from nfd_env.play.session import SPEEDS, ControlError, Session, sampling_choices

if TYPE_CHECKING:
    from nfd_env.play.recording import PlayRecorder, VideoFile

_BAR = 74  # pixels of the HUD below the picture, before scaling
_GROUND, _LINE, _TEXT, _DIM = (13, 15, 20), (38, 43, 54), (232, 236, 243), (128, 138, 156)
_ACCENT, _WARN, _LIVE = (110, 168, 255), (255, 184, 77), (255, 92, 92)

_HELP = (
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
    ("Tab J", "speculation: frames drawn jointly"),
    ("Bksp M", "student / teacher"),
    ("Esc", "quit"),
)


class WindowError(RuntimeError):
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
        WindowError: when pygame is missing or there is no display.
    """
    pygame = import_pygame()
    try:
        pygame.display.init()
    except pygame.error as error:
        raise WindowError(
            f"no window can be opened here ({error}). Without a screen use `nfd serve` and a "
            "browser; in tests set SDL_VIDEODRIVER=dummy"
        ) from None


class KeyboardPlayer:
    """A window in which a person plays a game with the keyboard.

    Give it any Gymnasium environment made with ``render_mode="rgb_array"`` and a keymap::

        env = gymnasium.make("CarRacing-v3", render_mode="rgb_array", continuous=False)
        KeyboardPlayer(env, keys_to_action={"d": 1, "a": 2, "w": 3, "s": 4}).run()

    or, as ``play`` does, a learned world, whose next frames are then generated ahead.
    """

    def __init__(
        self,
        game: gymnasium.Env | Game,
        keys_to_action: Mapping[Any, Any] | None = None,
        *,
        noop: Any = None,
        fps: float | None = None,
        scale: float | None = None,
        seed: int | None = None,
        agent: Any = None,
        record: str | Path | None = None,
        save: str | Path | None = None,
        source: dict[str, Any] | None = None,
        on_shown: Callable[[Shown], None] | None = None,
    ) -> None:
        """Open the window; ``run`` plays.

        Args:
            game: a Gymnasium environment, or a ``Game``.
            keys_to_action: Gymnasium's format; None for the environment's own
                ``get_keys_to_action``.
            noop: the action without any key; None for the space's resting action.
            fps: steps a second; None for the environment's own rate.
            scale: size of the window, 1 for about 480 pixels of height; None to fit.
            seed: of the first episode; None for a random one.
            agent: whom to hand over to, see ``load_agent``.
            record: an MP4 file that is written from the start.
            save: folder of a data set that the play is appended to from the start.
            source: source section of that data set, plain values.
            on_shown: called with every picture that the window shows.

        Raises:
            WindowError: when pygame is missing or there is no display.
            KeymapError: when the environment has no keymap.
            ValueError: when the agent cannot be loaded.
            RecordingError: when ``save`` holds recordings of something else.
        """
        self._pygame = import_pygame()
        self._threaded = not isinstance(game, gymnasium.Env)
        if isinstance(game, gymnasium.Env):
            keymap = Keymap.from_env(game, keys_to_action, noop)
            source = source or {"env_id": game.spec.id if game.spec else "", "frames": "render"}
            self.game: Game = EnvGame(game, keymap, fps)
        else:
            self.game = game
        space = self.game.keymap.space
        self.session = Session(
            self.game.keymap,
            self.game.default_sampling,
            self.game.steps_of,
            agent=None if agent is None else load_agent(agent, space),
            drafts=self._threaded,
        )
        self.engine = Engine(self.game)
        self._seed, self._scale, self._source = seed, scale, source or {}
        self._record = record
        self._on_shown = on_shown
        self._shown: Shown | None = None
        self._drawn = 0
        self._running = False
        self._help = False
        self._notice, self._notice_until = "", 0.0
        self._video: VideoFile | None = None
        self._video_path = ""
        self._recorder: PlayRecorder | None = None
        self._save = save
        self._controls = self._control_keys()
        self._open()

    def run(self, max_frames: int | None = None) -> int:
        """Play until the window is closed, or ``max_frames`` pictures were shown.

        Returns:
            How many pictures were shown.

        Raises:
            Exception: whatever the game itself raised.
        """
        pygame = self._pygame
        self._start_files()
        player = self.engine.join(self.session, self._take, self._seed)
        assert player is not None
        self._running = True
        try:
            if self._threaded:
                self.engine.start()
            while self._running:
                for event in pygame.event.get():
                    self._event(event)
                wait = 0.002 if self._threaded else min(self.engine.poll(), 0.002)
                if self.engine.error is not None:
                    raise self.engine.error
                shown = self._shown
                if shown is not None and shown.number != self._drawn:
                    self._draw(shown)
                    self._drawn = shown.number
                    if self._on_shown is not None:
                        self._on_shown(shown)
                    if max_frames is not None and shown.number >= max_frames:
                        break
                elif wait > 0:
                    time.sleep(wait)
        finally:
            self.close()
        return self._drawn

    def stop(self) -> None:
        """Let ``run`` return after the current picture."""
        self._running = False

    def close(self) -> None:
        """Finish the recordings and close the window."""
        self.engine.close()
        self._stop_video()
        self._stop_saving()
        self._pygame.display.quit()
        self._pygame.quit()

    def _open(self) -> None:
        pygame = self._pygame
        open_display()
        pygame.font.init()
        from nfd_env.play.recording import display_size

        frame_shape = self._frame_shape = self.game.frame_shape
        height = 480 * (self._scale or 1.0)
        width, height = display_size(frame_shape, self.game.display_aspect, round(height))
        if self._scale is None:
            desktop = pygame.display.get_desktop_sizes()[0]
            shrink = min(1.0, 0.85 * desktop[0] / width, 0.8 * desktop[1] / (height + _BAR))
            width, height = round(width * shrink), round(height * shrink)
        self._window = pygame.display.set_mode((max(width, 560), height + _BAR), pygame.RESIZABLE)
        pygame.display.set_caption(f"{self.game.name} - nfd play (F1: help)")
        self._fonts = {size: pygame.font.Font(None, size) for size in (18, 22, 26, 44)}

    def _control_keys(self) -> dict[str, Callable[[], None]]:
        """Function keys, and letters that the game itself does not use."""
        control = self._control
        actions: list[tuple[str, tuple[str, ...], Callable[[], None]]] = [
            ("f1", ("h",), self._toggle_help),
            ("f2", ("p",), lambda: control("pause")),
            ("f3", (".",), lambda: control("step")),
            ("f4", ("r",), lambda: control("reset")),
            ("f5", ("n",), lambda: control("seed")),
            ("f6", ("-",), lambda: self._change_speed(-1)),
            ("f7", ("+", "="), lambda: self._change_speed(1)),
            ("f8", ("t",), self._change_sampling),
            ("f9", ("g",), lambda: control("lookahead")),
            ("f10", ("o",), lambda: control("agent")),
            ("f11", ("v",), self._toggle_video),
            ("f12", ("k",), self._toggle_saving),
            ("tab", ("j",), lambda: control("speculation")),
            ("backspace", ("m",), lambda: control("teacher")),
            ("escape", (), self.stop),
        ]
        return {
            key: do
            for function_key, letters, do in actions
            for key in (function_key, *letters)
            if key not in self.game.keymap.keys
        }

    def _take(self, shown: Shown) -> None:
        """Receive a picture; on the engine's thread, so that a film misses none."""
        if self._video is not None and not (self.session.paused and shown.seq == 0):
            self._video.add(shown.frame)
        self._shown = shown

    def _event(self, event: Any) -> None:
        pygame = self._pygame
        if event.type == pygame.QUIT:
            self.stop()
        elif event.type in (pygame.KEYDOWN, pygame.KEYUP):
            key = key_name(pygame.key.name(event.key))
            if event.type == pygame.KEYUP:
                self.session.release(key)
            elif key in self._controls:
                self._controls[key]()
            else:
                self.session.press(key)
        elif event.type == pygame.WINDOWFOCUSLOST:
            self.session.release_all()
        elif event.type in (pygame.VIDEORESIZE, pygame.WINDOWEXPOSED) and self._shown is not None:
            self._draw(self._shown)

    def _control(self, name: str, value: Any = None) -> None:
        try:
            self.session.control(name, value)
        except ControlError as error:
            self._say(str(error))
        self.engine.wake()

    def _change_speed(self, direction: int) -> None:
        place = SPEEDS.index(self.session.speed) + direction
        self._control("speed", SPEEDS[min(max(place, 0), len(SPEEDS) - 1)])

    def _change_sampling(self) -> None:
        choices = sampling_choices(self.game) or [1]
        now = self.session.sampling.steps if self.session.sampling else 0
        self._control("sampling_steps", next((c for c in choices if c > now), choices[0]))

    def _toggle_help(self) -> None:
        self._help = not self._help
        if self._shown is not None:
            self._draw(self._shown)

    def _say(self, text: str) -> None:
        self._notice, self._notice_until = text, time.monotonic() + 4

    def _start_files(self) -> None:
        """What was asked for from the start."""
        if self._record is not None:
            self._start_video(Path(self._record))
        if self._save is not None:
            self._start_saving(Path(self._save))

    def _toggle_video(self) -> None:
        if self._video is not None:
            self._stop_video()
        else:
            self._start_video(Path(f"nfd-play-{time.strftime('%Y%m%d-%H%M%S')}.mp4"))

    def _start_video(self, path: Path) -> None:
        from nfd_env.play.recording import VideoFile, display_size

        size = display_size(self._frame_shape, self.game.display_aspect, 288)
        try:
            self._video = VideoFile(path, self.game.fps, size)
        except OSError as error:
            if not self._running:
                raise
            self._say(f"cannot record: {error}")
            return
        self._video_path = str(path)
        if self._shown is not None:
            self._video.add(self._shown.frame)
        self._say(f"recording {path}")

    def _stop_video(self) -> None:
        video, self._video = self._video, None
        if video is not None:
            try:
                video.close()
                self._say(f"wrote {self._video_path}")
            except OSError as error:
                self._say(str(error))
                print(error, file=sys.stderr)

    def _toggle_saving(self) -> None:
        if self._recorder is not None:
            self._stop_saving()
        else:
            self._start_saving(Path(self._save or f"recordings-{self.game.name}"))

    def _start_saving(self, folder: Path) -> None:
        from nfd_env.play.recording import PlayRecorder

        try:
            recorder = PlayRecorder(
                folder, self._frame_shape, self.game.keymap.space, self._source, self.game.fps
            )
        except (ValueError, OSError) as error:
            if not self._running:
                raise
            self._say(f"cannot save: {error}")
            return
        if self.session.frame is not None and not self.session.over:
            recorder.began(self.session.frame, self.session.seed)
        self._recorder = self.session.recorder = recorder
        self._say(f"saving the play in {folder}")

    def _stop_saving(self) -> None:
        recorder, self._recorder, self.session.recorder = self._recorder, None, None
        if recorder is not None:
            recorder.close()
            self._say(f"{recorder.saved} episodes saved in {recorder.folder}")

    def _draw(self, shown: Shown) -> None:
        pygame, window = self._pygame, self._window
        width, height = window.get_size()
        window.fill(_GROUND)
        picture = pygame.image.frombuffer(
            np.ascontiguousarray(shown.frame).tobytes(), shown.frame.shape[1::-1], "RGB"
        )
        aspect = self.game.display_aspect or shown.frame.shape[1] / shown.frame.shape[0]
        room = max(1, height - _BAR)
        shown_width = max(1, min(width, round(room * aspect)))
        shown_height = max(1, round(shown_width / aspect))
        picture = pygame.transform.smoothscale(picture, (shown_width, shown_height))
        window.blit(picture, ((width - shown_width) // 2, (room - shown_height) // 2))
        self._draw_bar(shown.hud, width, height)
        if shown.hud["over"]:
            self._banner(
                "Episode over",
                f"return {shown.hud['return']:g} in {shown.hud['step']} steps - any key goes on",
                width,
                room,
            )
        elif shown.hud["paused"]:
            self._banner("Paused", "P goes on, . takes one step", width, room)
        if self._help:
            self._draw_help(width, room)
        if time.monotonic() < self._notice_until:
            text = self._fonts[18].render(self._notice, True, _TEXT)
            box = text.get_rect(midbottom=(width // 2, room - 10)).inflate(20, 12)
            pygame.draw.rect(window, _LINE, box, border_radius=8)
            window.blit(text, text.get_rect(center=box.center))
        pygame.display.flip()

    def _draw_bar(self, hud: dict[str, Any], width: int, height: int) -> None:
        pygame, window = self._pygame, self._window
        top = height - _BAR
        pygame.draw.line(window, _LINE, (0, top), (width, top))
        latency = self.session.latencies.percentile(50)
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
        cell = (width - 24) / len(cells)
        for i, (name, value) in enumerate(cells):
            x = 16 + i * cell
            window.blit(self._fonts[18].render(name, True, _DIM), (x, top + 10))
            window.blit(self._fonts[26].render(value, True, _TEXT), (x, top + 25))
        marks = [
            (f"x{hud['speed']:g}", _DIM, hud["speed"] != 1.0),
            ("AGENT PLAYS", _ACCENT, hud["agent"]),
            ("TEACHER", _WARN, hud["teacher"]),
            ("REC", _LIVE, self._video is not None),
            ("SAVING", _WARN, self._recorder is not None),
        ]
        x = 16.0
        seed = f"seed {hud['seed']}  episode {hud['episode']}"
        for text, colour, on in [*marks, (seed, _DIM, True)]:
            if on:
                surface = self._fonts[18].render(text, True, colour)
                window.blit(surface, (x, top + 53))
                x += surface.get_width() + 18
        hint = self._fonts[18].render("F1 help", True, _DIM)
        window.blit(hint, (width - hint.get_width() - 16, top + 53))

    def _banner(self, title: str, text: str, width: int, room: int) -> None:
        pygame = self._pygame
        shade = pygame.Surface((width, 96), pygame.SRCALPHA)
        shade.fill((8, 10, 14, 190))
        self._window.blit(shade, (0, room // 2 - 48))
        for content, size, colour, offset in (
            (title, 44, _TEXT, -16),
            (text, 22, _DIM, 22),
        ):
            surface = self._fonts[size].render(content, True, colour)
            self._window.blit(surface, surface.get_rect(center=(width // 2, room // 2 + offset)))

    def _draw_help(self, width: int, room: int) -> None:
        pygame = self._pygame
        shade = pygame.Surface((width, room), pygame.SRCALPHA)
        shade.fill((8, 10, 14, 225))
        self._window.blit(shade, (0, 0))
        own = [("+".join(sorted(b.keys)), b.label) for b in self.game.keymap.bindings]
        columns = (own, list(_HELP))
        for column, rows in enumerate(columns):
            x, y = 30 + column * width // 3, 24
            line = min(24, max(14, (room - 40) // (max(map(len, columns)) + 1)))
            title = ("Play", "Controls")[column]
            self._window.blit(self._fonts[26].render(title, True, _ACCENT), (x, y))
            for keys, meaning in rows:
                y += line
                self._window.blit(self._fonts[22].render(keys, True, _TEXT), (x, y + 8))
                self._window.blit(self._fonts[22].render(meaning, True, _DIM), (x + 100, y + 8))


def _share(on: bool, share: float | None) -> str:
    return "off" if not on else "-" if share is None else f"{share:.0%}"


def play(
    world: str,
    *,
    device: str = "auto",
    seed: int | None = None,
    scale: float | None = None,
    sampling_steps: int | None = None,
    speculative_frames: int = 1,
    dynamics: str | None = None,
    record: str | Path | None = None,
    save: str | Path | None = None,
    agent: Any = None,
    max_episode_steps: int | None = None,
    max_frames: int | None = None,
    on_shown: Callable[[Shown], None] | None = None,
) -> int:
    """Play a learned world in a window, at its native rate.

    Args:
        world: a world folder, or the name of a shipped world.
        device: see ``nfd_env.devices.resolve_device``.
        seed: of the first episode; None for a random one.
        scale: size of the window, 1 for about 480 pixels of height; None to fit the screen.
        sampling_steps: denoising steps a frame; None for the world's default.
        speculative_frames: frames drawn jointly while the action is kept; with 1 a key can still
            switch to 2.
        dynamics: "student" or "teacher"; None for the world's default. A key switches.
        record: an MP4 file to write.
        save: folder of a data set to append the play to.
        agent: whom F10 hands over to, see ``nfd_env.play.agents.load_agent``.
        max_episode_steps: episodes are cut off there; None for the world's default.
        max_frames: stop after so many pictures.
        on_shown: called with every picture that the window shows.

    Returns:
        How many pictures were shown.

    Raises:
        WindowError: when pygame is missing or there is no display.
        CheckpointError: when the world cannot be loaded.
        DeviceError: when the device is not there.
        ValueError: when an argument cannot be used.
    """
    import_pygame()
    from nfd_env import config
    from nfd_env.play.slots import Slots
    from nfd_env.worlds.format import find_world

    # What fails fast comes before the world is loaded.
    find_world(world)
    open_display()
    slots = Slots(world, 1, device, sampling_steps, max_episode_steps, speculative_frames, dynamics)
    player = KeyboardPlayer(
        slots,
        scale=scale,
        seed=seed,
        agent=agent,
        record=record,
        save=save,
        source=config.to_dict(slots.spec.source),
        on_shown=on_shown,
    )
    return player.run(max_frames)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``nfd play``."""
    parser.add_argument("world", nargs="?", default="DoomTakeCover", help="name or folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, help="seed of the first episode")
    parser.add_argument("--scale", type=float, help="window size; 1 is about 480 pixels high")
    parser.add_argument("--sampling-steps", type=int, help="denoising steps a frame")
    parser.add_argument(
        "--speculative-frames",
        type=int,
        default=1,
        help="frames drawn jointly while the action is kept (default 1; a key can switch to 2)",
    )
    parser.add_argument("--dynamics", help="student or teacher, in a world that has both")
    parser.add_argument("--record", metavar="FILE.mp4", help="record an MP4")
    parser.add_argument("--save", metavar="FOLDER", help="append the play to a data set")
    parser.add_argument(
        "--agent", help="whom F10 hands over to: random, an SB3 .zip, or module:Class"
    )
    parser.add_argument("--max-episode-steps", type=int, help="cut episodes off there")
    parser.add_argument("--max-frames", type=int, help="stop after so many pictures")


def run(args: argparse.Namespace) -> int:
    """Run ``nfd play``; 0, or 2 after one message on stderr."""
    try:
        import_pygame()
    except WindowError as error:
        print(f"nfd play: {error}", file=sys.stderr)
        return 2
    from nfd_env.devices import DeviceError

    try:
        play(
            args.world,
            device=args.device,
            seed=args.seed,
            scale=args.scale,
            sampling_steps=args.sampling_steps,
            speculative_frames=args.speculative_frames,
            dynamics=args.dynamics,
            record=args.record,
            save=args.save,
            agent=args.agent,
            max_episode_steps=args.max_episode_steps,
            max_frames=args.max_frames,
        )
    except (WindowError, DeviceError, ValueError, OSError) as error:
        print(f"nfd play: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0
