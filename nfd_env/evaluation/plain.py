"""The dynamics transformer as plain PyTorch code of the paper's lineage has it.

A baseline for ``nfd bench --compare``, not for playing. It computes what ``Dynamics`` computes,
without what makes that fast here: every block has a linear layer of its own from the condition to
its six modulations and runs it for every token, norms are ``nn.RMSNorm`` with their weights, linear
layers are ``nn.Linear``, and attention is ``scaled_dot_product_attention`` over the concatenated
keys and values. Nothing in it is slower than it need be under these terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.evaluation.refilled import Following, RefilledModel
from nfd_env.inference.world_model import WorldModel
from nfd_env.models.cache import sees
from nfd_env.models.dynamics import Dynamics, DynamicsConfig, frames_before, local_motion
from nfd_env.models.layers import FrameRotation, by_token, rotate, sinusoid

KeysValues = tuple[Tensor, Tensor]
"""One block's keys and values, each (B, heads, tokens, head width)."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The affine map of adaLN."""
    return x * (1 + scale) + shift


class PlainBlock(nn.Module):
    """RMSNorm, adaLN-zero, attention; RMSNorm, adaLN-zero, SwiGLU, on a sequence of tokens."""

    def __init__(self, config: DynamicsConfig) -> None:
        """Build with the sizes of ``nfd_env.models.layers.Block``."""
        super().__init__()
        d = config.width
        hidden = -(-(8 * d) // (3 * 256)) * 256
        self.heads = config.heads
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.norm_attention = nn.RMSNorm(d, eps=1e-6)
        self.norm_mlp = nn.RMSNorm(d, eps=1e-6)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.project = nn.Linear(d, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)
        norm = nn.RMSNorm(d // config.heads, eps=1e-6) if config.qk_norm else nn.Identity()
        self.qk_norm = norm

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rotation: Tensor,
        past: KeysValues | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, KeysValues]:
        """Tokens and their conditions (B, n, d) -> tokens (B, n, d), their keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        h = modulate(self.norm_attention(x), shift1, scale1)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = (rotate(self.qk_norm(part), rotation).transpose(1, 2) for part in (q, k))
        made = k, v.transpose(1, 2)
        keys, values = made
        if past is not None:
            keys, values = (torch.cat(pair, 2) for pair in zip(past, made, strict=True))
        attended = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + gate1 * self.project(attended.transpose(1, 2).flatten(-2))
        h = modulate(self.norm_mlp(x), shift2, scale2)
        gate, up = self.gate_up(h).chunk(2, -1)
        return x + gate2 * self.down(functional.silu(gate) * up), made


class PlainDynamics(nn.Module):
    """The velocities of a ``Dynamics`` from its own weights, in plain PyTorch."""

    def __init__(self, dynamics: Dynamics, dtype: torch.dtype) -> None:
        """Copy the weights of ``dynamics`` as ``dtype``.

        A modulation that was cut down to a low rank is multiplied out to the full matrix again.
        """
        super().__init__()
        c = self.config = dynamics.config
        d, inputs = c.width, c.latent_channels * c.patch**2
        self.embed = nn.Linear(inputs, d)
        self.embed_level = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.embed_action = nn.Sequential(nn.Linear(c.action_width, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(d, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.output = nn.Linear(d, dynamics.output.out_features)
        # The dynamics' own may be packed already.
        self.local = local_motion(c)
        rows, columns = c.latent_height // c.patch, c.latent_width // c.patch
        self.rotation = FrameRotation(d // c.heads, rows, columns)
        self.load_state_dict(_plain_weights(dynamics))
        self.to(dynamics.embed.weight.device, dtype).requires_grad_(False).eval()

    def forward(
        self,
        latents: Tensor,
        levels: Tensor,
        actions: Tensor,
        past: Sequence[KeysValues] | None = None,
        before: tuple[Tensor, Tensor] | None = None,
        filling: bool = False,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Velocities of F frames, of which the last sees all that there are.

        Args:
            latents: (B, F, C, h, w).
            levels: (B, F) in [0, 1].
            actions: (B, F, action_width).
            past: keys and values of each block for the frames before; None when there are none.
            before: see ``frames_before``, of these frames.
            filling: only keys and values are wanted.

        Returns:
            Velocities (B, F, C, h, w), or anything when ``filling``, and each block's keys and
            values of these frames.
        """
        dtype, tokens, count = self.embed.weight.dtype, self.config.tokens, latents.shape[1]
        first = 0 if past is None else past[0][0].shape[2] // tokens
        x = self.embed(_patchify(latents.to(dtype), self.config.patch))
        condition = self.embed_level(sinusoid(levels).to(dtype))
        condition = condition + self.embed_action(actions.to(dtype))
        frame_condition = condition
        condition = condition.repeat_interleave(tokens, 1)
        numbers = torch.arange(first, first + count, device=latents.device)
        rotation = self.rotation(numbers[None]).flatten(1, 2)
        mask = self._mask(numbers, first) if count > 1 else None
        made = []
        for layer, block in enumerate(self.blocks):
            x, kept = block(x, condition, rotation, None if past is None else past[layer], mask)
            made.append(kept)
        if filling:
            return x, made
        shift, scale = self.modulation(condition).chunk(2, -1)
        output = _unpatchify(self.output(modulate(self.norm(x), shift, scale)), self.config)
        if self.local is None:
            return output.to(latents.dtype), made
        before = before or frames_before(latents, levels, self.config.recent)
        return self.local(output, latents, levels, frame_condition, before)[0], made

    def _mask(self, numbers: Tensor, before: int) -> Tensor:
        """Whether each token sees each key, of ``before`` earlier frames and of ``numbers``."""
        seen = sees(numbers[:, None], numbers[None], self.config.window)
        return by_token(functional.pad(seen, (before, 0), value=True), self.config.tokens)


class PlainModel(RefilledModel):
    """Steps like ``RefilledModel``, through ``PlainDynamics``."""

    def __init__(self, model: WorldModel, dtype: torch.dtype) -> None:
        """Take the weights of ``model`` as ``dtype``, and its sampling."""
        super().__init__(model)
        self.plain = PlainDynamics(model.dynamics, dtype)

    def _filled(self, past: Tensor, levels: Tensor, into: Tensor) -> Following:
        _, cache = self.plain(past, levels, into, filling=True)
        recent = self.dynamics.config.recent

        def following(x: Tensor, at: Tensor, actions: Tensor) -> Tensor:
            """Of one frame."""
            frames, noise = frames_before(
                torch.cat((past, x), 1), torch.cat((levels, at), 1), recent
            )
            return self.plain(x, at, actions, cache, (frames[:, -1:], noise[:, -1:]))[0]

        return following


def _patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, F, C, h, w) -> (B, F * P, C * patch^2)."""
    patches = functional.pixel_unshuffle(latents, patch)  # B F C*p*p h/p w/p
    return patches.flatten(3).transpose(2, 3).flatten(1, 2)


def _unpatchify(tokens: Tensor, c: DynamicsConfig) -> Tensor:
    """(B, F * P, C * patch^2) -> (B, F, C, h, w)."""
    grid = tokens.unflatten(1, (-1, c.tokens)).transpose(2, 3)
    grid = grid.unflatten(3, (c.latent_height // c.patch, c.latent_width // c.patch))
    return functional.pixel_shuffle(grid, c.patch)


def _plain_weights(dynamics: Dynamics) -> dict[str, Tensor]:
    """The state of ``dynamics`` with one full modulation a block and one before the output."""
    trained = {k: v.float() for k, v in dynamics.state_dict().items()}
    state = {k: v for k, v in trained.items() if not k.startswith("modulation.")}
    if dynamics.config.modulation_rank:
        weight = trained["modulation.1.weight"] @ trained["modulation.0.weight"]
        bias = trained["modulation.1.bias"]
    else:
        weight, bias = trained["modulation.weight"], trained["modulation.bias"]
    sizes = [6 * dynamics.config.width] * dynamics.config.layers + [2 * dynamics.config.width]
    names = [*(f"blocks.{layer}." for layer in range(dynamics.config.layers)), ""]
    for name, part, offset in zip(names, weight.split(sizes), bias.split(sizes), strict=True):
        state[f"{name}modulation.1.weight"], state[f"{name}modulation.1.bias"] = part, offset
    return state
