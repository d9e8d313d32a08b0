"""A person, a window, a game."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import gymnasium

from nfd_env.files import check_writable
from nfd_env.play.commands import Chosen, PlayConfig
from nfd_env.play.engine import Engine, Shown
from nfd_env.play.game import EnvGame, Game, shape_of_both
from nfd_env.play.keys import Keymap
from nfd_env.play.recording import display_size
from nfd_env.play.session import SPEEDS, ControlError, Session, agent_for, sampling_choices
from nfd_env.play.window.display import import_pygame, open_display
from nfd_env.play.window.files import Files
from nfd_env.play.window.gamepad import Gamepads
from nfd_env.play.window.hud import BAR, Hud
from nfd_env.sources.keys import key_name
from nfd_env.stopping import stopping

_NARROWEST = 640  # pixels: in fewer the numbers of the bar stand so close that two look like one


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
        trust: bool = False,
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
            agent: whom to hand over to, see ``nfd_env.players.frames.FramePlayer``.
            trust: see there.
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
        # Foreign code may bear one thread only.
        self._threaded = not isinstance(game, gymnasium.Env | EnvGame)
        if isinstance(game, gymnasium.Env):
            keymap = Keymap.from_env(game, keys_to_action, noop)
            source = source or {"env_id": game.spec.id if game.spec else "", "frames": "render"}
            self.game: Game = EnvGame(game, keymap, fps)
        else:
            self.game = game
        self.session = Session(
            self.game.keymap,
            self.game.default_sampling,
            self.game.steps_of,
            agent=agent_for(self.game, agent, trust),
            drafts=self._threaded,
            views=self.game.views,
        )
        self.engine = Engine(self.game)
        self._seed, self._scale = seed, scale
        self._record, self._save = record, save
        self._on_shown = on_shown
        self._shown: Shown | None = None
        self._drawn = 0
        self._running = False
        self._controls = self._control_keys()
        self._open()
        self._files = Files(self.game, self.session, source or {}, save, self._hud.say)
        self._gamepads = Gamepads(self._pygame, self.game.keymap.gamepad(), self.session)

    def run(self, max_frames: int | None = None) -> int:
        """Play until the window is closed, or ``max_frames`` pictures were shown.

        Returns:
            How many pictures were shown.

        Raises:
            Exception: whatever the game itself raised.
            KeyboardInterrupt, SystemExit: when INT, TERM or HUP has ended it; the recordings are
                finished first.
        """
        pygame = self._pygame
        self._running = True
        with stopping() as stop, closing(self):
            # What was asked for from the start.
            if self._save is not None:
                self._files.start_saving()
            if self._record is not None:
                self._files.start_film(Path(self._record).expanduser())
            player = self.engine.join(self.session, self._take, self._seed)
            assert player is not None
            if self._threaded:
                self.engine.start()
            while self._running and not stop.asked:
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
        return self._drawn

    def stop(self) -> None:
        """Let ``run`` return after the current picture."""
        self._running = False

    def close(self) -> None:
        """Finish the recordings and close the window."""
        self.engine.close()
        self._files.stop_saving()
        self._files.stop_film()
        self._pygame.display.quit()
        self._pygame.quit()

    def _open(self) -> None:
        pygame, game = self._pygame, self.game
        open_display()
        pygame.font.init()
        height = round(480 * (self._scale or 1.0))
        pixelated = game.display == "pixelated"
        shapes = [game.frame_shape]
        if "split" in game.views:  # which has other whole multiples
            shapes.append(shape_of_both(game.frame_shape))
        sizes = [display_size(s, game.display_aspect, height, pixelated) for s in shapes]
        width, height = map(max, zip(*sizes, strict=True))
        if self._scale is None:
            desktop = pygame.display.get_desktop_sizes()[0]
            shrink = min(1.0, 0.85 * desktop[0] / width, 0.8 * desktop[1] / (height + BAR))
            width, height = round(width * shrink), round(height * shrink)
        window = pygame.display.set_mode((max(width, _NARROWEST), height + BAR), pygame.RESIZABLE)
        pygame.display.set_caption(f"{game.name} - nfd play (F1: help)")
        self._hud = Hud(pygame, window, game)

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
            ("f11", ("v",), self._toggle_film),
            ("f12", ("k",), lambda: self._files.toggle_saving()),
            ("tab", (), lambda: control("view")),
            ("", ("j",), lambda: control("speculation")),
            ("", ("b",), lambda: self._files.keep_trail()),
            ("backspace", ("m",), lambda: control("teacher")),
            ("escape", (), self.stop),
        ]
        return {
            key: do
            for function_key, letters, do in actions
            for key in (function_key, *letters)
            if key and key not in self.game.keymap.keys
        }

    def _take(self, shown: Shown) -> None:
        """Receive a picture; on the engine's thread, so that a film misses none."""
        if not (self.session.paused and shown.seq == 0):
            self._files.add(shown.frame)
        self._shown = shown

    def _event(self, event: Any) -> None:
        pygame = self._pygame
        if event.type == pygame.QUIT:
            self.stop()
        elif self._gamepads.event(event):
            pass
        elif event.type in (pygame.KEYDOWN, pygame.KEYUP):
            key = key_name(pygame.key.name(event.key))
            if event.type == pygame.KEYUP:
                self.session.release(key)
            elif key in self._controls:
                self._controls[key]()
            else:
                self.session.press(key)
        elif event.type == pygame.WINDOWFOCUSLOST:
            self._gamepads.release()
        elif event.type in (pygame.VIDEORESIZE, pygame.WINDOWEXPOSED) and self._shown is not None:
            self._draw(self._shown)

    def _control(self, name: str, value: Any = None) -> None:
        try:
            self.session.control(name, value)
        except ControlError as error:
            self._hud.say(str(error))
        self.engine.wake()

    def _change_speed(self, direction: int) -> None:
        place = SPEEDS.index(self.session.speed) + direction
        self._control("speed", SPEEDS[min(max(place, 0), len(SPEEDS) - 1)])

    def _change_sampling(self) -> None:
        choices = sampling_choices(self.game) or [1]
        now = self.session.sampling.steps if self.session.sampling else 0
        self._control("sampling_steps", next((c for c in choices if c > now), choices[0]))

    def _toggle_help(self) -> None:
        self._hud.help = not self._hud.help
        if self._shown is not None:
            self._draw(self._shown)

    def _toggle_film(self) -> None:
        self._files.toggle_film(None if self._shown is None else self._shown.frame)

    def _draw(self, shown: Shown) -> None:
        latency = self.session.latencies.percentile(50)
        self._hud.draw(shown, latency, self._files.filming, self._files.saving)


