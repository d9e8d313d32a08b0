"""Attention of frames that see another, almost clean copy of the frames before them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nfd_env.models.cache import sees
from nfd_env.models.layers import Attend, by_token


def attend_two_copies(frames: Tensor, tokens: int, window: int) -> Attend:
    """Attention of [history | noisy] frames without the parts of the mask that are empty.

    Frames are cut into chunks as long as the window, so that the latest frames of any frame are
    in its own chunk and the one before. Written with plain softmax: forward-mode
    differentiation has no rule for fused kernels.

    Args:
        frames: int64 (T,), their numbers.
        tokens: of a frame.
        window: a frame sees itself and at most ``window`` - 1 frames right before it.
    """
    count = len(frames)
    chunk = min(count, window)
    missing = -count % chunk
    # Queries in chunks (n, chunk), and the numbers of the keys that each chunk may see.
    numbers = functional.pad(frames, (0, missing), value=-1).unflatten(0, (-1, chunk))
    close = _and_before(numbers, -1)
    query = numbers[..., None]
    near = sees(query, close[:, None], window) & (close >= 0)[:, None]
    new_mask = near & (close[:, None] != query)
    # What pads the last chunk sees something, so that its softmax is finite; it is cut off.
    old_mask = near | (query < 0)
    old_mask, new_mask = by_token(old_mask, tokens), by_token(new_mask, tokens)
    new_mask = torch.cat((new_mask, new_mask.new_ones((*new_mask.shape[:2], tokens))), -1)

    def chunks(x: Tensor) -> Tensor:
        """(B, T, P, heads, c) -> (B, heads, n, chunk * P, c)."""
        x = functional.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)).unflatten(1, (-1, chunk))
        return x.permute(0, 4, 1, 2, 3, 5).flatten(3, 4)

    def seen(x: Tensor) -> Tensor:
        """History (B, T, P, heads, c) -> what each chunk sees (B, heads, n, keys, c)."""
        return _and_before(chunks(x), 0, 2, 3)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.to(v.dtype) * q.shape[-1] ** -0.5, k.to(v.dtype)
        keys, values = seen(k[:, :count]), seen(v[:, :count])
        made = []
        if q.shape[1] > count:
            made.append(_softmax(chunks(q[:, :count]) @ keys.mT, old_mask) @ values)
        # Each noisy frame's own tokens: (B, heads, n, chunk, P, P) scores.
        noisy_q, frame_k, frame_v = (
            chunks(x[:, -count:]).unflatten(3, (chunk, tokens)) for x in (q, k, v)
        )
        own = (noisy_q @ frame_k.mT).flatten(3, 4)
        scores = torch.cat((noisy_q.flatten(3, 4) @ keys.mT, own), -1)
        weights = _softmax(scores, new_mask)
        noisy = weights[..., :-tokens] @ values
        own_weights = weights[..., -tokens:].unflatten(3, (chunk, tokens))
        noisy = noisy + (own_weights @ frame_v).flatten(3, 4)
        made.append(noisy)
        out = torch.cat([x.flatten(2, 3)[:, :, : count * tokens] for x in made], 2)
        return out.transpose(1, 2).unflatten(1, (-1, tokens)).flatten(-2)

    return attend


def _and_before(chunks: Tensor, fill: int, dim: int = 0, along: int = 1) -> Tensor:
    """Each chunk behind the one before it, joined ``along`` an axis; ``fill`` before the first."""
    if chunks.shape[dim] == 1:
        return chunks
    first = torch.full_like(chunks.narrow(dim, 0, 1), fill)
    before = torch.cat((first, chunks.narrow(dim, 0, chunks.shape[dim] - 1)), dim)
    return torch.cat((before, chunks), along)


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(scores.dtype)
