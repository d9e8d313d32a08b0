import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.play.keys import KeyLatch, Keymap, PressedKey
from nfd_env.sources.keys import KeymapError, default_controls, key_name, with_chords
from nfd_env.sources.spec import SourceConfig


def source(names, keys):
    return SourceConfig(env_id="x", action_names=names, keys=keys)


DOOM = source(["noop", "right", "left"], {"right": ["right", "d"], "left": ["left", "a"]})


@pytest.fixture
def keymap():
    return Keymap.from_source(DOOM, spaces.Discrete(3))


def step(latch, keymap):
    return latch.consume(keymap).action


def test_a_tap_between_two_steps_counts_for_exactly_one(keymap):
    latch = KeyLatch(keymap.keys)
    latch.press("left")
    latch.release("left")
    assert [step(latch, keymap) for _ in range(3)] == [2, 0, 0]


def test_a_held_key_counts_until_it_is_released(keymap):
    latch = KeyLatch(keymap.keys)
    latch.press("d")
    assert [step(latch, keymap) for _ in range(3)] == [1, 1, 1]
    latch.release("d")
    assert step(latch, keymap) == 0


def test_two_taps_in_one_step_are_both_done_in_their_order(keymap):
    latch = KeyLatch(keymap.keys)
    for key in ("left", "right"):
        latch.press(key)
        latch.release(key)
    assert [step(latch, keymap) for _ in range(3)] == [2, 1, 0]


def test_a_tap_beats_a_held_key_and_the_newer_of_two_held_keys_wins(keymap):
    latch = KeyLatch(keymap.keys)
    latch.press("left")
    assert step(latch, keymap) == 2
    latch.press("right")
    assert [step(latch, keymap), step(latch, keymap)] == [1, 1]
    latch.release("right")
    assert step(latch, keymap) == 2


def test_losing_the_focus_releases_everything(keymap):
    latch = KeyLatch(keymap.keys)
    latch.press("left")
    latch.press("d")
    latch.release_all()
    assert step(latch, keymap) == 0


def test_keys_without_a_meaning_are_ignored(keymap):
    latch = KeyLatch(keymap.keys)
    assert not latch.press("q")
    assert latch.pressed() == []


def test_chords_win_over_their_parts():
    names = ["noop", "left", "jump", "jump left"]
    keymap = Keymap.from_source(
        source(names, {"left": ["left"], "jump": ["space"], "jump left": ["space+left"]}),
        spaces.Discrete(4),
    )
    held = [PressedKey("space", False), PressedKey("left", False)]
    assert keymap.choose(held).action == 3
    assert keymap.choose(held[:1]).action == 2


BIG_FISH = ["left_down", "left", "left_up", "down", "noop", "up", "right_down", "right", "right_up"]
ATARI = ["noop", "fire", "up", "right", "left", "upright", "upfire", "uprightfire"]


def test_actions_named_after_others_are_chords_of_their_keys():
    ways = {"left": ["left", "a"], "right": ["right"], "up": ["up"], "down": ["down"]}
    keymap = Keymap.from_source(source(BIG_FISH, ways), spaces.Discrete(9))

    def chosen(*keys):
        return keymap.choose([PressedKey(key, False) for key in keys]).label

    assert chosen("left", "up") == chosen("up", "a") == "left_up"
    assert chosen("right", "up", "left") == "left_up"  # of two opposite ones the newer wins
    assert chosen("down") == "down" and chosen() == "noop"
    assert [b["label"] for b in keymap.buttons()] == ["left", "right", "up", "down"]
    assert keymap.gamepad().buttons == {f"dp{way}": way for way in ways}
    keymap = Keymap.from_source(source(ATARI, {}), spaces.Discrete(8))
    assert chosen("up", "space") == "upfire" and chosen("w", "d") == "upright"
    assert chosen("right", "up", "space") == "uprightfire"
    assert not {"6", "7", "8"} & keymap.keys
    # Given keys stay; numbers and single letters make no names.
    keymap = Keymap.from_source(source(BIG_FISH, ways | {"left_up": ["q"]}), spaces.Discrete(9))
    assert chosen("left", "up") == "up" and chosen("q") == "left_up"
    plain = {"1": ["x"], "0": ["y"], "a": ["u"], "b": ["v"]}
    assert with_chords(["1", "0", "10", "a", "b", "a_b", "left", "left_left"], plain) == plain


