"""``nfd init``, ``train``, ``collect`` and ``export``: they all read one game file."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from nfd_env import config


def init(
    env_id: Positional[str],
    output: Annotated[str, arg(aliases=("-o",))] = "",
    kwargs: str = "{}",
    imports: tuple[str, ...] = (),
) -> int:
    """Look at a game and write the file that describes it, with a preview picture.

    Args:
        env_id: Gymnasium id; "envpool/" and the name of an EnvPool task; or recordings that were
            made elsewhere: "videos:" and a folder of .mp4 files with their actions, "minari:" and
            the name of a data set.
        output: the file; default: named after the game, in this folder.
        kwargs: arguments of the game as YAML, e.g. "{continuous: true}".
        imports: modules that register the id, where it is not a well-known game.
    """
    from nfd_env.recipe.inspect import write_game

    given = config.value(kwargs, "--kwargs")
    if not isinstance(given, dict):
        raise ValueError(f"kwargs must be a YAML mapping such as '{{a: 1}}', got {kwargs!r}")
    path, preview = write_game(env_id, output, given, list(imports) or None)
    print(f"{path}: look at it, and at {preview}; then: nfd train {path}")
    return 0


def train(
    game: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    minutes: float | None = None,
    device: str | None = None,
    stage: str | None = None,
    keep_going: bool = False,
) -> int:
    """Make a world of a game: record, train, put together, report; run it again to go on.

    On several GPUs: torchrun --nproc-per-node=N -m nfd_env train GAME.

    Args:
        game: the game file, see ``nfd init``.
        overrides: key.sub=value, over the file.
        minutes: wall-clock budget of everything; default: the file's.
        device: cpu, cuda or auto; default: the file's.
        stage: only this one: record, inverse_dynamics, tokenizer, encode, flow, heads, distill,
            world or report.
        keep_going: go on where a stage's result is not good enough.
    """
    from nfd_env.devices import resolve_device
    from nfd_env.recipe.follow import follow
    from nfd_env.recipe.game import load_game
    from nfd_env.recipe.run import Recipe
    from nfd_env.training.ranks import joined

    described = load_game(game, overrides, minutes, device)
    with joined(resolve_device(described.device)) as ranks:
        if not ranks.first:
            return follow(ranks)
        recipe = Recipe(described, keep_going, ranks=ranks)
        print(recipe.run(stage))
    return 0


def collect(
    game: Positional[str], overrides: Positional[tuple[str, ...]] = (), frames: int | None = None
) -> int:
    """Record a game, and say what was recorded; run it again to go on.

    Args:
        game: the game file.
        overrides: key.sub=value, over the file.
        frames: in all; default: the file's, or 20,000.
    """
    from nfd_env.data.collect import collect as record
    from nfd_env.data.summary import CONTACT_SHEET, summary
    from nfd_env.recipe.game import load_game

    described = load_game(game, overrides)
    if described.recordings:
        raise ValueError(f"{game}: recordings names a data set that is there: nothing to record")
    if frames is not None and frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    recordings = record(described.collect_config(frames or described.frames or 20_000))
    print(summary(recordings))
    print(f"frames of it: {recordings.folder / CONTACT_SHEET}")
    return 0


def export(game: Positional[str], overrides: Positional[tuple[str, ...]] = ()) -> int:
    """Put finished stages together as a world folder again, with other settings.

    Args:
        game: the game file.
        overrides: key.sub=value, over the file, e.g. export.starts=200.
    """
    return train(game, overrides, stage="world")
