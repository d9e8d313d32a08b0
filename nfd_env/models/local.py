"""Convolutions at the latents' full resolution: how small things move between two frames."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.flow.path import expand
from nfd_env.flow.persistence import LEAST, linear_guess, shrinkage, trusted


class GroupNorm(nn.GroupNorm):
    """GroupNorm written out, but for inference, where ``fused`` is set.

    Torch's own has no forward-mode derivative for channels that lie last in memory.
    """

    fused = False

    def forward(self, input: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same shape."""
        if self.fused:
            return super().forward(input)
        groups = input.float().unflatten(1, (self.num_groups, -1))
        centred = groups - groups.mean((2, 3, 4), keepdim=True)
        deviation = (centred.square().mean((2, 3, 4), keepdim=True) + self.eps).rsqrt()
        normal = (centred * deviation).flatten(1, 2)
        made = torch.addcmul(self.bias[:, None, None], normal, self.weight[:, None, None])
        return made.to(input.dtype)


class LocalBlock(nn.Module):
    """GroupNorm, scale and shift by the condition, convolution; convolution; added to its input."""

    def __init__(self, width: int, condition: int) -> None:
        """Of ``width`` channels, conditioned on ``condition`` numbers."""
        super().__init__()
        self.norm = GroupNorm(min(8, width), width)
        self.film = nn.Linear(condition, 2 * width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        for layer in (self.film, self.second):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(n, width, h, w) and (n, condition) -> (n, width, h, w)."""
        scale, shift = self.film(condition)[..., None, None].chunk(2, 1)
        h = functional.silu(torch.addcmul(shift, self.norm(x), 1 + scale))
        return x + self.second(functional.silu(self.first(h)))


class Persistence(nn.Module):
    """See ``nfd_env.flow.persistence``.

    Attributes:
        change: float32 (C,), what is guessed before training, see ``frame_change``; ones until it
            is measured.
    """

    change: Tensor

    def __init__(self, channels: int, stillness: float = 0.0) -> None:
        """Of C = ``channels``; ``stillness`` as in ``trusted``."""
        super().__init__()
        self._stillness = stillness
        self.register_buffer("change", torch.ones(channels, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Persistence:
        """Follow the module to other devices, but never to another precision."""
        self.change = self.change.to(fn(self.change).device)
        return self

    def forward(
        self, level: Tensor, before_level: Tensor, more: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``linear_guess``; but in training the deviation is that which is ``trusted``.

        A network that was trained with less trust would make its corrections that much larger.
        ``more``, (..., C, h, w), is added to the logit of what was guessed before training.
        """
        begun = ((self.change - LEAST) / (1 - LEAST)).clamp(LEAST, 1 - LEAST)
        logit = begun.logit()[:, None, None]
        change = LEAST + (1 - LEAST) * torch.sigmoid(logit + more.float())
        # At 1, where a sigmoid arrives by rounding, the guess has no finite slope.
        a, b, scale = linear_guess(level, before_level, change.clamp(max=1 - LEAST))
        if not self.training and self._stillness:
            scale = scale * trusted(change, self._stillness)
        return a, b, scale


class LocalMotion(nn.Module):
    """What becomes of a frame's latents, from its surroundings in the last frames.

    A transformer of few large tokens has to learn motion anew for each place in a token;
    convolutions learn it once.
    """

    def __init__(
        self,
        channels: int,
        context: int,
        recent: int,
        width: int,
        blocks: int,
        condition: int,
        stillness: float = 0.0,
    ) -> None:
        """Before training it puts out what the frame before lets one guess.

        Args:
            channels: C, of the latents.
            context: of the map that the transformer makes.
            recent: R, frames before each that are seen, at least 1.
            width: channels of the convolutions.
            blocks: residual blocks.
            condition: numbers that say level and action.
            stillness: see ``nfd_env.flow.persistence.trusted``.
        """
        super().__init__()
        self._channels, self._context, self._recent = channels, context, recent
        inputs = context + channels + recent * (channels + 1)
        self.enter = nn.Conv2d(inputs, width, 3, padding=1)
        self.blocks = nn.ModuleList(LocalBlock(width, condition) for _ in range(blocks))
        self.leave = nn.Conv2d(width, 2 * channels, 3, padding=1)
        self.persistence = Persistence(channels, stillness)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    @property
    def _sizes(self) -> dict[str, int]:
        width, blocks = self.enter.out_channels, len(self.blocks)
        return {"recent": self._recent, "local_width": width, "local_blocks": blocks}

    @torch.no_grad()
    def begin_with(self, other: LocalMotion) -> None:
        """Take over what ``other`` has learned of another game's motion.

        Its latents are to mean something like those here: of a tokenizer that this game's began
        with. Their first channels are taken; what further ones put in is zero. Levels and actions,
        and what the transformer puts in, are left: that transformer was another one.

        Raises:
            ValueError: when it sees another number of frames, or is of other sizes.
        """
        if self._sizes != other._sizes:
            raise ValueError(f"has {other._sizes}, the config asks for {self._sizes}")
        both, recent = min(self._channels, other._channels), self._recent
        # What enters: of the frame and of each before it the latents, then how noisy those were.
        here, there = (
            [
                m._context + m._channels * frame + c
                for frame in range(recent + 1)
                for c in range(both)
            ]
            for m in (self, other)
        )
        entering, learned = self.enter.weight, other.enter.weight
        entering[:, self._context :] = 0
        entering[:, here] = learned[:, there]
        entering[:, -recent:] = learned[:, -recent:]
        for block, its in zip(self.blocks, other.blocks, strict=True):
            assert isinstance(block, LocalBlock) and isinstance(its, LocalBlock)
            block.norm.load_state_dict(its.norm.state_dict())
            block.first.load_state_dict(its.first.state_dict())
            block.second.load_state_dict(its.second.state_dict())
        mine, its = self.leave.state_dict(), other.leave.state_dict()
        for name in mine:  # two halves: what is made, and how much of it is new
            mine[name].unflatten(0, (2, -1))[:, :both] = its[name].unflatten(0, (2, -1))[:, :both]
        assert self.enter.bias is not None and other.enter.bias is not None
        self.enter.bias.copy_(other.enter.bias)

    def forward(
        self,
        context: Tensor,
        latents: Tensor,
        levels: Tensor,
        condition: Tensor,
        before: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Velocities of F frames of B rows, and how uncertain they are.

        Args:
            context: (B, F, context, h, w), of the transformer.
            latents: (B, F, C, h, w).
            levels: (B, F).
            condition: (B, F, condition).
            before: the R frames before each, (B, F, R, C, h, w), oldest first, and their levels,
                (B, F, R); see ``nfd_env.models.dynamics.frames_before``.

        Returns:
            Velocities (B, F, C, h, w), of the type of ``latents``, and the standard deviation that
            they are told in units of, likewise; but in training as much of it as is ``trusted``.
        """
        frames, frame_levels = before
        # Drafts may be all noise, which looks like motion: what is known of each frame is its
        # mean given what is seen, and how noisy that was.
        known = frames * expand(shrinkage(frame_levels), frames)
        noise = frame_levels[..., None, None].expand(*frame_levels.shape, *frames.shape[-2:])
        seen = torch.cat((latents, known.flatten(2, 3), noise), 2).to(context.dtype)
        seen = torch.cat((context, seen), 2).flatten(0, 1)
        condition = functional.silu(condition).flatten(0, 1)
        h = self.enter(seen.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h, condition)
        made = self.leave(functional.silu(h)).unflatten(0, latents.shape[:2]).to(latents.dtype)
        made, change = made.chunk(2, 2)
        a, b, scale = self.persistence(levels, frame_levels[:, :, -1], change)
        velocity = a * latents + b * frames[:, :, -1] + scale * made
        return velocity.to(latents.dtype), scale
