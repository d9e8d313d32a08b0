"""The page that a shared world has on the hub: pictures, metrics, provenance, licences."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nfd_env import config
from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.clips import ActionReport, actions_sentence, clip_rows, clips_sentence
from nfd_env.evaluation.demo import demo
from nfd_env.evaluation.tables import table, told
from nfd_env.files import found_file
from nfd_env.models.weights import CheckpointError
from nfd_env.recipe.records import read_records
from nfd_env.recipe.report import COLUMNS, verdict
from nfd_env.video import enlarge, write_png
from nfd_env.worlds.clip import NoClipError
from nfd_env.worlds.hub import Address
from nfd_env.worlds.load import World, load_world

_SECONDS = 6.0  # of the film
_SHOWN, _APART = 6, 4  # frames of a world without a film of its own, and steps between two


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        text: Markdown with the hub's metadata in front.
        pictures: name -> file that the text shows.
    """

    text: str
    pictures: dict[str, bytes]


def find_shared(folder: Path) -> tuple[Path, Path | None]:
    """The world that ``folder``, a world's or a run's, is about, and the run where there is one.

    Raises:
        CheckpointError: when it is neither.
    """
    if found_file(folder / "world.yaml", CheckpointError):
        run = folder.resolve().parent
        return folder, run if folder.resolve().name == "world" and _is_run(run) else None
    if found_file(folder / "world" / "world.yaml", CheckpointError):
        return folder / "world", folder if _is_run(folder) else None
    raise CheckpointError(f"{folder} is neither a world folder nor a run that has made a world")


def make_card(
    world: str | Path, run: Path | None, address: Address, license: str = "", art: str = ""
) -> Card:
    """Write the card of a world, which is played for its pictures.

    Args:
        world: a world folder.
        run: the run that made it, whose report is quoted; None for a world without.
        address: where it will lie.
        license: of the weights, an identifier of the hub such as "mit"; "" for none stated.
        art: a sentence on the licence of the game's art, beside what the folder says of it.

    Raises:
        CheckpointError: when the world cannot be loaded, or nothing is known of the art's licence.
    """
    loaded = load_world(world)
    spec, folder = loaded.spec, loaded.folder
    art = "\n\n".join(text for text in (art.strip(), _art_of(folder)) if text)
    if not art:
        raise CheckpointError(
            f"{folder} does not say under which licence the game's art may be shown: give it by "
            '--art-license "...", or in a file ASSET_LICENSES.md of the folder (and call '
            "nfd_env.worlds.checksums.write_checksums(folder))"
        )
    try:  # before the world is played
        measured = _metrics(spec.scores, run)
        origin = _provenance(_read(folder / "provenance.yaml"), spec.sampling.steps)
    except config.ConfigError:  # says it better
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/provenance.yaml, or report.yaml of its run, is not as this version writes "
            f"it ({error!r:.80}): mend it or take it away"
        ) from None
    pictures = _pictures(loaded)
    title = spec.title or spec.name
    parts = [
        _metadata(address, license),
        f"# {title}",
        spec.description,
        f"A learned world of `{spec.source.env_id}` that steps as a batched Gymnasium environment "
        f"of nfd_env: {spec.frame_size[0]}x"
        f"{spec.frame_size[1]} frames at {spec.fps:g} a second, {spec.action_space['type']} "
        "actions.",
        *(f"![{_PICTURES[name]}]({name})" for name in pictures),
        "## Use it",
        f"```\npip install 'nfd-env[hub,play]'\nnfd play {address}\n```",
        f'```python\nimport gymnasium, nfd_env\n\nenv = gymnasium.make("NFD/World-v0", '
        f'world="{address}")\n```',
        "Name a commit behind an @ for results that others can repeat. A world is data "
        "(safetensors, YAML, a film): loading it runs no code of its author's.",
        *measured,
        *origin,
        "## Licence of the game's art",
        art,
    ]
    return Card("\n\n".join(part for part in parts if part) + "\n", pictures)


_PICTURES = {
    "card/film.gif": "The game on the left, the world on the right, same keys",
    "card/strip.png": "The game on the left, the world on the right, same keys",
    "card/frames.png": "Frames that the world has drawn, random keys",
}


