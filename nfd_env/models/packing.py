"""Linear layers for CPU inference, with weights laid out once as oneDNN wants them.

``torch.nn.functional.linear`` lays the weights out anew in every call, which for the few rows of a
streaming pass costs as much as the product itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer whose weights can no longer be read or trained."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        """Pack ``linear`` for inputs of about ``rows`` rows."""
        super().__init__()
        self.out_features = linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


def pack_linears(module: nn.Module, rows: int) -> None:
    """Replace every linear layer below ``module`` by a packed one, where this torch has them."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child, rows))
