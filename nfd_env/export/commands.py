"""``nfd export-onnx`` and ``nfd export-web``."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

Output = Annotated[str, arg(aliases=("-o",))]


def export_onnx(world: Positional[str], output: Output) -> int:
    """Write a world as ONNX files, for other programs to play.

    Args:
        world: world folder or shipped world.
        output: a new folder.
    """
    from nfd_env.export.page import export_onnx

    print(f"wrote {export_onnx(world, output)}")
    return 0


def export_web(world: Positional[str], output: Output, runtime: str = "") -> int:
    """Write a page that plays a world in any browser, without a server of ours.

    Args:
        world: world folder or shipped world.
        output: a new folder.
        runtime: folder of the npm package onnxruntime-web, to copy what the page needs of it;
            default: the page loads it from cdn.jsdelivr.net.
    """
    from nfd_env.export.page import export_web

    print(f"wrote {export_web(world, output, runtime)}; python -m http.server -d {output} shows it")
    return 0
