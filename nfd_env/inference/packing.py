"""CPU inference: layers with weights laid out once as oneDNN wants them, and memory that is kept.

``torch.nn.functional.linear`` and ``conv2d`` lay the weights out anew in every call, which for the
few rows of a streaming pass costs as much as the product itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.models.layers import SwiGLU
from nfd_env.models.tokenizer import ResidualBlock

# So many frames are worth laying the weights out anew, for their number.
_MANY_FRAMES = 16


class _Packed(nn.Module, ABC):
    """Lays its weights out anew where a copy is made: what torch laid out cannot be copied."""

    _LAID_OUT: tuple[str, ...] = ("_packed",)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self._LAID_OUT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lay_out()

    @abstractmethod
    def _lay_out(self) -> None:
        """Lay out the weights, under the names of ``_LAID_OUT``."""


class PackedLinear(_Packed, nn.Linear):
    """A linear layer for inference only; its ``weight`` is kept for saving, not for computing."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        """Pack ``linear`` for inputs of about ``rows`` rows."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self._rows = linear.weight, linear.bias, rows
        self._lay_out()

    def _lay_out(self) -> None:
        self._packed = _pack(self.weight, self._rows)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _linear(input, self._packed, self.bias)


class PackedSwiGLU(_Packed, SwiGLU):
    """``SwiGLU`` for inference only, see ``PackedLinear``."""

    _LAID_OUT = ("_gate", "_up")

    def __init__(self, layer: SwiGLU, rows: int) -> None:
        """Pack ``layer`` for inputs of about ``rows`` rows."""
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features // 2)
        self.weight, self._rows = layer.weight, rows
        self._lay_out()

    def _lay_out(self) -> None:
        self._gate, self._up = (_pack(half, self._rows) for half in self.weight.chunk(2))

    def forward(self, input: Tensor) -> Tensor:
        """(..., width) -> (..., hidden)."""
        # The same operations however many rows there are: one product of both halves is a little
        # faster for few, but rounds elsewhere, and in bf16 a rollout would depend on the size of
        # its batch.
        gate = _linear(input, self._gate, None, "swish")
        return gate.mul_(_linear(input, self._up, None))


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution for inference only, see ``PackedLinear``."""

    def __init__(self, layer: nn.Conv2d, many: float = _MANY_FRAMES) -> None:
        """Pack ``layer`` when it is first called, for the size of the picture that comes.

        From ``many`` pictures on, the weights are laid out anew.
        """
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            device="meta",
        )
        self.weight, self.bias, self._many = layer.weight, layer.bias, many
        self._lay_out()

    def _lay_out(self) -> None:
        self._packed: Tensor | None = None  # for the size of the picture that comes first

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        if len(input) >= self._many:
            return super().forward(input)
        return self.pointwise(input)

    def pointwise(self, input: Tensor, activation: str = "none") -> Tensor:
        """The convolution followed by an activation."""
        return torch.ops.mkldnn._convolution_pointwise(
            input, *self._arguments(input), activation, [], ""
        )

    def added(self, input: Tensor, other: Tensor) -> Tensor:
        """The convolution plus ``other``."""
        return torch.ops.mkldnn._convolution_pointwise.binary(
            input, other, *self._arguments(input), "add", None, None, [], None
        )

    def _arguments(self, input: Tensor) -> tuple[Any, ...]:
        shape = (self.padding, self.stride, self.dilation, self.groups)
        if self._packed is None:
            self._packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(
                self.weight.detach().to_mkldnn(), *shape, list(input.shape)
            )
        return self._packed, self.bias, *shape


class PackedResidualBlock(ResidualBlock):
    """``ResidualBlock`` for inference only; few frames take three operations instead of five."""

    def __init__(self, block: ResidualBlock) -> None:
        """Pack ``block``."""
        nn.Module.__init__(self)
        self.first, self.second = PackedConv2d(block.first), PackedConv2d(block.second)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        if len(x) >= _MANY_FRAMES:
            return super().forward(x)
        h = self.first.pointwise(functional.silu(x), "swish")
        return self.second.added(h, x)


def pack_convolutions(module: nn.Module, many: float = _MANY_FRAMES) -> None:
    """Replace the convolutions below ``module`` by packed ones, where this torch has them.

    Args:
        module: the parent.
        many: see ``PackedConv2d``; infinite where the operations must not depend on the number of
            rows, because their rounding comes back in the next step.
    """
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return
    packed = {nn.Conv2d: lambda c: PackedConv2d(c, many), ResidualBlock: PackedResidualBlock}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) in packed and next(child.parameters()).device.type == "cpu":
                setattr(parent, name, packed[type(child)](child))


def keep_freed_memory() -> None:
    """Let freed memory be used again without the operating system clearing it anew.

    glibc gives large blocks back at once, and every operation on a large batch then waits for fresh
    pages. It stops once a block of nearly 32 MiB, its upper bound, was freed (mallopt(3),
    M_MMAP_THRESHOLD); such a block costs nothing, since nobody writes to it.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


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
