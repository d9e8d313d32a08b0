"""``nfd init``, ``train``, ``collect``, ``export``, which read one game file; and ``nfd push``."""

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
        minutes: wall-clock budget of everything; default: the file's, or with --stage that which
            the run was begun with.
        device: cpu, cuda or auto; default: the file's.
        stage: only this one: record, inverse_dynamics, tokenizer, encode, flow, heads, distill,
            world or report; with rounds also agent_2, record_2 and so on.
        keep_going: go on where a stage's result is not good enough.
    """
    from nfd_env.devices import resolve_device
    from nfd_env.recipe.follow import follow
    from nfd_env.recipe.game import load_game
    from nfd_env.recipe.ledger import with_stored_budget
    from nfd_env.recipe.run import Recipe
    from nfd_env.training.ranks import joined

    described = load_game(game, overrides, minutes, device)
    own = minutes is not None or any(text.startswith("minutes=") for text in overrides)
    if stage is not None and not own:
        described = with_stored_budget(described)
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


def shrink(
    world: Positional[str],
    output: Annotated[str, arg(aliases=("-o",))],
    bits: str = "{tokenizer: 8, dynamics: 8, heads: 8}",
    teacher: bool = False,
    agents: tuple[str, ...] | None = None,
) -> int:
    """Write a smaller copy of a world, with fewer bits a weight.

    Args:
        world: a folder or the name of a shipped world.
        output: the folder of the copy.
        bits: networks and their bits a weight, from 4 to 8; others stay as they are.
        teacher: keep the flow model behind a distilled world, too.
        agents: names of those beside the world that come along; default: all.
    """
    from pathlib import Path

    import yaml

    from nfd_env.recipe.shrink import shrink as make
    from nfd_env.worlds.load import find_world

    given = config.value(bits, "--bits")
    if not isinstance(given, dict):
        raise ValueError(f"bits must be a YAML mapping such as '{{dynamics: 6}}', got {bits!r}")
    made = make(world, Path(output), given, teacher, agents)
    for name, errors in yaml.safe_load((made / "provenance.yaml").read_text(encoding="utf-8"))[
        "bits"
    ].items():
        print(
            f"{name:10} {errors['bits']} bits: its weights are off by {errors['weights']:.1%}, "
            f"what it makes of the starts by {errors['output']:.1%}"
        )
    sizes = [
        sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) / 1e6
        for f in (find_world(world), made)
    ]
    print(f"{made}: {sizes[1]:.1f} MB, from {sizes[0]:.1f}; what it can do:  nfd eval {made}")
    return 0


def push(
    folder: Positional[str],
    to: Positional[str],
    license: str = "",
    art_license: str = "",
    private: bool = False,
    preview: str | None = None,
) -> int:
    """Share a world on the Hugging Face Hub, with a page that says what it is.

    Args:
        folder: the world, or the run that made it.
        to: owner/name, or owner/name@branch.
        license: of the weights, an identifier of the hub such as mit or cc-by-4.0.
        art_license: a sentence on the licence of the game's art, where the folder has no
            ASSET_LICENSES.md.
        private: make the repository a private one, where there is none yet.
        preview: write the page into this folder, and send nothing.
    """
    from pathlib import Path

    from nfd_env.files import atomic_write, check_writable, make_folder
    from nfd_env.recipe.card import find_shared, make_card
    from nfd_env.worlds.hub import CARD, parse_address, push_world, require_library, world_files

    address = parse_address(to)
    # Before a world is played.
    if preview is None:
        require_library()
    else:
        check_writable(Path(preview) / CARD)
    world, run = find_shared(Path(folder).expanduser())
    files = world_files(world)
    card = make_card(world, run, address, license, art_license)
    if preview is None:
        print(push_world(world, address, card.text, card.pictures, private))
        print(f"play it:  nfd play {address}")
        return 0
    for name, data in {CARD: card.text.encode(), **card.pictures}.items():
        path = Path(preview).expanduser() / name
        make_folder(path.parent)
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
    print(f"{Path(preview) / CARD}: look at it; with it would be sent: {', '.join(files)}")
    return 0
