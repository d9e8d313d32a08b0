"""The optimisers of the loop: AdamW, or Muon for the matrices of a transformer's blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nfd_env.precision import multiplies_bf16
from nfd_env.training.sharing import own_share

OPTIMISERS = ("adamw", "muon")


def has_muon() -> bool:
    """Whether this torch has Muon (2.9 and later have)."""
    return hasattr(torch.optim, "Muon")


if has_muon():

    class _Float32Muon(torch.optim.Muon):
        """Torch's own, but in fp32, for processors without instructions for bf16.

        Torch's multiplies in bf16 whatever the parameters are, which on a CPU that has AVX2 only
        took nine of a training step's ten seconds.
        """

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            """See torch; of gradients that are there."""
            for group in self.param_groups:
                for parameter in group["params"]:
                    gradient = parameter.grad
                    if gradient is None:
                        continue
                    state = self.state[parameter]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(gradient)
                    momentum = state["momentum_buffer"]
                    momentum.lerp_(gradient, 1 - group["momentum"])
                    update = gradient.lerp(momentum, group["momentum"])  # Nesterov's
                    update = _orthogonalised(
                        update, group["ns_coefficients"], group["ns_steps"], group["eps"]
                    )
                    rate = 0.2 * math.sqrt(max(parameter.shape)) * group["lr"]  # match_rms_adamw
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-rate)


def _orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, least: float
) -> Tensor:
    """``matrix`` with singular values near 1, by Newton-Schulz steps (Jordan 2024)."""
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=least)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


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
            muon = torch.optim.Muon if multiplies_bf16(hidden[0].device) else _Float32Muon
            self._parts.append(
                muon(hidden, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
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
