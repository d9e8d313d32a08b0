"""Pieces of the dynamics transformer that are not attention masks or caches."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values), each (B, F, P, heads, head width) -> (B, F, P, d).

Queries and keys come in float32, values in the network's number format. There may be fewer frames
of queries; then they are the last frames'.
"""


def sinusoid(level: Tensor, width: int = 256, period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of noise levels in [0, 1]: (...) -> (..., width)."""
    half = width // 2
    steps = torch.arange(half, device=level.device, dtype=torch.float32)
    rates = torch.exp(-math.log(period) * steps / half)
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
        self.space = self.space.to(fn(self.space).device)
        exact = "cpu" if self.space.device.type == "mps" else self.space.device  # no float64 there
        self.time_rates = self.time_rates.to(exact)
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """Frame numbers (B, F) -> float32 (B, F, P, 1, head width / 2, 2): cosine and sine."""
        assert isinstance(self.space, Tensor) and isinstance(self.time_rates, Tensor)
        numbers = frames[..., None, None].to(self.time_rates.device, torch.float64)
        angles = numbers * self.time_rates  # (B, F, 1, time / 2)
        time = torch.stack((angles.cos(), angles.sin()), -1).float().to(frames.device)
        shape = (*frames.shape, len(self.space), -1, 2)
        return torch.cat((time.expand(shape), self.space.expand(shape)), -2).unsqueeze(-3)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate (..., heads, head width) by ``FrameRotation``'s cosines and sines."""
    return rotate_float(x, rotation).to(x.dtype)


def rotate_float(x: Tensor, rotation: Tensor) -> Tensor:
    """``rotate`` whose result is float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # fuses better than complex arithmetic, which wins in eager
        (first, second), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2)


class RMSNorm(nn.RMSNorm):
    """RMSNorm that in CPU inference takes four small operations instead of torch's ten.

    Where ``folded`` is set, its weight is somewhere else and not applied here.
    """

    folded = False
    root: Tensor
    floor: Tensor

    def __init__(self, width: int, eps: float, elementwise_affine: bool = True) -> None:
        """Build for ``width`` channels."""
        super().__init__(width, eps=eps, elementwise_affine=elementwise_affine)
        # Tensors because torch takes no plain numbers there, or two operations for one.
        for name, value in (("root", width), ("floor", width * eps)):
            number = torch.tensor(math.sqrt(value), dtype=torch.float32)
            self.register_buffer(name, number, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        weight = None if self.folded else self.weight
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return functional.rms_norm(x, self.normalized_shape, weight, self.eps)
        # sqrt(|x|^2 + d eps) = sqrt(d) * root mean square
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x = x * (self.root / torch.hypot(length, self.floor))
        return x if weight is None else x * weight


class SwiGLU(nn.Linear):
    """silu(first half) * second half of a linear layer's outputs."""

    def __init__(self, width: int, hidden: int) -> None:
        """Build from ``width`` to ``hidden`` channels."""
        super().__init__(width, 2 * hidden, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., width) -> (..., hidden)."""
        gate, up = super().forward(input).chunk(2, -1)
        return functional.silu(gate) * up


def by_token(seen: Tensor, tokens: int) -> Tensor:
    """What frames see of frames (..., F, n) -> what their tokens see (..., F * P, n * P)."""
    return seen.repeat_interleave(tokens, -2).repeat_interleave(tokens, -1)


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of the last frames among frames that are all at hand.

    Args:
        q: (B, F, P, heads, c), of any number format.
        k: (B, n, P, heads, c), n >= F.
        v: like ``k``.
        mask: bool (n * P, n * P), whether each token sees each other.
        scale: of the scores; None for 1 / sqrt(c).

    Returns:
        (B, F, P, heads * c), in the format of ``v``.
    """
    tokens = q.shape[2]
    q, k, v = (x.to(v.dtype).flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    seen = mask[-q.shape[2] :]
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return out.transpose(1, 2).unflatten(1, (-1, tokens)).flatten(-2)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention without a scale: that is in the queries already.

    For few queries torch's fused CPU kernel takes longer than plain products. Its softmax looks for
    the largest score first; here scores saturate at 60 instead, where their exponentials still fit,
    and the few outputs are normalised rather than the many weights.

    Args:
        q: (B, F, P, heads, c), of any number format.
        k: (B, heads, n, c).
        v: like ``k``.
        mask: (B, heads, F * P, n), added to the scores; -inf hides.

    Returns:
        (B, F, P, heads * c), in the format of ``v``.
    """
    batch, frames, tokens, heads, width = q.shape
    queries = q.permute(0, 3, 1, 2, 4).to(k.dtype, memory_format=torch.contiguous_format)
    queries = queries.reshape(batch, heads, frames * tokens, width)
    if q.device.type != "cpu" or torch.is_grad_enabled():
        out = functional.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=1.0)
    else:
        queries, k, v, mask = (x.flatten(0, 1) for x in (queries, k, v, mask))
        weights = torch.baddbmm(mask, queries, k.mT).clamp_(max=60).exp_()
        total = weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).tiny)
        out = torch.bmm(weights, v).div_(total)
    out = out.view(batch, heads, frames, tokens, width).permute(0, 2, 3, 1, 4)
    return out.flatten(-2)


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
        self.gate_up = SwiGLU(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.qk_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None

    def forward(
        self,
        layer: int,
        x: Tensor,
        modulation: Tensor,
        rotation: Tensor,
        attend: Attend,
        skip: int = 0,
    ) -> Tensor:
        """Tokens (B, F, P, d) -> tokens (B, F - skip, P, d).

        Args:
            layer: number of this block, for ``attend``.
            x: (B, F, P, d).
            modulation: (B, F, 1, 6, d).
            rotation: (B, F, P, 2 or 1, 1, head width / 2, 2), of queries and keys.
            attend: the attention.
            skip: of so many first frames only keys and values are wanted.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(-2)
        h = torch.addcmul(shift1, self.norm_attention(x), scale1)
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))
        qk, v = qkv[..., :2, :, :], qkv[..., 2, :, :]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = rotate_float(qk, rotation).unbind(-3)
        if skip:
            q, x, gate1, shift2, scale2, gate2 = (
                part[:, skip:] for part in (q, x, gate1, shift2, scale2, gate2)
            )
        x = torch.addcmul(x, gate1, self.project(attend(layer, q, k, v)))
        h = torch.addcmul(shift2, self.norm_mlp(x), scale2)
        return torch.addcmul(x, gate2, self.down(self.gate_up(h)))
