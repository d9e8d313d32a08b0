"""A causal transformer that predicts a frame's tokens one after the other (as MineWorld's does).

A frame takes as many rows of slots as its grid has rows of tokens. A row begins with a slot for the
action that led into the frame; behind it stands one for each of the row's tokens. What comes out of
a slot is a guess of the token in the next one.

How many tokens are drawn in one pass follows from ``delay``: each row begins so many steps after
the one above. With as many as the row has tokens they come one after the other, in reading order;
with 1 a whole diagonal comes at once (diagonal decoding, arXiv 2503.14070), each token knowing the
one on its left, the one above it and all before these. A slot sees those of its own and of earlier
steps, and all slots of earlier frames. Trained half in each order, the same weights draw in both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfd_env.config import check_ranges, config_class
from nfd_env.models.cache import FrameCache, sees
from nfd_env.models.layers import Block, FrameRotation, RMSNorm, attend_masked, attend_packed


@config_class
class TokenDynamicsConfig:
    """Sizes of the transformer.

    Attributes:
        latent_channels: channels of the world's latents, which tokens are decoded to.
        latent_height: rows of them.
        latent_width: columns of them.
        rows: rows of tokens in a frame.
        columns: columns of them.
        vocabulary: different tokens.
        action_width: length of an encoded action, see ``nfd_env.spaces.ActionCodec``.
        width: token width d.
        layers: transformer blocks.
        heads: attention heads.
        window: a frame sees itself and at most ``window`` - 1 frames right before it.
        top_p: tokens are drawn among the likeliest that have so much of the probability together
            (nucleus sampling, arXiv 1904.09751); in (0, 1].
        made_with: fingerprint of the discrete tokenizer whose tokens these are.
    """

    latent_channels: int
    latent_height: int
    latent_width: int
    rows: int
    columns: int
    vocabulary: int
    action_width: int
    width: int = 256
    layers: int = 6
    heads: int = 4
    window: int = 16
    top_p: float = 0.8
    made_with: str = ""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError("width / heads must be a multiple of 4")
        some = "[1, inf)"
        check_ranges(self, rows=some, columns=some, vocabulary=some, action_width=some, layers=some)
        check_ranges(self, window="[2, inf)", top_p="(0, 1]")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one frame's latents."""
        return self.latent_channels, self.latent_height, self.latent_width

    @property
    def drawn(self) -> int:
        """Tokens that are drawn for a frame."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Slots of a frame, whose keys and values are kept; as ``DynamicsConfig`` calls them."""
        return self.rows * (self.columns + 1)

    @property
    def recent(self) -> int:
        """No frames are kept as they are."""
        return 0


class Schedule(nn.Module):
    """In which step a frame's slots are filled and looked at, for one ``delay``.

    All that depends on it is known beforehand and kept on the network's device. Slots stand in the
    order of their steps, those of the same step row by row, behind the last slot of the frame
    before, which goes along with the first step.

    Attributes:
        passes: for each step (first, last + 1, n): which of the slots in this order it takes, and
            that n tokens are drawn in it.
    """

    order: Tensor
    slots: Tensor
    sources: Tensor
    guesses: Tensor
    targets: Tensor

    def __init__(self, rows: int, columns: int, delay: int) -> None:
        """Of a grid of tokens."""
        super().__init__()
        grid = [(row, column) for row in range(rows) for column in range(columns + 1)]
        order = [row * delay + column for row, column in grid]
        # The very last slot is filled in the first step of the next frame.
        listed = sorted(range(len(grid) - 1), key=lambda slot: order[slot])
        slots = [len(grid) - 1, *listed]
        # Which token goes into each: -1 for an action, and behind the frame's own the last one of
        # the frame before.
        into = [row * columns + column - 1 if column else -1 for row, column in grid]
        sources = [rows * columns, *(into[slot] for slot in listed)]
        self.passes: list[tuple[int, int, int]] = []
        guesses: list[int] = []
        targets: list[int] = []
        for step in range(max(order)):
            mine = [place for place, slot in enumerate(slots) if order[slot] == step and place]
            first = mine[0] if step else 0  # with the frame before's last slot
            ahead = [place for place in mine if grid[slots[place]][1] < columns]
            guesses += [place - first for place in ahead]
            targets += [into[slots[place] + 1] for place in ahead]
            self.passes.append((first, mine[-1] + 1, len(ahead)))
        for name, values in (
            ("order", order),
            ("slots", slots),
            ("sources", sources),
            ("guesses", guesses),
            ("targets", targets),
        ):
            self.register_buffer(name, torch.tensor(values, device="cpu"), persistent=False)


