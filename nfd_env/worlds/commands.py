"""``nfd worlds``."""

from __future__ import annotations

from pathlib import Path

import yaml


def worlds() -> int:
    """List the worlds that come with the package."""
    # Plain YAML, so that nothing heavy is imported; these files are our own.
    for path in sorted(Path(__file__).parent.glob("*/world.yaml")):
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        height, width = spec["frame_size"]
        scores = ", ".join(f"{k} {v:g}" for k, v in (spec.get("scores") or {}).items())
        print(
            f"{spec['name']:20} {height}x{width} at {spec['fps']:g} frames/s, "
            f"{spec['action_space']['type']} actions, from {spec['source']['env_id']}"
            f"{f'; {scores}' if scores else ''}"
        )
    return 0
