import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.play.keys import KeyLatch, Keymap, KeymapError, PressedKey, key_name
from nfd_env.sources.source import SourceConfig


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
