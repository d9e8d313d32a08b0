"""Pieces of the dynamics transformer that are not attention masks or caches."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values), each (B, F, P, heads, head width) -> attended, the same shape."""


def sinusoid(level: Tensor, width: int = 256, period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of noise levels in [0, 1]: (...) -> (..., width)."""
    half = width // 2
    rates = torch.exp(-math.log(period) * torch.arange(half, device=level.device) / half)
    angles = 1000.0 * level[..., None].float() * rates
    return torch.cat((angles.cos(), angles.sin()), -1)


def rope_split(head_width: int) -> tuple[int, int, int]:
    """How many channels of a head rotate with time, height and width: 64 -> (8, 28, 28)."""
    time = max(2, head_width // 8 // 2 * 2)
    space = (head_width - time) // 4 * 2
    return head_width - 2 * space, space, space


class FrameRotation(nn.Module):
    """3-axis RoPE as cosines and sines; pairs of neighbouring channels rotate together.

    Rotations are relative, so absolute frame numbers may grow without bound; angles are computed in
    float64 to stay exact at any frame number.
    """

    def __init__(self, head_width: int, rows: int, columns: int, base: float = 256.0) -> None:
        """Build for a token grid of ``rows`` x ``columns`` a frame."""
        super().__init__()
        time, height, width = rope_split(head_width)

        def rates(channels: int) -> Tensor:
            return base ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)

        row = torch.arange(rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(rows)
        angles = torch.cat((row[:, None] * rates(height), column[:, None] * rates(width)), -1)
        space = torch.stack((angles.cos(), angles.sin()), -1).float()
        self.register_buffer("space", space, persistent=False)
        self.register_buffer("time_rates", rates(time), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrameRotation:
        """Follow the module to other devices, but never to another precision."""
        for name in ("space", "time_rates"):
            buffer = getattr(self, name)
            setattr(self, name, buffer.to(fn(buffer).device))
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """Frame numbers (B, F) -> float32 (B, F, P, 1, head width / 2, 2): cosine and sine."""
        assert isinstance(self.space, Tensor) and isinstance(self.time_rates, Tensor)
        angles = frames[..., None, None].double() * self.time_rates  # (B, F, 1, time / 2)
        time = torch.stack((angles.cos(), angles.sin()), -1).float()
        shape = (*frames.shape, len(self.space), -1, 2)
        return torch.cat((time.expand(shape), self.space.expand(shape)), -2).unsqueeze(-3)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate (..., heads, head width) by ``FrameRotation``'s cosines and sines."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # fuses better than complex arithmetic, which wins in eager
        (first, second), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm that in CPU inference takes four small operations instead of torch's ten.

    Where ``folded`` is set, its weight is somewhere else and not applied here.
    """

    folded = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        weight = None if self.folded else self.weight
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return functional.rms_norm(x, self.normalized_shape, weight, self.eps)
        width = x.shape[-1]
        assert self.eps is not None
        # sqrt(|x|^2 + d eps) = sqrt(d) * root mean square
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        length = torch.hypot(length, length.new_tensor(math.sqrt(width * self.eps)))
        x = x * (math.sqrt(width) / length)
        return x if weight is None else x * weight


def attend_packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of (B, heads, n, c) queries with an additive ``mask``.

    For batches of few queries torch's fused CPU kernel takes twice as long as plain products. Its
    softmax looks for the largest score first; here scores saturate at +-60 instead, where their
    exponentials still fit, and the few outputs are normalised rather than the many weights.
    """
    if q.device.type == "cpu" and len(q) > 2 and not torch.is_grad_enabled():
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        weights = scores.clamp_(-60, 60).add_(mask).exp_()
        return (weights @ v).div_(weights.sum(-1, keepdim=True))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Block(nn.Module):
    """RMSNorm, adaLN-zero, attention; RMSNorm, adaLN-zero, SwiGLU (arXiv 2506.01380)."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        """Build with the hidden width 8/3 ``width``, rounded up to a multiple of 256."""
        super().__init__()
        self.heads = heads
        hidden = -(-(8 * width) // (3 * 256)) * 256
        self.norm_attention = RMSNorm(width, eps=1e-6)
        self.norm_mlp = RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.qk_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None

    def forward(
        self, layer: int, x: Tensor, modulation: Tensor, rotation: Tensor, attend: Attend
    ) -> Tensor:
        """Tokens (B, F, P, d) with modulation (B, F, 1, 6, d) -> tokens (B, F, P, d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(-2)
        h = torch.addcmul(shift1, self.norm_attention(x), scale1)
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))
        qk, v = qkv[..., :2, :, :], qkv[..., 2, :, :]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = rotate(qk, rotation.unsqueeze(-4)).unbind(-3)
        attended = attend(layer, q, k, v).flatten(-2)
        x = torch.addcmul(x, gate1, self.project(attended))
        h = torch.addcmul(shift2, self.norm_mlp(x), scale2)
        gate, up = self.gate_up(h).chunk(2, -1)
        return torch.addcmul(x, gate2, self.down(functional.silu(gate) * up))