def test_additive_spaces():
    bits = Keymap.from_source(
        source(["fire", "jump"], {"fire": ["f"], "jump": ["space"]}), spaces.MultiBinary(2)
    )
    both = bits.choose([PressedKey("f", True), PressedKey("space", False)])
    assert both.action.tolist() == [1, 1] and both.label == "fire+jump"
    axes = Keymap.from_source(
        source(["left", "right", "brake", "gas"], {"left": ["a"], "gas": ["w"]}),
        spaces.Box(np.array([-1, 0], np.float32), np.array([1, 1], np.float32)),
    )
    assert axes.choose([PressedKey("a", False), PressedKey("w", False)]).action.tolist() == [-1, 1]
    assert axes.choose([]).action.tolist() == [0, 0]
    dials = Keymap.from_source(
        source(["a0", "a1", "b0", "b1", "b2"], {"b2": ["x"]}), spaces.MultiDiscrete([2, 3])
    )
    assert dials.choose([PressedKey("x", False)]).action.tolist() == [0, 2]


def test_a_world_without_keys_gets_number_keys():
    keymap = Keymap.from_source(source([], {}), spaces.Discrete(3))
    assert keymap.choose([PressedKey("3", False)]).action == 2


def test_a_keymap_that_names_an_unknown_action_says_so():
    with pytest.raises(KeymapError, match="fly"):
        Keymap.from_source(source(["noop"], {"fly": ["f"]}), spaces.Discrete(1))


def test_gymnasium_keymaps():
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    keymap = Keymap.from_env(env, {"a": 0, (ord("d"),): 1, ("left",): 0, "ad": 1})
    assert keymap.choose([PressedKey("d", False)]).action == 1
    assert keymap.choose([PressedKey("left", False)]).action == 0
    assert keymap.choose([PressedKey("a", False), PressedKey("d", False)]).action == 1
    with pytest.raises(KeymapError, match="get_keys_to_action"):
        Keymap.from_env(env)
    with pytest.raises(KeymapError, match="does not lie"):
        Keymap.from_env(env, {"a": 7})


def test_key_names():
    assert [key_name(k) for k in (" ", "Enter", "ArrowLeft", ord("A"), "D")] == [
        "space",
        "return",
        "left",
        "a",
        "d",
    ]


CAR = spaces.Box(np.array([-1, 0, 0], np.float32), np.array([1, 1, 1], np.float32))
EVERY_SPACE = [
    spaces.Discrete(4),
    spaces.Discrete(3, start=-1),
    spaces.Discrete(5, start=7),
    spaces.Discrete(40),
    spaces.MultiDiscrete([3, 2]),
    spaces.MultiDiscrete([3, 2], start=[-1, 4]),
    spaces.MultiDiscrete([[2, 3], [1, 4]]),
    spaces.MultiBinary(5),
    spaces.MultiBinary((2, 2)),
    CAR,
    spaces.Box(-np.inf, np.inf, (2,), np.float64),
    spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,)),
    spaces.Box(np.array([-np.inf, 3.0]), np.array([-2.0, np.inf]), dtype=np.float64),
    spaces.Box(0, 255, (2, 2), np.uint8),
    spaces.Box(-3, 8, (2,), np.int16),
    spaces.Box(-1, 1, ()),
    spaces.Box(-1, 1, (40,)),
]


