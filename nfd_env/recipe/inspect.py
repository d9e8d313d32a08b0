"""``nfd init``: look at a game, and write the file that describes it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import EnumType
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import yaml
from gymnasium import spaces

from nfd_env.data.importers import open_foreign
from nfd_env.data.worker import close
from nfd_env.files import check_writable, save_text
from nfd_env.named import described, look_here
from nfd_env.recipe.game import snake_case
from nfd_env.recipe.grid import choose_grid, fitting_size
from nfd_env.sources.envpool_env import PREFIX
from nfd_env.sources.frames import FRAME_RATE, FrameRateError, frame_rate
from nfd_env.sources.keys import NAMED_KEYS, NOOP, default_controls, key_name
from nfd_env.sources.source import SourceConfig, SourceError, make_source
from nfd_env.sources.spec import VIDEOS, area_resize, is_imported
from nfd_env.spaces import ActionCodec, space_to_dict
from nfd_env.video import write_png

_LOOKED_AT = 24  # steps that are played to see the game
_PLAYED_TO_THE_END = 300  # steps at most, to see how the game shows an end; slow games take 10 s
_ATTEMPTS = 5  # a game may fail in some of its episodes
_SAME_ASPECT = 0.03  # of the logarithm: nobody sees that pixels are not quite square
_SMALLEST = 24  # pixels; a smaller "image" is a map of symbols (MiniGrid's is 7 x 7)

# Packages that register ids when they are imported, by the beginning of the id.
_REGISTERED_BY = {
    "Vizdoom": "vizdoom.gymnasium_wrapper",
    "ALE/": "ale_py",
    "MiniGrid": "minigrid",
    "BabyAI": "minigrid",
    "MiniWorld": "miniworld",
    "Crafter": "crafter",
    "procgen": "procgen",
}


def inspect_game(
    env_id: str,
    kwargs: Mapping[str, Any] | None = None,
    imports: list[str] | None = None,
    file: str = "",
) -> tuple[SourceConfig, str, np.ndarray]:
    """Make the game, play a few steps of it, and decide how to record it.

    Args:
        env_id: Gymnasium id, "envpool/" and an EnvPool task, or recordings that were made elsewhere
            ("videos:" and a folder, "minari:" and a data set).
        kwargs: of ``gymnasium.make``; see ``SourceConfig.kwargs`` for recordings.
        imports: modules that register the id; None for those of well-known games.
        file: what the game file will be called, which it says itself; "" for ``default_file``.

    Returns:
        How to record it; the text of a game file; a preview, uint8 RGB (H, W, 3): the game's own
        frame beside the frame as the tokenizer will see it.

    Raises:
        SourceError: when the game cannot be made or shows no frames.
    """
    if imports is None:
        imports = [m for start, m in _REGISTERED_BY.items() if env_id.startswith(start)]
    source = SourceConfig(env_id, imports=imports, kwargs=dict(kwargs or {}))
    file = file or default_file(env_id)
    if is_imported(env_id):
        return _foreign(source, file)
    source, raw, seen, env = _with_frames(source)
    if acting := getattr(env.unwrapped, "get_acting", list)():
        source = replace(source, actions=acting)
        close(env)
        env = make_source(source)
    try:
        return _inspected(source, file, raw, seen, env)
    except SourceError:
        raise
    except (Exception, SystemExit) as error:  # whatever foreign code may raise
        raise SourceError(
            f"{env_id} fails while it is looked at: {described(error)}; write its file by hand, "
            "after another game's"
        ) from error
    finally:
        close(env)


def default_file(env_id: str) -> str:
    """What the file of a game is called, unless somebody says otherwise."""
    return f"{snake_case(_name(env_id))}.yaml"


def _foreign(source: SourceConfig, file: str) -> tuple[SourceConfig, str, np.ndarray]:
    """What ``inspect_game`` returns of recordings that were made elsewhere."""
    found = open_foreign(source)
    raw, space = found.frame(), found.action_space
    size = fitting_size(*raw.shape[:2])
    names, keys = default_controls(space)
    source = replace(
        source,
        size=size,
        display_aspect=_aspect(raw, size),
        fps=round(found.fps, 3),
        action_names=list(names),
        keys=keys,
    )
    if source.env_id.startswith(VIDEOS) and "action_space" not in source.kwargs:
        told = space_to_dict(space)  # so that more recordings will not change it
        source = replace(source, kwargs={**source.kwargs, "action_space": told})
    return source, _text(source, file, space, 2000, []), _preview(raw, open_foreign(source).frame())


def _inspected(
    source: SourceConfig, file: str, raw: np.ndarray, seen: np.ndarray, env: gymnasium.Env
) -> tuple[SourceConfig, str, np.ndarray]:
    names, keys = _controls(env, source.actions)
    fps = _frame_rate(env, source)
    space = env.action_space
    steps = _longest(env)
    alike = _attempted(lambda: _alike(env), [])
    if source.actions:  # of the game's own numbers, as they stand in the file
        alike = [[source.actions[number] for number in group] for group in alike]
    source = replace(source, terminal_frame=_attempted(lambda: _shows_its_end(env, source), True))
    source = replace(source, action_names=names, keys=keys, fps=round(fps, 3))
    return source, _text(source, file, space, steps, alike), _preview(raw, seen)


def write_game(
    env_id: str,
    output: str | os.PathLike[str] = "",
    kwargs: Mapping[str, Any] | None = None,
    imports: list[str] | None = None,
) -> tuple[Path, Path]:
    """Inspect a game and write its file and preview; returns their paths.

    Args:
        env_id: see ``inspect_game``.
        output: the file; "" for one named after the game, in this folder.
        kwargs: see ``inspect_game``.
        imports: see ``inspect_game``.

    Raises:
        SourceError: see ``inspect_game``.
        FileExistsError: when one of them is there; it may be somebody's work.
        FolderError: when it cannot be written.
    """
    path = Path(output or default_file(env_id)).expanduser()
    look_here()
    picture = path.with_suffix(".png")
    if picture == path:
        raise ValueError(f"{path}: that is the preview's name; name the game file with .yaml")
    for file in (path, picture):
        if os.path.lexists(file):
            raise FileExistsError(
                f"{file} is there already; name another file with -o, or remove it"
            )
    check_writable(path, picture)
    _, text, preview = inspect_game(env_id, kwargs, imports, path.name)
    write_png(picture, preview)
    save_text(path, text)
    return path, picture


def _with_frames(
    source: SourceConfig,
) -> tuple[SourceConfig, np.ndarray, np.ndarray, gymnasium.Env]:
    """Find out where the frames are: in the observation, in an entry of it, or rendered."""
    resize = area_resize()
    tried = []
    for where in _places(source):
        try:
            where, env = _made(where)
        except SourceError as error:
            if not where.key:  # else a guess of ours
                tried.append(str(error))
            continue
        try:
            ActionCodec(env.action_space)  # another place for the frames would not help
        except ValueError as error:
            close(env)
            raise SourceError(f"{source.env_id}: {error}") from None
        try:
            raw = _played(env)
        except SourceError as error:
            close(env)
            tried.append(str(error))
            continue
        height, width = raw.shape[:2]
        if min(height, width) < _SMALLEST:
            close(env)
            tried.append(f"{where.frames} of {height}x{width} is no picture, but a map of symbols")
            continue
        size = fitting_size(height, width)
        sized = replace(where, size=size, display_aspect=_aspect(raw, size))
        seen = resize(raw, (size[0], size[1]))
        close(env)
        return sized, raw, seen, make_source(sized)
    raise SourceError(
        f"{source.env_id} shows no frames to record: {'; '.join(dict.fromkeys(tried))}"
    )


def _aspect(raw: np.ndarray, size: Sequence[int]) -> float:
    """Width over height at which frames of ``size`` are to be shown; 0 where that is their own."""
    own = raw.shape[1] / raw.shape[0]
    return 0.0 if abs(math.log(own * size[0] / size[1])) < _SAME_ASPECT else round(own, 4)


def _made(source: SourceConfig) -> tuple[SourceConfig, gymnasium.Env]:
    """The environment; one that says of itself what is no frame rate gets the usual one."""
    try:
        return source, make_source(source)
    except FrameRateError:
        source = replace(source, fps=FRAME_RATE)
        return source, make_source(source)


def _places(source: SourceConfig) -> list[SourceConfig]:
    """Where frames may be, the best place first: what agents observe, then what people see."""
    places = [replace(source, frames="observation")]
    if not source.env_id.startswith(PREFIX):
        places += [
            replace(source, frames="observation", key=key)
            for key in ("screen", "rgb", "image", "pixels", "pov", "frame")
        ]
        places.append(replace(source, frames="render"))
    return places


def _attempted(look: Callable[[], Any], otherwise: Any) -> Any:
    """What ``look`` finds, or ``otherwise`` where the game fails in it."""
    try:
        return look()
    except (Exception, SystemExit):  # whatever foreign code may raise; recording tells of it
        return otherwise


def _played(env: gymnasium.Env) -> np.ndarray:
    """The frame after a few random steps."""
    env.action_space.seed(0)
    reason: BaseException = SourceError("")
    for seed in range(_ATTEMPTS):
        try:
            frame, _ = env.reset(seed=seed)
            for _ in range(_LOOKED_AT):
                frame, _, terminated, truncated, _ = env.step(env.action_space.sample())
                if terminated or truncated:
                    frame, _ = env.reset()
            return frame
        except (Exception, SystemExit) as error:  # whatever foreign code may raise
            reason = error
    raise SourceError(f"it fails in every episode; the last: {described(reason)}")


def _shows_its_end(env: gymnasium.Env, source: SourceConfig) -> bool:
    """Whether the frame of an episode's end is a picture; ViZDoom hands out an empty one."""
    if any(module.startswith("vizdoom") for module in source.imports):
        return False
    env.reset(seed=1)
    env.action_space.seed(1)
    for _ in range(_PLAYED_TO_THE_END):
        frame, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated:
            return bool(frame.std() > 0)
        if truncated:
            env.reset()
    return True


