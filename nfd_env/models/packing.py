"""CPU inference: layers with weights laid out once as oneDNN wants them, and memory that is kept.

``torch.nn.functional.linear`` and ``conv2d`` lay the weights out anew in every call, which for the
few rows of a streaming pass costs as much as the product itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.models.layers import SwiGLU

# From so many rows on, two products that finish their own outputs are faster than one product and
# two passes over its outputs.
_MANY_ROWS = 96


class PackedLinear(nn.Linear):
    """A linear layer for inference only; its ``weight`` is kept for saving, not for computing."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        """Pack ``linear`` for inputs of about ``rows`` rows."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = _pack(linear.weight, rows)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _linear(input, self._packed, self.bias)


class PackedSwiGLU(SwiGLU):
    """``SwiGLU`` for inference only, see ``PackedLinear``."""

    def __init__(self, layer: SwiGLU, rows: int) -> None:
        """Pack ``layer`` for inputs of about ``rows`` rows."""
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features // 2)
        self.weight = layer.weight
        self._both = _pack(layer.weight, rows)
        self._gate, self._up = (_pack(half, rows) for half in layer.weight.chunk(2))

    def forward(self, input: Tensor) -> Tensor:
        """(..., width) -> (..., hidden)."""
        if input[..., 0].numel() < _MANY_ROWS:
            gate, up = _linear(input, self._both, None).chunk(2, -1)
            return functional.silu(gate).mul_(up)
        gate = _linear(input, self._gate, None, "swish")
        return torch.ops.mkldnn._linear_pointwise.binary(input, gate, self._up, None, "mul")


def pack_linears(module: nn.Module, rows: int) -> None:
    """Replace every linear layer below ``module`` by a packed one, where this torch has them."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    packed = {nn.Linear: PackedLinear, SwiGLU: PackedSwiGLU}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) in packed and child.weight.device.type == "cpu":
                setattr(parent, name, packed[type(child)](child, rows))


def _pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


def _linear(input: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, packed, bias, activation, [], "")
