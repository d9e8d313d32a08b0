import contextlib
import errno
import os
import subprocess
import sys
import types

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

pygame = pytest.importorskip("pygame")

from nfd_env import config  # noqa: E402
from nfd_env.cli import main as nfd  # noqa: E402
from nfd_env.data.shards import RecordedDataset  # noqa: E402
from nfd_env.envs.single_env import NFDEnv  # noqa: E402
from nfd_env.play import recorder  # noqa: E402
from nfd_env.play.commands import PlayConfig  # noqa: E402
from nfd_env.play.game import EnvGame  # noqa: E402
from nfd_env.play.keys import Keymap  # noqa: E402
from nfd_env.play.session import Session  # noqa: E402
from nfd_env.play.slots import Slots  # noqa: E402
from nfd_env.play.window import display, hud  # noqa: E402
from nfd_env.play.window import player as window  # noqa: E402
from nfd_env.play.window.gamepad import Gamepads  # noqa: E402
from nfd_env.recipe.game import load_game  # noqa: E402
from nfd_env.sources.source import SourceConfig, make_source  # noqa: E402
from tests.play.scroll_game import ScrollGame  # noqa: E402
from tests.tiny_world import make_tiny_world  # noqa: E402


@pytest.fixture(autouse=True)
def dummy(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("SDL_AUDIODRIVER", "dummy")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_tiny_world(tmp_path_factory.mktemp("world") / "tiny", hazard_bias=-30.0)


def post(kind, key=None):
    pygame.event.post(pygame.event.Event(kind, {} if key is None else {"key": key}))


def run(script, pictures, game=None, **kwargs):
    """Play with ``script``: picture number -> what to do then. Returns the pictures."""
    shown, waiting = [], dict(script)

    def on_shown(picture):
        shown.append(picture)
        for number in sorted(n for n in waiting if n <= picture.number):
            waiting.pop(number)(player)

    player = window.KeyboardPlayer(
        game or ScrollGame(1, fps=100), on_shown=on_shown, seed=1, **kwargs
    )
    player.run(pictures)
    return shown


def move(shown):
    """How far the stripes of the picture moved to the right, per step, at most."""
    blue = [int(p.frame[0, 0, 2]) for p in shown]
    return [(b - a + 128) % 256 - 128 for a, b in zip(blue, blue[1:], strict=False)]


def test_held_keys_move_the_view_and_the_loss_of_focus_releases_them():
    shown = run(
        {
            10: lambda _: post(pygame.KEYDOWN, pygame.K_LEFT),
            30: lambda _: post(pygame.WINDOWFOCUSLOST),
        },
        60,
    )
    moves = move(shown)
    # A slow machine may skip pictures, so one move can be that of several steps.
    turning = [i for i, m in enumerate(moves) if m]
    assert turning[0] >= 4 and len(turning) > 5
    assert all(m < 0 and m % 2 == 0 for m in moves[turning[0] : turning[-1]])
    assert turning[-1] < len(moves) - 10


def test_a_tap_counts_once():
    def tap(_):
        post(pygame.KEYDOWN, pygame.K_d)
        post(pygame.KEYUP, pygame.K_d)

    assert sum(move(run({5: tap}, 20))) == 2


def test_pause_step_and_quit():
    player_pictures, pressed, looks = [], [], []

    def on_shown(picture):
        player_pictures.append(picture)
        # A slow machine may skip a picture, the fifth one too.
        if picture.number >= 5 and not pressed:
            pressed.append(True)
            post(pygame.KEYDOWN, pygame.K_F2)
        elif picture.hud["paused"] and picture.hud["step"] < 12:
            post(pygame.KEYDOWN, pygame.K_PERIOD)
        elif picture.hud["paused"]:
            looks.append(pygame.surfarray.array3d(pygame.display.get_surface()))
            post(pygame.QUIT)

    window.KeyboardPlayer(ScrollGame(1, fps=100), on_shown=on_shown).run(500)
    assert 5 < len(player_pictures) and player_pictures[-1].hud["paused"]
    assert player_pictures[-1].hud["step"] < 100
    # Whoever pauses or steps wants to see the picture: its middle is as bright as it was.
    middle = looks[-1][200:-200, 80:-120]
    assert (middle.max((0, 1)) >= 200).any() and (middle[..., 1] > 50).all()


def test_play_draws_records_and_saves_what_train_reads(world, tmp_path):
    pictures = []

    def on_shown(picture):
        if not pictures and picture.number >= 15:
            pictures.append(pygame.surfarray.array3d(pygame.display.get_surface()))

    film, folder = tmp_path / "play.mp4", tmp_path / "recordings"
    settings = PlayConfig(
        str(world),
        device="cpu",
        seed=4,
        record=str(film),
        save=str(folder),
        agent="random",
        max_frames=30,
    )
    shown = window.play(settings, on_shown)
    assert shown >= 30
    assert pictures[0].std() > 5
    import av

    with av.open(str(film)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) >= 28
    (episode,) = RecordedDataset(folder)
    assert episode.length >= 28 and episode.policy == "person:dream" and episode.truncated[-1]
    # What was saved is what the model showed.
    env = NFDEnv(world, device="cpu")
    frame, _ = env.reset(seed=4)
    assert np.abs(frame.astype(int) - episode.frames[0]).max() <= 1
    frame = env.step(episode.actions[0])[0]
    assert np.abs(frame.astype(int) - episode.frames[1]).max() <= 1


def test_a_full_disk_ends_the_recording_not_the_play(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recorder, "_COMMIT_EVERY", 0.05)

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(player):
        assert player._files.saving
        monkeypatch.setattr(os, "fsync", full)

    def clear(player):
        assert not player._files.saving
        monkeypatch.undo()
        post(pygame.KEYDOWN, pygame.K_F12)  # once more

    shown = run({20: fill, 60: clear}, 100, save=tmp_path / "kept")
    assert len(shown) > 50
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said
    first, second = RecordedDataset(tmp_path / "kept")
    assert first.length < 60 and second.length > 10


GAME = """
name: Pole
source:
  env_id: CartPole-v1
  frames: render
  size: [40, 60]
  fps: 100
  display_aspect: 2.0
  action_names: [left, right]
max_episode_steps: 12
"""


def test_the_real_game_is_played_and_saved_before_there_is_a_world(tmp_path):
    file, folder = tmp_path / "pole.yaml", tmp_path / "kept"
    file.write_text(GAME)
    first = []
    # As a folder, record means the same as save.
    window.play(PlayConfig(str(file), record=str(folder), seed=3, max_frames=30), first.append)
    assert first[0].frame.shape == (40, 60, 3)
    recorded = RecordedDataset(folder)
    source = load_game(file).source
    assert recorded.spec.source == config.to_dict(source) and recorded.spec.fps == 100
    episode = recorded.episodes[0].load()
    assert len(episode) <= 12 and episode.terminated[-1] != episode.truncated[-1]
    env = make_source(source, render_mode="rgb_array")
    frames = [env.reset(seed=3)[0]] + [env.step(a)[0] for a in episode.actions]
    env.close()
    assert np.array_equal(episode.frames, frames)
    with pytest.raises(ValueError, match="are of learned worlds"):
        window.play(PlayConfig(str(file), sampling_steps=2))
    for wrong in ({"record": "play.mkv"}, {"record": ""}, {"record": "here", "save": "there"}):
        with pytest.raises(config.ConfigError, match=r"such as play\.mp4"):
            PlayConfig(str(file), **wrong)


class OneBuffer(gymnasium.Env):
    """Draws every frame over the one before."""

    action_space = spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}
    render_mode = "rgb_array"

    def reset(self, *, seed=None, options=None):
        self.buffer = np.zeros((8, 8, 3), np.uint8)
        return 0, {}

    def step(self, action):
        self.buffer += 1
        return 0, 0.0, False, False, {}

    def render(self):
        return self.buffer


