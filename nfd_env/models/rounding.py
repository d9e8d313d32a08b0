"""Weights in few bits: each row is rounded to multiples of a scale of its own, and packed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

FEWEST_BITS, MOST_BITS = 4, 8

# Parts of a row's largest weight that its largest step may stand for: below 8 bits, what is lost
# of a few large weights is less than what finer steps bring the many small ones.
_CLIPPED = [n / 20 for n in range(10, 21)]
_DAMPING = 0.01  # of the inputs' mean square: directions that hardly occurred are not relied on


@dataclass(frozen=True)
class Rounded:
    """A network's matrices and kernels in few bits; ``nfd_env.models.weights`` writes them.

    Attributes:
        bits: a weight has, from 4 to 8.
        steps: name of a tensor -> int8 of its shape, in [1 - 2**(bits - 1), 2**(bits - 1) - 1].
        scales: its name -> float32 (rows,), what a step of each row stands for.
    """

    bits: int
    steps: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    def applied(self, network: M) -> M:
        """A copy of ``network`` with these weights."""
        rounded = copy.deepcopy(network)
        with torch.no_grad():
            for name, tensor in rounded.state_dict().items():
                if name in self.steps:
                    tensor.copy_(from_steps(self.steps[name], self.scales[name]))
        return rounded


@torch.no_grad()
def round_weights(
    network: nn.Module, bits: int = MOST_BITS, run: Callable[[Any], Any] | None = None
) -> Rounded:
    """Round each row of a matrix, and each output of a kernel, to ``2**bits - 1`` multiples.

    For 8 bits they are multiples of the row's largest weight / 127, so that without ``run`` no
    weight is off by more than 1/254 of it; for fewer, of the scale with the least mean squared
    error of eleven.

    Args:
        network: stays as it is.
        bits: from 4 to 8.
        run: calls the network with what it usually sees. Where it is given, each weight of a
            linear layer is rounded so that it makes up for what the layer's outputs lost by those
            before it (GPTQ, arXiv 2210.17323), which is worth about one bit.
    """
    inputs = {} if run is None else _squares_of_inputs(network, run)
    steps, scales = {}, {}
    for name, tensor in network.state_dict().items():
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point() and tensor.ndim >= 2 and tensor[0].numel() >= 16:
            # In others the scales would take as much as is saved.
            rows = tensor.float().flatten(1)
            found, scale = _nearest(rows, bits)
            if name in inputs:
                found = _compensated(rows, scale, bits, inputs[name])
            steps[name] = found.to(torch.int8).view(tensor.shape)
            scales[name] = scale.flatten()
    return Rounded(bits, steps, scales)


def _nearest(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Steps (rows, n) and scales (rows, 1)."""
    top = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * top)
    best = None
    for part in _CLIPPED if bits < MOST_BITS else [1.0]:
        scale = largest * (part / top)
        steps = (rows / scale).round().clamp(-top, top)
        error = (steps * scale - rows).square().sum(1, keepdim=True)
        if best is None:
            best = error, steps, scale
        else:
            better = error < best[0]
            new = error, steps, scale
            best = tuple(torch.where(better, n, o) for n, o in zip(new, best, strict=True))
    assert best is not None
    return best[1], best[2]


def _squares_of_inputs(network: nn.Module, run: Callable[[Any], Any]) -> dict[str, Tensor]:
    """The sum of x x^T of a linear layer's inputs x, by the name of its weight."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = inputs[0].detach().cpu().float().flatten(0, -2)
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return add

    handles = [
        module.register_forward_hook(hook(f"{name}.weight"))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        run(network)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _compensated(rows: Tensor, scale: Tensor, bits: int, inputs: Tensor) -> Tensor:
    """Steps (rows, n), rounded one column after the other, those with the largest inputs first.

    Args:
        rows: weights (rows, n).
        scale: (rows, 1).
        bits: of a weight.
        inputs: sum of x x^T of the layer's inputs, (n, n).
    """
    top = 2 ** (bits - 1) - 1
    order = inputs.diag().argsort(descending=True, stable=True)
    left, squares = rows[:, order].double(), inputs[order][:, order].double()
    size = scale[:, 0].double()
    squares.diagonal().add_(_DAMPING * squares.diag().mean().clamp_min(1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(squares))
    upper = torch.linalg.cholesky(inverse, upper=True)
    steps = torch.empty_like(left)
    for column in range(left.shape[1]):
        steps[:, column] = (left[:, column] / size).round().clamp(-top, top)
        error = (left[:, column] - steps[:, column] * size) / upper[column, column]
        left[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    back = torch.empty_like(steps)
    back[:, order] = steps
    return back


def from_steps(steps: Tensor, scale: Tensor) -> Tensor:
    """Weights, float32, the shape of ``steps``, each row times its ``scale`` (rows,)."""
    return (steps.float().flatten(1) * scale[:, None]).view(steps.shape)


def pack(steps: Tensor, bits: int) -> Tensor:
    """``steps`` with ``bits`` bits each, uint8 (rows, bytes)."""
    whole = (steps.flatten(1).numpy() + (2 ** (bits - 1) - 1)).astype(np.uint8)
    digits = np.unpackbits(whole[..., None], axis=-1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(digits.reshape(len(whole), -1), axis=1))


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """What ``pack`` was given, int8.

    Raises:
        ValueError: when ``packed`` is not ``pack``'s for such ``bits`` and ``shape``.
    """
    numbers = math.prod(shape[1:])
    if not FEWEST_BITS <= bits < MOST_BITS or min(shape, default=0) < 1 or len(shape) < 2:
        raise ValueError(f"{bits} bits a weight of the shape {list(shape)}")
    if packed.dtype != torch.uint8 or packed.shape != (shape[0], -(-numbers * bits // 8)):
        raise ValueError(f"{tuple(packed.shape)} bytes for weights of the shape {list(shape)}")
    digits = np.unpackbits(packed.numpy(), axis=1, count=numbers * bits)
    whole = np.packbits(digits.reshape(*shape, bits), axis=-1, bitorder="little")[..., 0]
    top = 2 ** (bits - 1) - 1
    if whole.max() > 2 * top:
        raise ValueError(f"a number above {2 * top}")
    return torch.from_numpy(whole.astype(np.int8) - np.int8(top))