def _pictures(world: World) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            demo(str(world.folder), folder, _SECONDS, gif=folder / "film.gif")
        except NoClipError:
            path = write_png(folder / "frames.png", _frames(world))
            return {"card/frames.png": path.read_bytes()}
        return {
            "card/film.gif": (folder / "film.gif").read_bytes(),
            "card/strip.png": (folder / "demo.png").read_bytes(),
        }


def _frames(world: World) -> np.ndarray:
    """Some frames of an episode under random actions, side by side."""
    env = NFDVectorEnv(world.folder)
    frame, _ = env.reset(seed=0)
    env.action_space.seed(0)
    frames = [frame[0]]
    while len(frames) < _SHOWN:
        for _ in range(_APART):
            frame = env.step(env.action_space.sample())[0]
        frames.append(frame[0])
    return np.concatenate([enlarge(f, 192, world.spec.source.display_aspect) for f in frames], 1)


def _metadata(address: Address, license: str) -> str:
    values: dict[str, Any] = {"license": license} if license else {}
    values |= {
        "library_name": "nfd_env",
        "pipeline_tag": "reinforcement-learning",
        "tags": ["world-model", "gymnasium", "next-frame-diffusion"],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _metrics(scores: Mapping[str, float], run: Path | None) -> list[str]:
    parts = []
    if scores:
        parts.append(_table(("measured", ""), [(k, f"{v:g}") for k, v in scores.items()]))
    if run is not None:
        records = read_records(run)
        rows = _read(run / "report.yaml").get("comparisons") or []
        parts.append(verdict(records))
        parts.append(
            _table(
                ("frames ahead", *COLUMNS.values()),
                [(row["horizon"], *(told(row.get(c)) for c in COLUMNS)) for row in rows],
            )
        )
        parts.append(
            "Against held-out recordings. PSNR has to fall with time, but should stay above the "
            "frozen picture's; sharpness, gradients and things that stand out: 1 is as in the game."
        )
        read_back = records["report"].extra if "report" in records else None
        if read_back:
            report = config.from_mapping(ActionReport, read_back, f"{run}: report", measured=True)
            parts.append(actions_sentence(report))
            if report.clips is not None:
                parts += [_table(*clip_rows(report.clips)), clips_sentence(report.clips)]
    return ["## How good", *(parts or ["Nothing was measured, or no report came along."])]


def _provenance(values: Mapping[str, Any], steps: int) -> list[str]:
    recordings, stages = values.get("recordings") or {}, values.get("stages") or {}
    made = ", ".join(f"{k} {values[k]}" for k in ("made", "nfd_env", "torch") if k in values)
    parts = [f"A frame takes {steps} sampling step{'s' * (steps != 1)}. {made}"]
    if "frames" in recordings:
        parts.append(
            f"Recorded: {recordings['frames']:,} frames in {recordings.get('episodes', '?')} "
            "episodes."
        )
        parts.append(
            _table(
                ("who played", "episodes", "frames", "mean return"),
                [
                    (name, *(row.get(k, "–") for k in ("episodes", "frames", "mean_return")))
                    for name, row in (recordings.get("policies") or {}).items()
                ],
            )
        )
    parts.append(
        _table(
            ("stage", "steps", "minutes", "validation"),
            [
                (
                    name,
                    row.get("steps"),
                    f"{row.get('wall_seconds', math.nan) / 60:.0f}",
                    ", ".join(f"{k} {v:g}" for k, v in (row.get("validation") or {}).items()),
                )
                for name, row in stages.items()
            ],
        )
    )
    parts.append("`provenance.yaml` has all settings.")
    return ["## Where it comes from", *parts]


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    return table(header, (map(_cell, row) for row in rows)) if rows else ""


def _cell(value: Any) -> str:
    return re.sub(r"[|\s]+", " ", str(value))


def _art_of(folder: Path) -> str:
    """What the files of a world folder say, one heading deeper."""
    files = (p for p in sorted(folder.glob("ASSET_LICENSES*")) if found_file(p, CheckpointError))
    texts = (path.read_text(encoding="utf-8") for path in files)
    return "\n\n".join(re.sub(r"(?m)^#", "###", text.strip()) for text in texts)


def _read(path: Path) -> dict[str, Any]:
    return config.read(path) if found_file(path, config.ConfigError) else {}


def _is_run(folder: Path) -> bool:
    return found_file(folder / "run.yaml", config.ConfigError)