def _alike(env: gymnasium.Env) -> list[list[int]]:
    """Discrete actions that led to the very same frames, tried from a few moments; as groups."""
    space = env.action_space
    if not isinstance(space, spaces.Discrete) or not 2 < space.n <= 20:
        return []
    groups: dict[bytes, list[int]] = {}
    for action in range(int(space.start), int(space.start + space.n)):
        seen = []
        for seed in range(3):
            env.reset(seed=seed)
            for step in range(16):
                # Held for a few frames after a beginning that is the same for all.
                now = int(space.start) + step % int(space.n) if step < 8 else action
                frame, _, terminated, truncated, _ = env.step(now)
                seen.append(frame.tobytes())
                if terminated or truncated:
                    break
        groups.setdefault(b"".join(seen), []).append(action)
    return [group for group in groups.values() if len(group) > 1]


def _controls(env: gymnasium.Env, chosen: Sequence[int]) -> tuple[list[str], dict[str, list[str]]]:
    """Names and keys of actions: the game's own where it says, else sensible ones."""
    space, inner = env.action_space, env.unwrapped
    names = _names(inner, space, chosen)
    names, keys = default_controls(space, names)
    own: Any = getattr(inner, "get_keys_to_action", None)
    if own is None or not isinstance(space, spaces.Discrete):
        return names, keys
    for chord, action in (own() or {}).items():
        pressed = chord if isinstance(chord, tuple) else (chord,)
        place = int(action) - int(space.start)
        if len(pressed) == 1 and 0 <= place < len(names):
            key = key_name(pressed[0])
            known = (len(key) == 1 and key.isprintable()) or key in NAMED_KEYS
            if not known or key in keys.get(names[place], ()):
                continue
            for others in keys.values():  # what the game says of a key goes before a guess
                if key in others:
                    others.remove(key)
            keys.setdefault(names[place], []).append(key)
    return names, {name: own for name, own in keys.items() if own}