class TokenDynamics(nn.Module):
    """Logits of the next tokens, given earlier frames' tokens and the actions into each frame."""

    unchanged: Tensor

    def __init__(self, config: TokenDynamicsConfig) -> None:
        """Build from ``config``."""
        super().__init__()
        self.config = config
        d = config.width
        self.embed = nn.Embedding(config.vocabulary, d)
        self.embed_action = nn.Sequential(
            nn.Linear(config.action_width, d), nn.SiLU(), nn.Linear(d, d)
        )
        self.place = nn.Embedding(config.tokens, d)
        for embedding in (self.embed, self.place):
            nn.init.normal_(embedding.weight, std=0.5)
        self.blocks = nn.ModuleList(Block(d, config.heads, False) for _ in range(config.layers))
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.project, block.down):  # GPT-2's, so that depth adds up to no more
                nn.init.normal_(last.weight, std=0.02 / (2 * config.layers) ** 0.5)
        self.norm = RMSNorm(d, eps=1e-6)
        self.output = nn.Linear(d, config.vocabulary)
        nn.init.zeros_(self.output.weight)
        self.rotation = FrameRotation(d // config.heads, config.rows, config.columns + 1)
        # Blocks that modulate nothing: shift, scale, gate, twice.
        unchanged = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float32)[:, None]
        self.register_buffer("unchanged", unchanged, persistent=False)
        self.one_by_one = Schedule(config.rows, config.columns, config.columns)
        self.diagonal = Schedule(config.rows, config.columns, 1)

    def forward(self, tokens: Tensor, actions: Tensor, schedule: Schedule) -> Tensor:
        """Logits of whole sequences, but for their first frame, which follows from nothing.

        Args:
            tokens: int64 (B, T, rows * columns).
            actions: (B, T, action_width), those that led into each frame.
            schedule: one of this network's.

        Returns:
            (B, T - 1, rows * columns, vocabulary).
        """
        x = self._filled(tokens, actions)
        count, slots = x.shape[1], self.config.tokens
        numbers = torch.arange(count, device=x.device)
        mask = self._seen(numbers, schedule)
        rotation = self.rotation(numbers[None]).unsqueeze(-4)
        for layer, block in enumerate(self.blocks):
            x = block(
                layer,
                x,
                self.unchanged.to(x.dtype),
                rotation,
                lambda layer, q, k, v: attend_masked(q, k, v, mask),
            )
        rows = x[:, 1:].unflatten(2, (self.config.rows, slots // self.config.rows))
        return self.output(self.norm(rows[..., :-1, :].flatten(2, 3)))

    def fill(self, cache: FrameCache, tokens: Tensor, actions: Tensor, schedule: Schedule) -> None:
        """Make a whole history that of every row of ``cache``; of no more frames than the window.

        All are finished but for the last, whose keys and values are there too.

        Args:
            cache: to fill.
            tokens: int64 (B, T, rows * columns), frames number 0 to T - 1.
            actions: (B, T, action_width), those that led into each frame.
            schedule: one of this network's.
        """
        x = self._filled(tokens, actions)
        count, scale = x.shape[1], (self.config.width // self.config.heads) ** -0.5
        numbers = torch.arange(count, device=x.device)
        mask = self._seen(numbers, schedule)
        rotation = self.rotation(numbers[None]).unsqueeze(-4)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for ring, new in ((cache.keys[layer], k), (cache.values[layer], v)):
                ring[:, :, :count] = new.permute(0, 3, 1, 2, 4).to(ring.dtype)
            return attend_masked(q, k, v, mask, scale=scale)

        for layer, block in enumerate(self.blocks):
            x = block(layer, x, self.unchanged.to(x.dtype), rotation, attend)
        cache.length = torch.full_like(cache.length, count - 1)

    def draw(
        self,
        cache: FrameCache,
        last: Tensor,
        actions: Tensor,
        uniform: Tensor,
        schedule: Schedule,
        temperature: float = 1.0,
        top_p: float | None = None,
    ) -> Tensor:
        """Draw the frame that follows; the one before it is finished by this.

        Args:
            cache: keys and values of earlier frames, all but the last slot's of the last of them.
            last: int64 (B, rows * columns), that last frame.
            actions: (B, action_width), into the new frame.
            uniform: (B, rows * columns) in [0, 1], a number for each token.
            schedule: one of this network's.
            temperature: logits are divided by it.
            top_p: None for the config's.

        Returns:
            int64 (B, rows * columns).
        """
        config, top_p = self.config, top_p or self.config.top_p
        cache.length = cache.length + 1
        dtype = self.embed.weight.dtype
        into = self.embed_action(actions.to(dtype))[:, None]
        places = self.place(schedule.slots)
        tokens = torch.cat((torch.zeros_like(last), last[:, -1:]), 1)
        attention = _SlotAttention(cache, schedule, config.window)
        rotation = self.rotation(attention.frames[:, 1:2])[:, 0]
        before = self.rotation(attention.frames[:, :1])[:, 0]
        rotation = torch.cat((before[:, -1:], rotation[:, schedule.slots[1:]]), 1)
        scale = (config.width // config.heads) ** -0.5
        rotation = torch.stack((scale * rotation, rotation), -4)[:, None]
        acted, sources = schedule.sources[:, None] < 0, schedule.sources.clamp(min=0)
        unchanged, done = self.unchanged.to(dtype), 0
        for first, end, count in schedule.passes:
            held = self.embed(tokens[:, sources[first:end]])
            x = torch.where(acted[first:end], into, held) + places[first:end]
            attention.take(first, end)
            turned, x = rotation[:, :, first:end], x[:, None]
            for layer, block in enumerate(self.blocks):
                x = block(layer, x, unchanged, turned, attention)
            if not count:
                continue
            mine = slice(done, done + count)
            logits = self.output(self.norm(x[:, 0, schedule.guesses[mine]]))
            aims, done = schedule.targets[mine], done + count
            chance = uniform[:, aims]
            tokens[:, aims] = sample_top_p(logits.float() / temperature, chance, top_p)
        return tokens[:, :-1]

    def _filled(self, tokens: Tensor, actions: Tensor) -> Tensor:
        """What goes into all slots of frames (B, T, ...): (B, T, slots, d)."""
        rows = self.embed(tokens).unflatten(2, (self.config.rows, self.config.columns))
        into = self.embed_action(actions.to(self.embed.weight.dtype))[:, :, None, None]
        begun = into.expand(-1, -1, self.config.rows, -1, -1)
        return torch.cat((begun.to(rows.dtype), rows), 3).flatten(2, 3) + self.place.weight

    def _seen(self, numbers: Tensor, schedule: Schedule) -> Tensor:
        """Whether each slot of frames sees each other, bool (T * slots, T * slots)."""
        frames = numbers.repeat_interleave(self.config.tokens)
        order = schedule.order.repeat(len(numbers))
        earlier = sees(frames[:, None], frames, self.config.window) & (frames[:, None] != frames)
        return earlier | ((frames[:, None] == frames) & (order[:, None] >= order))


class _SlotAttention:
    """Attention of some slots of the newest frame through the ring, which takes them in.

    Attributes:
        frames: int64 (B, slots): the number of the frame that each of the schedule's slots is of.
    """

    def __init__(self, cache: FrameCache, schedule: Schedule, window: int) -> None:
        """Of the frame number ``cache.length``, the one before it having just been finished."""
        newest, order = cache.length[:, None], schedule.order
        self._cache, self._slots = cache, schedule.slots
        before = torch.zeros_like(schedule.slots)
        before[0] = 1
        self.frames = newest - before
        self._rows = torch.arange(cache.batch, device=newest.device)[:, None]
        self._ring = self.frames % cache.ring
        ring = torch.arange(cache.ring, device=newest.device)
        held = (newest - (newest - ring) % cache.ring)[:, None, :, None]
        mine = self.frames[:, :, None, None]
        known = order[self._slots][:, None, None] >= order
        known = torch.cat((torch.ones_like(known[:1]), known[1:]))  # behind all others of its frame
        seen = sees(mine, held, window) & (held >= 0) & ((held != mine) | known)
        mask = torch.zeros(seen.shape, device=newest.device, dtype=cache.keys.dtype)
        mask = mask.masked_fill(~seen, -torch.inf).flatten(2)[:, None]
        self._mask = mask.expand(-1, cache.keys.shape[2], -1, -1)
        self.take(0, 0)

    def take(self, first: int, end: int) -> None:
        """The slots of the coming pass, ``first`` to ``end`` - 1 of the schedule's."""
        self._part, self._seen = slice(first, end), self._mask[:, :, first:end].contiguous()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``nfd_env.models.layers.Attend``; of one frame."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        places = self._rows, slice(None), self._ring[:, self._part], self._slots[self._part]
        for ring, new in ((keys, k), (values, v)):
            ring[places] = new[:, 0].to(ring.dtype)
        return attend_packed(q, keys.flatten(2, 3), values.flatten(2, 3), self._seen)


def sample_top_p(logits: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Draw tokens from the likeliest that have ``top_p`` of the probability together.

    Args:
        logits: (..., V).
        uniform: (...) in [0, 1], which the choice is a function of.
        top_p: in (0, 1].

    Returns:
        int64 (...).
    """
    chances, ranked = logits.softmax(-1).sort(stable=True, descending=True)
    sums = chances.cumsum(-1)
    kept = sums - chances < top_p  # the likeliest always
    last = kept.sum(-1, keepdim=True) - 1
    wanted = uniform[..., None] * sums.gather(-1, last)
    place = (sums < wanted).sum(-1, keepdim=True).minimum(last)
    return ranked.gather(-1, place).squeeze(-1)


def uniform_of(normal: Tensor) -> Tensor:
    """Normal numbers as uniform ones in [0, 1]."""
    return torch.special.ndtr(normal.double()).float()


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy in nats a token: of logits (..., V) and tokens (...)."""
    return functional.cross_entropy(logits.float().flatten(0, -2), tokens.flatten())
