"""The optimisers of the loop: AdamW, or Muon for the matrices of a transformer's blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nfd_env.training.sharing import own_share

OPTIMISERS = ("adamw", "muon")


def has_muon() -> bool:
    """Whether this torch has Muon (2.9 and later have)."""
    return hasattr(torch.optim, "Muon")


class Optimiser:
    """One optimiser, or Muon and AdamW side by side, for the parameters of one network.

    Muon (Jordan 2024) orthogonalises the momentum of each matrix, here scaled so that its steps are
    as large as AdamW's (arXiv 2502.16982), and one learning rate serves both. It is for hidden
    matrices; embeddings, outputs, norms and convolutions stay with AdamW.
    """

    def __init__(self, network: nn.Module, kind: str, weight_decay: float) -> None:
        """Of the parameters of ``network`` that are trained; rates are set at each step.

        Args:
            network: its ``blocks``, if it has some, are what Muon is for.
            kind: one of ``OPTIMISERS``.
            weight_decay: on matrices only.

        Raises:
            ValueError: when Muon is asked for and torch does not have it, or there are no matrices
                for it.
        """
        blocks: Any = getattr(network, "blocks", None)
        trained = [p for p in network.parameters() if p.requires_grad]
        hidden: list[nn.Parameter] = []
        if kind == "muon":
            if not has_muon():
                raise ValueError("optimiser muon needs torch 2.9 or later; adamw does not")
            if isinstance(blocks, nn.Module):
                hidden = [p for p in blocks.parameters() if p.requires_grad and p.ndim == 2]
            if not hidden:
                raise ValueError(
                    "optimiser muon is for transformers; this stage's network takes adamw"
                )
        taken = {id(p) for p in hidden}
        rest = [p for p in trained if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99))
        ]
        if hidden:
            self._parts.append(
                torch.optim.Muon(
                    hidden, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )

    def step(self, rate: float) -> None:
        """Change the parameters by their gradients, at a learning rate."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint; that of AdamW alone is AdamW's own."""
        first, *others = [part.state_dict() for part in self._parts]
        return {**first, "others": others} if others else first

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: when it is of another kind.
        """
        others = state.get("others", [])
        if len(others) + 1 != len(self._parts):
            raise ValueError("it was trained with another optimiser")
        first = {name: value for name, value in state.items() if name != "others"}
        for part, stored in zip(self._parts, (first, *others), strict=True):
            part.load_state_dict(stored)
            for parameter, values in part.state.items():
                for name, value in values.items():
                    if value.shape == parameter.shape:
                        values[name] = own_share(value, parameter)