def _names(inner: Any, space: spaces.Space, chosen: Sequence[int]) -> list[str]:
    """The game's own names of its (chosen) actions; none where it has none, or others."""
    told: list[str] = []
    if hasattr(inner, "game") and hasattr(inner.game, "get_available_buttons"):
        told = _button_names(inner, space)
    elif isinstance(space, spaces.Discrete):
        meanings: Any = getattr(inner, "get_action_meanings", None)
        actions = getattr(inner, "actions", None)
        if isinstance(actions, EnumType):  # as MiniGrid has it, and what is built like it
            members: list[Any] = sorted(actions, key=_value)
            told = [str(member.name).lower() for member in members]
        if meanings is not None:
            told = [str(name).lower() for name in meanings() or ()]
        told = [told[number] for number in chosen] if told and chosen else told
    fits = told and len(told) == len(default_controls(space)[0]) == len(set(told))
    return told if fits else []


def _button_names(inner: Any, space: spaces.Space) -> list[str]:
    """Of ViZDoom's actions, which are buttons that are held together or alone."""
    buttons = [str(button.name).lower() for button in inner.game.get_available_buttons()]
    if isinstance(space, spaces.MultiBinary):
        return buttons
    if isinstance(space, spaces.MultiDiscrete):  # one by one, each up or down
        return [name for button in buttons for name in (f"{NOOP} {button}", button)]
    if isinstance(space, spaces.Discrete):  # each a row of ``button_map``, see its source
        held = [[b for b, on in zip(buttons, row, strict=True) if on] for row in inner.button_map]
        return ["+".join(pressed) or NOOP for pressed in held]
    return []


def _value(member: Any) -> Any:
    return member.value


def _frame_rate(env: gymnasium.Env, source: SourceConfig) -> float:
    """Steps a second at which a person plays: native frames over the frame skip."""
    told = frame_rate(env)
    if source.env_id.startswith(PREFIX):
        return told  # counted there already
    if "ale_py" in source.imports:
        told = 60.0  # what it says of itself is another number, and no skip explains it
    return told / _frame_skip(env, source)


