"""A world as ONNX files, in which weights take as much room as in the world's own.

======== ==========================================================================
starts   start -> latents, actions: a recorded moment that an episode begins with
dynamics before, action_before, action, frame, noise, keys, values, recent -> latents,
         new_keys, new_values: one step, see ``NextFrame``
heads    latents, action, memory -> reward, hazard, new_memory
decoder  latents -> picture
======== ==========================================================================
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nfd_env.export.graph import Decoder, Judge, NextFrame, Starts
from nfd_env.inference.sampling import SamplingConfig
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import load_weights, neutral_torch
from nfd_env.worlds.load import World

MOST_STEPS = 8  # of sampling: each is the whole network once more in the file, and in time
_OPSET = 20
_FEW = 256  # numbers: shorter tensors stay as they are
# How many steps the largest weight of a row has: all that there are with 8 to 2 bits, mostly; else
# (rounding that makes up for errors does not always reach the last one) fewer.
_WHOLE = [2**bits - 1 for bits in range(7, 0, -1)]
_STEPS_OF_LARGEST = [*_WHOLE, *(n for n in range(126, 0, -1) if n not in _WHOLE)]
_RELATIVE = 1e-6  # what float32 loses of a weight between its int8 and its scale


class ExportError(RuntimeError):
    """A world cannot be exported; the message says what to do."""


def to_onnx(world: World) -> dict[str, bytes]:
    """The files of a world, by their names; computed in fp32.

    Raises:
        ExportError: when its frames take too many steps, or ``onnx`` is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ExportError("exports need onnx and onnxscript: pip install 'nfd-env[web]'") from None
    sampling = world.spec.sampling
    if sampling.steps > MOST_STEPS:
        raise ExportError(
            f"{world.spec.name} draws a frame in {sampling.steps} steps, at most {MOST_STEPS} can "
            "be exported: distil it (nfd train does), or set fewer in world.yaml"
        )
    with _quiet(), neutral_torch():
        return _graphs(world, sampling)


def _graphs(world: World, sampling: SamplingConfig) -> dict[str, bytes]:
    # As they lie in the files: those in memory are laid out for this processor.
    tokenizer = load_weights(world.folder / "tokenizer.safetensors", Tokenizer, TokenizerConfig)
    dynamics = load_weights(world.folder / "dynamics.safetensors", Dynamics, DynamicsConfig)
    heads = load_weights(world.folder / "heads.safetensors", Heads, HeadsConfig)
    c = dynamics.config
    latents, action = torch.zeros(1, *c.latent_shape), torch.zeros(1, c.action_width)
    memory, number = torch.zeros(1, heads.memory_size), torch.zeros(1, dtype=torch.int64)
    noise = torch.zeros(1 + sampling.renoisings, *c.latent_shape)
    ring = torch.zeros(ring_shape(c))
    starts = (torch.stack([getattr(s, k) for s in world.starts]) for k in ("latents", "actions"))
    step = {"before": latents, "action_before": action, "action": action, "frame": number}
    step |= {"noise": noise, "keys": ring, "values": ring}
    if c.recent:
        step["recent"] = torch.zeros(1, c.recent, *c.latent_shape)
    judged = {"latents": latents, "action": action, "memory": memory}
    return {
        "starts": _file(Starts(*starts), {"start": number}, ["latents", "actions"]),
        "dynamics": _file(
            NextFrame(dynamics, sampling), step, ["latents", "new_keys", "new_values"]
        ),
        "heads": _file(Judge(heads), judged, ["reward", "hazard", "new_memory"]),
        "decoder": _file(Decoder(tokenizer), {"latents": latents}, ["picture"]),
    }


def ring_shape(c: DynamicsConfig) -> tuple[int, ...]:
    """Of ``NextFrame``'s keys, and of its values."""
    return c.layers, c.heads, c.window - 1, c.tokens, c.width // c.heads


def _file(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> bytes:
    """``module`` as an ONNX file."""
    made = torch.onnx.export(
        module.eval().requires_grad_(False),
        # Copies: one tensor given twice would become one input of the graph.
        tuple(tensor.clone() for tensor in inputs.values()),
        dynamo=True,
        opset_version=_OPSET,
        input_names=list(inputs),
        output_names=outputs,
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    _shrink(model.graph)
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of libraries that are not needed."""
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(before)


def _shrink(graph: Any) -> None:
    """Store weights in half precision or as int8 with scales, where nothing is lost by that."""
    from onnx import TensorProto, helper, numpy_helper

    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]  # lines of source code and their places on this machine
    del graph.value_info[:]
    stored, nodes = [], []
    for tensor in graph.initializer:
        parts = None
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= _FEW:
            parts = _smaller(numpy_helper.to_array(tensor))
        if parts is None:
            stored.append(tensor)
            continue
        small, scale = parts
        name = tensor.name
        stored.append(numpy_helper.from_array(small, f"{name}_small"))
        whole = name if scale is None else f"{name}_steps"
        nodes.append(helper.make_node("Cast", [f"{name}_small"], [whole], to=TensorProto.FLOAT))
        if scale is not None:
            stored.append(numpy_helper.from_array(scale, f"{name}_scale"))
            nodes.append(helper.make_node("Mul", [whole, f"{name}_scale"], [name]))
    del graph.initializer[:]
    graph.initializer.extend(stored)
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def _smaller(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray | None] | None:
    """``weights`` as (float16, None), or as (int8, float32 scales); None where neither has them."""
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
    if np.array_equal(half.astype(np.float32), weights):
        return half, None
    # One scale a row, as ``save_weights`` has it; the exporter lays some matrices on their sides.
    for row in (0, weights.ndim - 1) if weights.ndim > 1 else ():
        found = _in_steps(np.moveaxis(weights, row, 0).reshape(weights.shape[row], -1))
        if found is not None:
            sides = (weights.shape[row], *np.delete(weights.shape, row))
            scale = found[1].reshape(-1, *[1] * (weights.ndim - 1))
            return np.moveaxis(found[0].reshape(sides), 0, row), np.moveaxis(scale, 0, row)
    return None


def _in_steps(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """``rows`` (n, m) as int8 steps and float32 scales (n,); None where they are not multiples."""
    largest = np.abs(rows).max(1).astype(np.float32)
    steps, scales = np.zeros(rows.shape, np.int8), np.zeros(len(rows), np.float32)
    left = np.arange(len(rows))
    for most in _STEPS_OF_LARGEST:
        scale = largest[left] / np.float32(most)
        tried = np.round(rows[left] / np.maximum(scale, np.finfo(np.float32).tiny)[:, None])
        fits = np.isclose(tried * scale[:, None], rows[left], rtol=_RELATIVE, atol=0).all(1)
        steps[left[fits]], scales[left[fits]] = tried[fits], scale[fits]
        left = left[~fits]
        if not len(left):
            return steps, scales
        if most == 1 and len(left) > 0.9 * len(rows):  # in no number of bits: not rounded at all
            return None
    return None
