"""``nfd worlds`` and ``nfd pull``."""

from __future__ import annotations

from pathlib import Path

import yaml
from tyro.conf import Positional


def worlds() -> int:
    """List the worlds that come with the package."""
    # Plain YAML, so that nothing heavy is imported; these files are our own.
    for path in sorted(Path(__file__).parent.glob("*/world.yaml")):
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        height, width = spec["frame_size"]
        space = spec["action_space"]
        actions = f"{space['n']} actions" if "n" in space else f"{space['type']} actions"
        scores = ", ".join(f"{k} {v:g}" for k, v in (spec.get("scores") or {}).items())
        print(
            f"{spec['name']:20} {height}x{width} at {spec['fps']:g} frames/s, {actions}, "
            f"from {spec['source']['env_id']}{f'; returns in it: {scores}' if scores else ''}"
        )
    return 0


def pull(world: Positional[str]) -> int:
    """Fetch a world from the Hugging Face Hub as it is there now, and print its folder.

    Args:
        world: owner/name, or owner/name@revision.
    """
    from nfd_env.worlds.hub import fetch_world

    print(fetch_world(world))
    return 0
