"""Linear layers for CPU inference, with weights laid out once as oneDNN wants them.

``torch.nn.functional.linear`` lays the weights out anew in every call, which for the few rows of a
streaming pass costs as much as the product itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """A linear layer for inference only; its ``weight`` is kept for saving, not for computing."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        """Pack ``linear`` for inputs of about ``rows`` rows."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")


def pack_linears(module: nn.Module, rows: int) -> None:
    """Replace every linear layer below ``module`` by a packed one, where this torch has them."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child, rows))
