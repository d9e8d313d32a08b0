"""A network that several processes train: copies (DDP), or each a share of it (FSDP2).

What is stored is always whole, so that any number of processes goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from nfd_env.models.layers import Block
from nfd_env.training.ranks import Ranks

Loss = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, Tensor]]]


class NetworkLoss(nn.Module):
    """The loss of a network on a batch, as a module: that is what torch's wrappers take."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        """Of ``network``."""
        super().__init__()
        self.network, self._loss = network, loss

    def forward(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See ``nfd_env.training.loop.Stage.loss``."""
        return self._loss(self.network, batch)


def shared_loss(
    network: nn.Module, loss: Loss, ranks: Ranks, average: nn.Module | None = None
) -> nn.Module:
    """The loss as a module whose gradients are means over the processes.

    Args:
        network: which all processes have alike.
        loss: of it on a batch.
        ranks: the processes.
        average: of the network's weights, where processes keep shares of both and no copies: all
            of a weight is together only while it is needed.
    """
    module = NetworkLoss(network, loss)
    if ranks.count == 1:
        return module
    if average is not None:
        from torch.distributed.fsdp import fully_shard  # torch 2.6 and later

        for block in [m for m in network.modules() if isinstance(m, Block)]:
            fully_shard(block)
        fully_shard(module)
        fully_shard(average)
        return module
    # A judge that sets in later has no gradient before. Buffers are the same everywhere already.
    return nn.parallel.DistributedDataParallel(
        module, broadcast_buffers=False, find_unused_parameters=True
    )


def without_exchange(module: nn.Module) -> AbstractContextManager[Any]:
    """Keep the gradients of a part to oneself: they will be exchanged with the step's last part."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()  # shares are exchanged each time, or every process would need the whole


def _is_share(value: Any) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor, whose module takes a second to import


def whole(value: Any, keep: bool = True) -> Any:
    """State with all shares put together, in this process's memory; all processes must ask.

    Args:
        value: tensors in mappings and sequences.
        keep: for this process; the others take part and get nothing.
    """
    if isinstance(value, Mapping):
        return {name: whole(each, keep) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [whole(each, keep) for each in value]
    if not _is_share(value):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


def own_share(full: Tensor, like: Tensor) -> Tensor:
    """The share of ``full`` that this process has of ``like``; ``full`` where that is whole."""
    if not _is_share(like):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(full.to(like.device), mesh, placements, src_data_rank=None)


def own_shares(full: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """``own_share`` of each entry of a module's state."""
    return {k: own_share(v, like[k]) if k in like else v for k, v in full.items()}


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this process has."""
    return value.to_local() if _is_share(value) else value  # type: ignore[attr-defined]


def number(value: Tensor) -> float:
    """A scalar, also where the processes have terms of it."""
    return float(value.full_tensor() if _is_share(value) else value)  # type: ignore[attr-defined]
