"""An adaLN projection of fewer parameters that does the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.models.dynamics import Dynamics
from nfd_env.models.layers import sinusoid


@torch.no_grad()
def with_low_rank(network: Dynamics, actions: Tensor, rank: int) -> tuple[Dynamics, float]:
    """A copy of ``network`` whose adaLN projection has the given rank.

    The projection only ever sees conditions made of one noise level and one action, which span few
    dimensions, so most of its parameters (a third of a small model's) do nothing.

    Args:
        network: with a full projection.
        actions: (n, action_width), encoded actions that the world can meet.
        rank: of the new projection.

    Returns:
        The copy, and the relative error (root mean square) of the modulation it gives.
    """
    full = network.modulation
    assert isinstance(full, nn.Linear) and full.bias is not None
    levels = torch.linspace(0, 1, 129, dtype=torch.float32, device=full.weight.device)
    condition = network.embed_level(sinusoid(levels))[:, None] + network.embed_action(actions)
    inputs = functional.silu(condition).flatten(0, 1)
    outputs = (inputs @ full.weight.T).double()
    # Leading left singular vectors of weight @ inputs^T, through the small Gram matrix.
    basis = torch.linalg.svd(full.weight.double() @ _root(inputs), full_matrices=False).U[:, :rank]
    copy = Dynamics(replace(network.config, modulation_rank=rank))
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("modulation.")}
    state["modulation.0.weight"] = (basis.T @ full.weight.double()).float()
    state["modulation.1.weight"] = basis.float()
    state["modulation.1.bias"] = full.bias
    copy.load_state_dict(state)
    error = (outputs @ basis @ basis.T - outputs).norm() / outputs.norm()
    return copy.eval(), float(error)


def _root(inputs: Tensor) -> Tensor:
    """(X^T X)^(1/2), in float64."""
    values, vectors = torch.linalg.eigh((inputs.T @ inputs).double())
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
