"""The block-causal diffusion transformer that predicts the next frame's velocity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.config import check_ranges, config_class
from nfd_env.models.cache import FillingAttention, FrameCache, RingAttention, in_turn, sees
from nfd_env.models.layers import (
    Attend,
    Block,
    FrameRotation,
    RMSNorm,
    attend_masked,
    by_token,
    sinusoid,
)
from nfd_env.models.local import GroupNorm, LocalMotion
from nfd_env.models.two_copies import attend_two_copies

CONTEXT = 32  # channels of the map that the transformer makes for the convolutions


@config_class
class DynamicsConfig:
    """Sizes of the dynamics transformer.

    Attributes:
        latent_channels: channels of the tokenizer's latents.
        latent_height: rows of the latent grid.
        latent_width: columns of the latent grid.
        patch: latents per token along each side.
        action_width: length of an encoded action, see ``nfd_env.spaces.ActionCodec``.
        width: token width d.
        layers: transformer blocks.
        heads: attention heads.
        window: a frame attends to itself and to at most ``window`` - 1 frames right before it.
        qk_norm: normalise queries and keys.
        modulation_rank: rank of the adaLN projection; 0 for a full matrix. See
            ``nfd_env.models.low_rank``.
        recent: so many frames before each are inputs of convolutions behind the transformer, which
            put out how far the velocity is from what the frame before lets one guess, see
            ``nfd_env.models.local`` and ``nfd_env.flow.persistence``; 0 for the transformer alone.
        local_width: channels of these convolutions.
        local_blocks: residual blocks of two each.
        stillness: the share of change below which what they put out is hardly believed, but in
            training, see ``nfd_env.flow.persistence.trusted``; 0 believes all.
    """

    latent_channels: int = 16
    latent_height: int = 6
    latent_width: int = 8
    patch: int = 2
    action_width: int = 3
    width: int = 256
    layers: int = 6
    heads: int = 4
    window: int = 16
    qk_norm: bool = False
    modulation_rank: int = 0
    recent: int = 0
    local_width: int = 64
    local_blocks: int = 4
    stillness: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges, and that the sizes divide."""
        some = "[1, inf)"
        check_ranges(self, latent_channels=some, latent_height=some, latent_width=some)
        check_ranges(self, patch=some, action_width=some, width=some, layers=some, heads=some)
        check_ranges(self, modulation_rank="[0, inf)")
        if self.latent_height % self.patch or self.latent_width % self.patch:
            raise ValueError("patch must divide latent_height and latent_width")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError("width / heads must be a multiple of 4")
        if self.local_width % 8 or self.local_width < 8:
            raise ValueError(f"local_width must be a multiple of 8, got {self.local_width}")
        check_ranges(self, window="[2, inf)", recent=f"[0, {self.window})", local_blocks="[0, inf)")
        check_ranges(self, stillness="[0, 1]")

    @classmethod
    def of_header(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The config in a weights file, also of a version that knew key frames.

        Raises:
            ValueError: when the weights were trained with them.
        """
        current = dict(stored)
        current.pop("keyframe_stride", None)
        if current.pop("keyframes", 0):
            raise ValueError(
                "it was trained with key frames, which this version does not have; "
                "train it without keyframes"
            )
        return current

    @property
    def tokens(self) -> int:
        """Tokens a frame."""
        return (self.latent_height // self.patch) * (self.latent_width // self.patch)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one frame's latents."""
        return self.latent_channels, self.latent_height, self.latent_width


class Dynamics(nn.Module):
    """Velocity of noisy latent frames, given earlier frames and the action into each frame.

    adaLN is computed once per frame, for all blocks in one matrix product, and broadcast over the
    frame's tokens.
    """

    def __init__(self, config: DynamicsConfig) -> None:
        """Build from ``config``; the output starts at zero (adaLN-zero)."""
        super().__init__()
        self.config = config
        d, inputs = config.width, config.latent_channels * config.patch**2
        self.embed = nn.Linear(inputs, d)
        self.embed_level = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.embed_action = nn.Sequential(
            nn.Linear(config.action_width, d), nn.SiLU(), nn.Linear(d, d)
        )
        self.modulation = _modulation(d, (6 * config.layers + 2) * d, config.modulation_rank)
        self.blocks = nn.ModuleList(
            Block(d, config.heads, config.qk_norm) for _ in range(config.layers)
        )
        self.norm = RMSNorm(d, eps=1e-6, elementwise_affine=False)
        self.local = local_motion(config)
        outputs = CONTEXT * config.patch**2 if config.recent else inputs
        self.output = nn.Linear(d, outputs)
        rows, columns = config.latent_height // config.patch, config.latent_width // config.patch
        self.rotation = FrameRotation(d // config.heads, rows, columns)
        # The modulation gives scales as deviations from one.
        unit_scales = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float32)[:, None]
        self.register_buffer("unit_scales", unit_scales, persistent=False)
        self._trained: dict[str, Tensor] = {}
        _zero(self.output)

    @property
    def folded(self) -> bool:
        """Whether ``fold_norms`` was called."""
        return bool(self._trained)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See torch; the weights as they were trained, also after ``fold_norms``."""
        state = super().state_dict(*args, **kwargs)
        state.update({kwargs.get("prefix", "") + k: v for k, v in self._trained.items()})
        return state

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Move the norms' weights and the scales' ones into the adaLN projection, for inference.

        Saves three elementwise operations a block; torch's own GroupNorm is used from now on. The
        network computes the same and is saved as it
        was, but is not to be trained on.
        """
        name, last = list(self.modulation.named_modules(prefix="modulation"))[-1]
        assert isinstance(last, nn.Linear) and not self.folded
        self._trained = {f"{name}.weight": last.weight.clone(), f"{name}.bias": last.bias.clone()}
        weight = last.weight.unflatten(0, (-1, self.config.width))
        bias = last.bias.unflatten(0, (-1, self.config.width))
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            for place, norm in ((1, block.norm_attention), (4, block.norm_mlp)):
                row = 6 * layer + place
                weight[row] *= norm.weight[:, None]
                bias[row] = (1 + bias[row]) * norm.weight
                norm.folded = True
        bias[-1] += 1
        for module in self.modules():
            if isinstance(module, GroupNorm):
                module.fused = True

    def forward(self, latents: Tensor, levels: Tensor, actions: Tensor) -> Tensor:
        """Velocities of whole sequences, each frame seeing itself and the frames before it.

        Args:
            latents: (B, T, C, h, w), frame t at noise level ``levels[:, t]``.
            levels: (B, T) in [0, 1].
            actions: (B, T, action_width); ``actions[:, t]`` is the action leading into frame t.

        Returns:
            (B, T, C, h, w).
        """
        frames = torch.arange(latents.shape[1], device=latents.device)
        mask = sees(frames[:, None], frames[None, :], self.config.window)
        rotation = self.rotation(frames[None]).unsqueeze(-4)
        before = frames_before(latents, levels, self.config.recent)
        return self._run(latents, levels, actions, before, rotation, self._masked(mask))[0]

    def forward_two_copies(
        self,
        history: Tensor,
        history_levels: Tensor,
        latents: Tensor,
        levels: Tensor,
        actions: Tensor,
    ) -> Tensor:
        """Velocities of noisy frames that see *another*, almost clean copy of earlier frames.

        This is what happens when playing: frame t is denoised given finished frames. Noisy frame t
        attends to itself and to history frames before t; history frames attend to history only.

        Args:
            history: (B, T, C, h, w), the frames at ``history_levels``.
            history_levels: (B, T).
            latents: (B, T, C, h, w), the same frames at ``levels``.
            levels: (B, T).
            actions: (B, T, action_width), for both copies.

        Returns:
            (B, T, C, h, w), the velocities of the noisy copy.
        """
        return self.two_copies(history, history_levels, latents, levels, actions)[0]

    def two_copies(
        self,
        history: Tensor,
        history_levels: Tensor,
        latents: Tensor,
        levels: Tensor,
        actions: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``forward_two_copies``; also how uncertain the velocities are.

        Returns:
            (B, T, C, h, w) each, see ``LocalMotion``; None for the latter without convolutions.
        """
        count = latents.shape[1]
        frames = torch.arange(count, device=latents.device)
        return self._run(
            torch.cat((history, latents), 1),
            torch.cat((history_levels, levels), 1),
            torch.cat((actions, actions), 1),
            frames_before(history, history_levels, self.config.recent),
            self.rotation(torch.cat((frames, frames))[None]).unsqueeze(-4),
            attend_two_copies(frames, self.config.tokens, self.config.window),
            skip=count,
        )

    def stream(
        self,
        cache: FrameCache,
        latents: Tensor,
        levels: Tensor,
        actions: Tensor,
        commit: int | Sequence[int],
    ) -> Tensor:
        """One pass over a few frames that follow the cached ones.

        Args:
            cache: keys and values of earlier frames.
            latents: (B, F, C, h, w).
            levels: (B, F).
            actions: (B, F, action_width), the actions leading into each frame.
            commit: the first ``commit`` frames are finished: their keys and values go into the
                ring. The others see them and one another block-causally, and leave no trace. One
                number, or one for each row.

        Returns:
            Velocities (B, F - c, C, h, w), without those of the first c frames that are finished in
            every row.
        """
        count = latents.shape[1]
        finished = commit if isinstance(commit, int) else min(commit)
        attend = cache.begin(count, commit)
        before = cache.follow(latents, levels, commit)
        skip = min(finished, count - 1)
        before = before[0][:, skip:], before[1][:, skip:]
        velocity = self._cached(latents, levels, actions, before, attend, skip)
        return velocity[:, finished - skip :]

    def fill(self, cache: FrameCache, latents: Tensor, levels: Tensor, actions: Tensor) -> None:
        """Make a whole history that of every row of ``cache``, whatever that held before.

        Args:
            cache: to fill.
            latents: (B, F, C, h, w), frames number 0 to F - 1.
            levels: (B, F).
            actions: (B, F, action_width), the actions leading into each frame.
        """
        count = latents.shape[1]
        attend = cache.fill(count)
        before = cache.follow(latents, levels, count)
        before = before[0][:, -1:], before[1][:, -1:]
        self._cached(latents, levels, actions, before, attend, count - 1)

    def _cached(
        self,
        latents: Tensor,
        levels: Tensor,
        actions: Tensor,
        before: tuple[Tensor, Tensor],
        attend: RingAttention | FillingAttention,
        skip: int,
    ) -> Tensor:
        # Queries carry the softmax's scale in their rotation.
        scale = (self.config.width // self.config.heads) ** -0.5
        rotation = self.rotation(attend.frames)
        rotation = torch.stack((scale * rotation, rotation), -4)
        return self._run(latents, levels, actions, before, rotation, attend, skip)[0]

    def _masked(self, mask: Tensor) -> Attend:
        full = by_token(mask, self.config.tokens)
        return lambda layer, q, k, v: attend_masked(q, k, v, full)

    def _run(
        self,
        latents: Tensor,
        levels: Tensor,
        actions: Tensor,
        before: tuple[Tensor, Tensor],
        rotation: Tensor,
        attend: Attend,
        skip: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Velocities of all but the first ``skip`` frames, and how uncertain they are.

        ``before``: see ``frames_before``, of those frames.
        """
        dtype = self.embed.weight.dtype
        x = self.embed(self._patchify(latents.to(dtype)))
        condition = self.embed_level(sinusoid(levels).to(dtype))
        condition = condition + self.embed_action(actions.to(dtype))
        modulation = self.modulation(functional.silu(condition))
        modulation = modulation.unflatten(-1, (-1, self.config.width)).unsqueeze(2)
        per_block = modulation[..., :-2, :].unflatten(-2, (self.config.layers, 6))
        if not self.folded:
            per_block = per_block + self.unit_scales
        per_block = per_block.unbind(-3)
        last = self.config.layers - 1
        for layer, block in enumerate(self.blocks):
            skipped = skip if layer == last else 0
            x = block(layer, x, per_block[layer], rotation, attend, skipped)
        shift, scale = modulation[:, skip:, ..., -2, :], modulation[:, skip:, ..., -1, :]
        scale = scale if self.folded else 1 + scale
        output = self.output(torch.addcmul(shift, self.norm(x), scale))
        made = self._unpatchify(output)
        if self.local is None:
            return made.to(latents.dtype), None
        return self.local(made, latents[:, skip:], levels[:, skip:], condition[:, skip:], before)

    def _patchify(self, latents: Tensor) -> Tensor:
        """(B, F, C, h, w) -> (B, F, P, C * patch^2)."""
        p = self.config.patch
        x = latents.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # B F C h/p p w/p p
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, F, P, C * patch^2) -> (B, F, C, h, w)."""
        c, p = self.config, self.config.patch
        x = tokens.unflatten(-1, (-1, p, p))
        x = x.unflatten(2, (c.latent_height // p, c.latent_width // p))  # B F h w C p p
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def local_motion(config: DynamicsConfig) -> LocalMotion | None:
    """New convolutions of a network, where it has some."""
    if not config.recent:
        return None
    sizes = config.recent, config.local_width, config.local_blocks, config.width
    return LocalMotion(config.latent_channels, CONTEXT, *sizes, config.stillness)


def frames_before(frames: Tensor, levels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` frames before each, oldest first.

    Before the first of all there is nothing, which is zeros at level 1.

    Args:
        frames: (B, F, C, h, w).
        levels: (B, F), theirs.
        count: R.

    Returns:
        (B, F, R, C, h, w), and their levels, (B, F, R).
    """
    none = frames.new_zeros(len(frames), count, *frames.shape[2:])
    return in_turn(
        torch.cat((none, frames), 1),
        torch.cat((levels.new_ones(len(levels), count), levels), 1),
        count,
    )


def _modulation(width: int, outputs: int, rank: int) -> nn.Module:
    if not rank:
        return _zero(nn.Linear(width, outputs))
    return nn.Sequential(nn.Linear(width, rank, bias=False), _zero(nn.Linear(rank, outputs)))


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