def _frame_skip(env: gymnasium.Env, source: SourceConfig) -> float:
    """Native frames a step: a game with frame skip 4 plays at a quarter of its frame rate."""
    given = source.kwargs.get("frameskip", source.kwargs.get("frame_skip"))
    if given is None and env.spec is not None:
        given = env.spec.kwargs.get("frameskip", env.spec.kwargs.get("frame_skip"))
    if given is None:
        given = getattr(env.unwrapped, "_frameskip", 1)
    if isinstance(given, list | tuple):
        return (given[0] + given[1] - 1) / 2  # Atari's stochastic frame skip
    return float(given) if isinstance(given, int | float) and given >= 1 else 1.0


def _longest(env: gymnasium.Env) -> int:
    steps = env.spec.max_episode_steps if env.spec is not None else None
    return int(np.clip(steps or 2000, 2, 2000))


def _name(env_id: str) -> str:
    """Turn "envpool/BigfishEasy-v0" into "BigfishEasy", "ALE/Breakout-v5" into "Breakout"."""
    name = re.sub(r"-v\d+$", "", env_id.rstrip("/").split("/")[-1].split(":")[-1])
    return re.sub(r"[^A-Za-z0-9_-]", "", name) or "Game"


def _text(
    source: SourceConfig, file: str, space: spaces.Space, steps: int, alike: list[list[int]]
) -> str:
    """The game file, with comments."""
    name = _name(source.env_id)
    height, width = source.size
    grid = choose_grid(height, width, math.inf)
    command = " ".join(shlex.quote(file).splitlines())

    def flow(value: Any) -> str:
        if isinstance(value, str):  # plain where it cannot be taken for anything else
            plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_/:.-]*[A-Za-z0-9]", value)
            plain = plain and yaml.safe_load(value) == value
            return value if plain else json.dumps(value, ensure_ascii=False)
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()

    lines = [
        f"# {' '.join(source.env_id.split())}: {' '.join(str(space).split()):.200}",
        f"# nfd train {command}  makes a world of it; run it again to go on",
        f"name: {flow(name)}",
        "source:",
        f"  env_id: {flow(source.env_id)}",
    ]
    if source.imports:
        lines.append(f"  imports: {flow(source.imports)}  # these register the id")
    if source.kwargs:
        lines.append(f"  kwargs: {flow(source.kwargs)}")
    played = not is_imported(source.env_id)
    if played:
        lines.append(f"  frames: {source.frames}  # or: {_other(source.frames)}")
    if source.key:
        lines.append(f"  key: {flow(source.key)}")
    lines += [
        "  crop: []  # [top, bottom, left, right] in pixels of the game's own frame",
        f"  size: {flow(source.size)}  # [height, width]; {grid.tokens} or more tokens a frame",
        f"  fps: {source.fps:g}  # steps a second at which a person plays, frame skip counted",
    ]
    if source.display_aspect:
        lines.append(f"  display_aspect: {source.display_aspect:g}  # width over height, as played")
    if not source.terminal_frame:
        lines.append("  terminal_frame: false  # the game shows no picture at its end")
    if isinstance(space, spaces.Discrete) and played:
        hint = f"; these looked alike in a few steps: {alike}" if alike else ""
        others = "the others do nothing in this game" if source.actions else "[] for all"
        lines.append(f"  actions: {source.actions}  # those that the world has, {others}{hint}")
    if source.action_names:
        lines.append(f"  action_names: {flow(source.action_names)}")
    lines.append(f"  keys: {flow(source.keys)}  # names and keys can change at any time")
    if played:
        lines += [
            "policies:  # who plays while it is recorded; the better, the better the world",
            "  - {policy: random_held, kwargs: {low: 1, high: 12}}",
            "workers: 0  # processes that record; 0: one a core",
        ]
    lines += [
        "minutes: 60  # for everything; nfd train --minutes M overrides it",
        f"max_episode_steps: {steps}  # recorded episodes are cut off there",
        "seed: 0",
        "",
    ]
    return "\n".join(lines)


def _other(frames: str) -> str:
    return "render" if frames == "observation" else "observation"


def _preview(raw: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The game's own frame, and beside it the frame as the tokenizer will see it, as tall."""
    from PIL import Image

    height = max(256, raw.shape[0])
    pictures = []
    for frame in (raw, seen):
        width = max(1, round(frame.shape[1] * height / frame.shape[0]))
        picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
        pictures.append(np.array(picture))
    gap = np.full((height, 8, 3), 255, np.uint8)
    return np.concatenate((pictures[0], gap, pictures[1]), 1)