@pytest.mark.parametrize("how", ["smooth", "pixelated"])
def test_the_real_game_of_a_file_is_enlarged_as_its_world_will_be(tmp_path, how):
    (tmp_path / "pole.yaml").write_text(GAME + f"export: {{display: {how}}}\n")
    with contextlib.closing(EnvGame.from_file(tmp_path / "pole.yaml")) as game:
        assert game.display == how


def test_frames_of_an_env_that_draws_over_its_own_are_copied(tmp_path):
    player = window.KeyboardPlayer(
        OneBuffer(), {"a": 0, "d": 1}, save=tmp_path, source={"env_id": "x"}
    )
    player.run(10)
    (episode,) = RecordedDataset(tmp_path)
    assert episode.load().frames[:, 0, 0, 0].tolist() == list(range(len(episode) + 1))


def test_a_film_that_cannot_be_written_is_said_before_the_play(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file/play.mp4", "/proc/play.mp4"):
        shown = []
        player = window.KeyboardPlayer(
            ScrollGame(1, fps=100), record=tmp_path / path, on_shown=shown.append
        )
        with pytest.raises(OSError, match=rf"{path} cannot be written: \w+"):
            player.run(5)
        assert not shown and not pygame.display.get_init()


def test_controls_reach_the_world(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = {
        2: lambda p: post(pygame.KEYDOWN, pygame.K_F8),
        4: lambda p: post(pygame.KEYDOWN, pygame.K_F10),
        6: lambda p: post(pygame.KEYDOWN, pygame.K_F9),
        8: lambda p: post(pygame.KEYDOWN, pygame.K_F1),
        10: lambda p: post(pygame.KEYDOWN, pygame.K_F5),
        12: lambda p: post(pygame.KEYDOWN, pygame.K_j),
        24: lambda p: post(pygame.KEYDOWN, pygame.K_b),
    }
    shown = run(script, 30, game=Slots(world, 1, "cpu", drift=True), agent=lambda frame: 2)
    last = shown[-1].hud
    assert last["sampling_steps"] == 4 and last["agent"] and not last["lookahead"]
    assert last["seed"] != 1 and last["action"] == "left"
    assert last["speculation"] and last["acceptance"] is not None and not last["teacher"]
    assert last["drift"] > 0
    (kept,) = tmp_path.glob("nfd-drift-*.npz")
    with np.load(kept) as trail:
        assert len(trail["frames"]) == len(trail["drift"]) > 10 and trail["red"] == 2
        assert (trail["drift"] > 0).all() and trail["actions"][-1] == 2


def test_any_gymnasium_env_with_a_keymap():
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    shown = []
    player = window.KeyboardPlayer(
        env, {"a": 0, "d": 1}, noop=0, fps=100, on_shown=shown.append, seed=3
    )
    player.run(15)
    assert shown[-1].frame.shape[2] == 3 and shown[5].hud["action"] == "a"


@pytest.mark.filterwarnings("ignore:.*matplotlib")
def test_gymnasiums_own_player_takes_our_env(world):
    from gymnasium.utils.play import play

    steps = []

    def callback(before, after, action, reward, terminated, truncated, info):
        steps.append(action)
        if len(steps) == 2:
            post(pygame.KEYDOWN, pygame.K_a)
        if len(steps) == 6:
            post(pygame.QUIT)

    play(NFDEnv(world, device="cpu", render_mode="rgb_array"), callback=callback, seed=1)
    assert steps[:2] == [0, 0] and 2 in steps


def test_no_display_is_one_clear_message(world, monkeypatch, capsys):
    monkeypatch.setenv("SDL_VIDEODRIVER", "x11")
    monkeypatch.delenv("DISPLAY", raising=False)
    assert nfd(["play", str(world), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("nfd: no window can be opened") and said.count("\n") == 1
    assert nfd(["play", "NoSuchWorld"]) == 1
    assert "unknown world 'NoSuchWorld'" in capsys.readouterr().err


def test_a_screen_that_nobody_sees_is_none(monkeypatch):
    """SDL falls back to its offscreen driver where there is no screen."""
    monkeypatch.delenv("SDL_VIDEODRIVER")
    for driver in ("offscreen", "dummy"):
        monkeypatch.setattr(pygame.display, "get_driver", lambda name=driver: name)
        monkeypatch.setattr(pygame.display, "init", lambda: None)
        with pytest.raises(display.WindowError, match="nfd serve"):
            display.open_display()
        monkeypatch.setenv("SDL_VIDEODRIVER", driver)
        display.open_display()  # asked for
        monkeypatch.delenv("SDL_VIDEODRIVER")


def test_a_missing_pygame_names_the_extra_at_once():
    code = (
        "import sys; sys.modules['pygame'] = None\n"
        "from nfd_env.play import PlayError, commands\n"
        "try: commands.play(commands.PlayConfig('x'))\n"
        "except PlayError as error: print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "nfd play needs pygame: pip install 'nfd-env[play]' False\n"


def test_pictures_of_pixels_are_enlarged_by_whole_numbers():
    assert hud.fit((64, 64, 3), 0.0, 1000, 500) == (500, 500)
    assert hud.fit((64, 64, 3), 0.0, 1000, 500, pixelated=True) == (448, 448)
    assert hud.fit((64, 64, 3), 0.0, 1000, 50, pixelated=True) == (50, 50)
    assert hud.fit((60, 80, 3), 1.0, 1000, 500, pixelated=True) == (480, 480)


def test_the_window_has_room_for_whole_multiples_of_both_views():
    game = ScrollGame(1)
    game.frame_shape, game.display_aspect = (64, 64, 3), 0.0
    game.display, game.views = "pixelated", ("dream", "real", "split")
    with contextlib.closing(window.KeyboardPlayer(game, scale=1)):
        width, height = pygame.display.get_surface().get_size()
    assert hud.fit((64, 64, 3), 0.0, width, height - hud.BAR, True) == (512, 512)
    assert hud.fit((130, 130, 3), 0.0, width, height - hud.BAR, True) == (520, 520)


CAR = spaces.Box(np.array([-1, 0, 0], np.float32), np.array([1, 1, 1], np.float32))


def test_a_gamepad_steers_accelerates_and_presses_keys():
    def pads(space, game):
        keymap = Keymap.from_source(game, space)
        session = Session(keymap)
        return Gamepads(pygame, keymap.gamepad(), session), session, keymap

    def chosen(session, keymap):
        return session.keys.consume(keymap).action

    pygame.init()
    event = pygame.event.Event
    pad, session, keymap = pads(CAR, SourceConfig(env_id="x"))
    for axis, value in (("LEFTX", -32768), ("TRIGGERRIGHT", 32767), ("LEFTY", 1000)):
        number = getattr(pygame, f"CONTROLLER_AXIS_{axis}")
        assert pad.event(event(pygame.CONTROLLERAXISMOTION, axis=number, value=value))
    assert chosen(session, keymap).tolist() == [-1, 1, 0]
    pad.release()
    assert chosen(session, keymap).tolist() == [0, 0, 0]
    names = ["noop", "right", "left", "fire"]
    pad, session, keymap = pads(spaces.Discrete(4), SourceConfig(env_id="x", action_names=names))
    move = {"axis": pygame.CONTROLLER_AXIS_LEFTX}
    pad.event(event(pygame.CONTROLLERAXISMOTION, value=-30000, **move))
    assert [chosen(session, keymap) for _ in range(2)] == [2, 2]
    pad.event(event(pygame.CONTROLLERAXISMOTION, value=0, **move))
    pad.event(event(pygame.CONTROLLERBUTTONDOWN, button=pygame.CONTROLLER_BUTTON_A))
    assert chosen(session, keymap) == 3
    pad.event(event(pygame.CONTROLLERBUTTONUP, button=pygame.CONTROLLER_BUTTON_A))
    assert chosen(session, keymap) == 0
    assert not pad.event(event(pygame.KEYDOWN, key=pygame.K_a))
    # Two of them: one that rests, or lets go, holds nothing back that the other one presses.
    pad, session, keymap = pads(CAR, SourceConfig(env_id="x"))
    for which, value in ((7, -32768), (9, 4000), (9, 0)):
        pad.event(event(pygame.CONTROLLERAXISMOTION, instance_id=which, value=value, **move))
    assert chosen(session, keymap).tolist() == [-1, 0, 0]
    pad, session, keymap = pads(spaces.Discrete(4), SourceConfig(env_id="x", action_names=names))
    for which, kind in ((7, "DOWN"), (9, "DOWN"), (9, "UP")):
        kind = getattr(pygame, f"CONTROLLERBUTTON{kind}")
        pad.event(event(kind, instance_id=which, button=pygame.CONTROLLER_BUTTON_A))
    assert [chosen(session, keymap) for _ in range(2)] == [3, 3]
    # They are known by what stays theirs when another one is unplugged.
    plugged = iter((7, 9, 12))
    about = {"get_instance_id": lambda: next(plugged)}
    made = types.SimpleNamespace(as_joystick=lambda: types.SimpleNamespace(**about))
    pad._module = types.SimpleNamespace(Controller=lambda index: made)
    for index in (0, 1):
        pad.event(event(pygame.CONTROLLERDEVICEADDED, device_index=index))
    pad.event(event(pygame.CONTROLLERDEVICEREMOVED, instance_id=7))
    pad.event(event(pygame.CONTROLLERDEVICEADDED, device_index=1))
    assert sorted(pad._controllers) == [9, 12]


class Canvas(pygame.Surface):
    """Remembers where something was drawn onto it."""

    def blit(self, source, dest=(0, 0), area=None, special_flags=0):
        drawn = super().blit(source, dest, area, special_flags)
        self.drawn.append((source.get_rect(topleft=drawn.topleft), drawn))
        return drawn


@pytest.mark.parametrize("width", [560, 870])
def test_nothing_in_the_bar_or_the_help_is_cut_or_drawn_over(width, world):
    """A square picture makes the window narrow, in which the names of numbers overlapped."""
    pygame.display.init(), pygame.font.init()
    pygame.display.set_mode((width, 586))
    canvas = Canvas((width, 586))
    canvas.drawn = []
    slots = Slots(world, 1, "cpu")
    slots.keymap = Keymap.from_source(SourceConfig(env_id="x"), CAR)
    numbers = Session(slots.keymap, slots.default_sampling).hud()
    numbers |= {"return": 1234.5, "step": 1234, "fps": 35.0, "acceptance": 1.0, "guessed": 1.0}
    numbers |= {
        "agent": True,
        "teacher": True,
        "apart": 26.2,
        "view": "split",
        "seed": 2**32 - 1,
        "drift": 1.5,
    }
    numbers |= {"action": "down right", "reward": -1.25, "sampling_steps": 18, "speculation": True}
    numbers |= {"drift": 1.5}
    picture = types.SimpleNamespace(frame=np.zeros((64, 64, 3), np.uint8), hud=numbers)
    shown = hud.Hud(pygame, canvas, slots)
    shown.draw(picture, 0.123, True, True)
    bar = [(whole, drawn) for whole, drawn in canvas.drawn if whole.top >= 586 - hud.BAR]
    assert len(bar) > 20
    canvas.drawn = []
    numbers["action"] = "left 80%+accelerate 60%"
    shown.draw(picture, 0.123, True, True)
    both = [(whole, drawn) for whole, drawn in canvas.drawn if whole.top >= 586 - hud.BAR]
    assert len(both) == len(bar) + 1
    bar = both
    shown.help, canvas.drawn = True, []
    shown.draw(picture, 0.123, True, True)
    help_ = [(whole, drawn) for whole, drawn in canvas.drawn if whole.height < 60]
    for texts in (bar, help_):
        for i, (whole, drawn) in enumerate(texts):
            assert whole.size == drawn.size and whole.right <= width
            # Lines may come closer than their letters' boxes are high.
            middle = whole.inflate(0, -whole.height // 2)
            others = [o for o, _ in texts[:i]]
            assert middle.collidelist(others) == -1, (middle, others)