def play(settings: PlayConfig, on_shown: Callable[[Shown], None] | None = None) -> int:
    """Play a learned world, or the real game of a game file, in a window, at its native rate.

    Args:
        settings: what and how.
        on_shown: called with every picture that the window shows.

    Returns:
        How many pictures were shown.

    Raises:
        WindowError: when pygame is missing or there is no display.
        CheckpointError: when the world cannot be loaded.
        DeviceError: when the device is not there.
        ValueError: when an argument cannot be used.
        FolderError: when a film or recordings cannot be written.
    """
    import_pygame()
    from nfd_env import config
    from nfd_env.play.twin import TwinSlots
    from nfd_env.worlds.hub import is_address
    from nfd_env.worlds.load import find_world, make_real, shipped_worlds

    world, sampling = settings.world or shipped_worlds()[0], settings.sampling()
    real = not is_address(world) and Path(world).suffix.lower() in (".yaml", ".yml")
    # What fails fast comes before the world is loaded.
    if real and sampling | {"device": "auto"} != Chosen().sampling():
        raise ValueError(
            f"{world} is a real game: sampling_steps, speculative_frames, dynamics and drift are "
            "of learned worlds"
        )
    if not real:
        find_world(world)
    check_writable(settings.film)
    check_writable(settings.folder, folders=True)
    open_display()
    with ExitStack() as stack:
        if real:
            game: Game = EnvGame.from_file(world, settings.max_episode_steps)
        else:
            game = TwinSlots(
                lambda: make_real(world, trust=settings.trust),
                world,
                max_episode_steps=settings.max_episode_steps,
                **sampling,
            )
        stack.callback(game.close)
        player = KeyboardPlayer(
            game,
            scale=settings.scale,
            seed=settings.seed,
            agent=settings.agent,
            trust=settings.trust,
            record=settings.film,
            save=settings.folder,
            source=config.to_dict(game.source),
            on_shown=on_shown,
        )
        return player.run(settings.max_frames)
