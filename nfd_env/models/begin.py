"""Weights to begin with that a network of the same make has learned elsewhere."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def begin_with(network: nn.Module, other: nn.Module) -> None:
    """Take over from ``other`` what both networks have.

    Where ``network`` has more channels, it computes what ``other`` did: its further channels are
    left as they are, and what they do to the known ones is zero. Where it has fewer, the first of
    them are taken.

    Raises:
        ValueError: when the networks have other parts, or kernels of other sizes.
    """
    mine, its = network.state_dict(), other.state_dict()
    if mine.keys() != its.keys():
        raise ValueError("has another number of levels or blocks")
    for name, tensor in mine.items():
        learned = its[name]
        if learned.ndim != tensor.ndim or learned.shape[2:] != tensor.shape[2:]:
            raise ValueError(f"has a {name} of shape {tuple(learned.shape)}")
    for name, tensor in mine.items():
        learned = its[name]
        both = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, learned.shape, strict=True))
        if tensor.ndim >= 2:
            tensor[both[0], learned.shape[1] :] = 0
        tensor[both] = learned[both]