@pytest.mark.parametrize("space", EVERY_SPACE, ids=str)
def test_a_person_can_play_every_space(space):
    names, keys = default_controls(space)
    assert len(set(names)) == len(names) and set(keys) <= set(names)
    keymap = Keymap.from_source(source([], {}), space)
    rest = keymap.choose([])
    assert keymap.contains(rest.action)
    seen = set()
    for key in sorted(keymap.keys):
        action = keymap.choose([PressedKey(key, True)]).action
        assert keymap.contains(action)
        seen.add(np.asarray(action).tobytes())
        # Without the key it rests again: nobody has changed the resting action.
        assert np.array_equal(keymap.choose([]).action, rest.action)
        assert np.abs(action).max() < 1000  # largest numbers that stand for no bound are no end
    assert len(seen) == len(keymap.keys)
    assert keymap.contains(keymap.choose([], {0: 1.0, 1: -0.3, 99: 1.0}).action)
    plan = keymap.gamepad()
    assert set(plan.buttons.values()) <= keymap.keys
    assert set(plan.axes.values()) <= set(range(len(keymap.axes)))
    # What foreign code does to an action that it was given changes nothing.
    if isinstance(rest.action, np.ndarray):
        rest.action.fill(1)
        assert not np.array_equal(keymap.choose([]).action, rest.action) or rest.action.size == 0


def test_a_car_is_steered_by_the_arrow_keys_and_by_a_gamepad():
    keymap = Keymap.from_source(source([], {}), CAR)

    def action(*keys, **kwargs):
        return keymap.choose([PressedKey(k, False) for k in keys], **kwargs).action.tolist()

    assert action() == [0, 0, 0]
    assert action("left", "up") == [-1, 1, 0]
    assert action("right", "down") == [1, 0, 1]
    assert keymap.gamepad().axes == {"leftx": 0, "rt": 1, "lt": 2}
    assert action(deflections={0: -0.5, 1: 0.25}) == [-0.5, 0.25, 0]
    # A key wins over a stick.
    assert action("right", deflections={0: -0.5}) == [1, 0, 0]
    halves = spaces.Box(np.array([2.0, -4.0]), np.array([6.0, -2.0]), dtype=np.float64)
    keymap = Keymap.from_source(source([], {}), halves)
    assert keymap.choose([]).action.tolist() == [4, -3]
    assert keymap.choose([], {0: 0.5, 1: -1.0}).action.tolist() == [5, -4]


def test_a_dial_rests_where_its_noop_is():
    names = ["left", "noop turn", "right", "noop fire", "fire"]
    space = spaces.MultiDiscrete([3, 2])
    keymap = Keymap.from_source(source(names, {}), space)
    assert keymap.choose([]).action.tolist() == [1, 0]
    held = [PressedKey("left", False), PressedKey("space", False)]
    assert keymap.choose(held).action.tolist() == [0, 1]
    assert keymap.choose(held).label == "left+fire"


def test_names_bring_the_usual_keys():
    _, keys = default_controls(spaces.Discrete(5), ["noop", "Left", "right", "fire", "duck"])
    assert keys == {
        "Left": ["left", "a"],
        "right": ["right", "d"],
        "fire": ["space"],
        "duck": ["5"],
    }
    names = ["noop", "move_left", "turn_left", "move_forward", "move_forward+turn_left"]
    _, keys = default_controls(spaces.Discrete(5), names)
    assert keys == {"move_left": ["a"], "turn_left": ["left"], "move_forward": ["up", "w"]}
    assert with_chords(names, keys)[names[-1]] == ["up+left", "w+left"]
    with pytest.raises(KeymapError, match="3 actions to name, but 2"):
        default_controls(spaces.Discrete(3), ["a", "b"])
    for space in (spaces.Dict(), spaces.Text(3)):
        with pytest.raises(KeymapError):
            default_controls(space)


def test_sticks_are_let_go_with_the_keys():
    keymap = Keymap.from_source(source([], {}), CAR)
    latch = KeyLatch(keymap.keys, len(keymap.axes))
    assert latch.tilt(0, 0.5) and not latch.tilt(3, 0.5) and not latch.tilt(-1, 1.0)
    assert step(latch, keymap).tolist() == [0.5, 0, 0]
    latch.release_all()
    assert step(latch, keymap).tolist() == [0, 0, 0]
