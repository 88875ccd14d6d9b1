"""The network of the Transformer backbone: causal blocks that look back at a limited number of observations.

Positions are told apart by rotary embedding (arXiv 2104.09864): what a query finds in a key depends on how far apart
they are and on nothing else. A window that moves on by one observation therefore keeps all its keys and values, and a
student that acts computes one observation per control step instead of the window.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_cpd.layers import seeded_linear
from hpc_cpd.student.backbones.base import Backbone, Cache, Experts

if TYPE_CHECKING:
    from hpc_cpd.student.backbones.transformer import TransformerSettings
    from hpc_cpd.student.network import StudentShape

FEED_FORWARD_FACTOR = 4
ROTARY_BASE = 100.0
"""Slowest wavelength over the fastest. Windows are some tens of observations long, not thousands of words."""


def attention_windows(history: int, layers: int) -> list[int]:
    """Observations that each block's queries see, their own included.

    Together the blocks see exactly `history` of them. With `history` for each, a block would see through the keys of
    the one before it what lies further back, and a student that acts with a cache would not be the one that learnt.
    """
    share, rest = divmod(history - 1, layers)
    return [1 + share + (layer < rest) for layer in range(layers)]


def rotary(positions: Tensor, head_size: int) -> Tensor:
    """Cosines and sines of the angles of what stands at `positions` int64 [...]: float32 [2, ..., head_size / 2]."""
    angles = positions[..., None] * _frequencies(head_size // 2, positions.device)
    return torch.stack([angles.cos(), angles.sin()]).float()


@cache
def _frequencies(count: int, device: torch.device) -> Tensor:
    """In float64: an episode may last for days."""
    with torch.inference_mode(False):  # whoever asks first may be a student that only acts
        exponents = torch.arange(count, dtype=torch.float64, device=device) / count
        return torch.as_tensor(ROTARY_BASE**-exponents)


def rotated(vectors: Tensor, angles: Tensor) -> Tensor:
    """`vectors` [..., head size] rotated by `angles` [2, ..., head size / 2] (see `rotary`), which are broadcast."""
    one, other = vectors.chunk(2, dim=-1)
    cosine, sine = angles.to(vectors.dtype)
    return torch.cat([one * cosine - other * sine, one * sine + other * cosine], dim=-1)


class Transformer(Backbone):
    """Blocks, with a layer norm and a mixture of experts behind each of the last ones, and a layer norm at the end."""

    def __init__(self, settings: TransformerSettings, shape: StudentShape, generator: torch.Generator) -> None:
        super().__init__()
        self.mixtures = settings.mixtures
        self.ends_with_experts = settings.mixtures == 1
        self.head_size = shape.width // settings.heads
        self.blocks = nn.ModuleList(
            Block(shape.width, settings.heads, window, generator)
            for window in attention_windows(shape.history, settings.layers)
        )
        self.norms_features = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(settings.mixtures))
        self.final_norm = nn.LayerNorm(shape.width)

    def forward(
        self, tokens: Tensor, experts: Experts, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """See :class:`Backbone`."""
        if cache is not None:
            return self._newest(tokens.squeeze(1), experts, cache)
        shape, last = tokens.shape, len(self.blocks) - 1
        angles = rotary(torch.arange(shape[1], device=tokens.device), self.head_size)
        for number, block in enumerate(self.blocks):
            # behind the last block's attention no position looks at another: only those that are wanted go on
            wanted = positions if number == last else None
            early = None if self.functional else wanted  # single samples: their gradients are rounded so
            tokens = block(tokens, angles, early).flatten(0, -2)
            if early is not wanted and wanted is not None:
                tokens = tokens.index_select(0, wanted)
            mixture = number - (len(self.blocks) - self.mixtures)
            if mixture >= 0:
                tokens = experts(mixture, self.norms_features[mixture](tokens), wanted)
            if number != last:
                tokens = tokens.view(shape)
        return self.finish(tokens)

    def _newest(self, tokens: Tensor, experts: Experts, cache: Cache) -> Tensor:
        """`forward` with a cache, tokens [rows, width]: few calls, which cost more than what they compute."""
        frequencies = _frequencies(self.head_size // 2, tokens.device)
        angles = cache.ages[:, None] * torch.cat([-frequencies, frequencies])
        turn = [part.float()[:, None, None] for part in (angles.cos(), angles.sin())]
        age = int(cache.ages) if len(tokens) == 1 and tokens.device.type == "cpu" else None
        for number, (block, kept) in enumerate(zip(self.blocks, cache.kept, strict=True), self.mixtures):
            tokens = cast(Block, block).newest(tokens, turn, kept, cache.ages, age)
            if number >= len(self.blocks):
                mixture = number - len(self.blocks)
                tokens = experts(mixture, self.norms_features[mixture](tokens))
        return self.finish(tokens)

    def finish(self, features: Tensor) -> Tensor:
        """See :class:`Backbone`."""
        finished: Tensor = self.final_norm(features)
        return finished

    def new_cache(self, rows: int) -> Cache:
        """Keys and values [2, rows, heads, window, head size] of each block; that of age a stands at a % window."""
        device = next(self.parameters()).device
        kept = [
            torch.zeros(2, rows, block.heads, block.window, self.head_size, device=device)
            for block in self.blocks
            if isinstance(block, Block)
        ]
        return Cache(torch.zeros(rows, dtype=torch.int64, device=device), kept)


class Block(nn.Module):
    """Pre-LayerNorm causal Transformer block: [B, L, width] -> [B, L, width]."""

    def __init__(self, width: int, heads: int, window: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = seeded_linear(width, 3 * width, generator)
        self.attention_out = seeded_linear(width, width, generator)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward_in = seeded_linear(width, FEED_FORWARD_FACTOR * width, generator)
        self.feed_forward_out = seeded_linear(FEED_FORWARD_FACTOR * width, width, generator)

    def forward(self, tokens: Tensor, angles: Tensor, positions: Tensor | None = None) -> Tensor:
        """`angles`: `rotary` of the positions, [2, L, head size / 2].

        `positions` int64 [n] (into B * L): only these come out, [n, width]; what nobody reads is not computed.
        """
        attended = self._within_window(*self.query_key_and_value(tokens, angles)).transpose(1, 2).flatten(2)
        if positions is not None:
            tokens, attended = (each.flatten(0, 1).index_select(0, positions) for each in (tokens, attended))
        return self._after_attention(tokens, attended)

    def newest(self, tokens: Tensor, turn: list[Tensor], kept: Tensor, ages: Tensor, age: int | None) -> Tensor:
        """Tokens [rows, width], one of each row, whose past is `kept`, and which is kept with it.

        `turn` [2][rows, 1, 1, head size]: cosines of the rows' angles, and sines, those of the first halves negative.
        `age`: that of the only row, where there is one alone.
        """
        mixed = self.query_key_value(self.norm_attention(tokens)).view(len(tokens), 3, self.heads, -1)
        both = mixed[:, :2]
        swapped = both.roll(both.shape[3] // 2, 3)
        both.mul_(turn[0]).addcmul_(swapped, turn[1])  # as `rotated`, in place
        written = None
        if age is not None:  # nothing has to be looked up or masked
            kept[:, :, :, age % self.window] = mixed[:, 1:].transpose(0, 1)
            kept = kept[:, :, :, : age + 1]
        else:
            kept[:, torch.arange(len(ages), device=ages.device), :, ages % self.window] = mixed[:, 1:]
            written = (torch.arange(self.window, device=ages.device) <= ages[:, None])[:, None, None]
        attended = F.scaled_dot_product_attention(mixed[:, 0, :, None], kept[0], kept[1], attn_mask=written)
        return self._after_attention(tokens, attended.flatten(1))

    def _after_attention(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + self.attention_out(attended)
        hidden = F.gelu(self.feed_forward_in(self.norm_feed_forward(tokens)))
        after: Tensor = tokens + self.feed_forward_out(hidden)
        return after

    def _within_window(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[2]
        allowed = None
        if self.window < length:
            apart = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
            allowed = (apart >= 0) & (apart < self.window)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=allowed is None)

    def query_key_and_value(self, tokens: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, L, width] -> three times [B, heads, L, head size]."""
        size = tokens.shape[2] // self.heads
        mixed = self.query_key_value(self.norm_attention(tokens)).unflatten(2, (3, self.heads, size)).transpose(1, 3)
        # split and unbound, never indexed: the gradient of each index would be a tensor of zeros with a part filled in
        both, value = mixed.split([2, 1], dim=2)
        query, key = rotated(both, angles.unflatten(-2, (1, 1, -1))).unbind(2)
        return query, key, value.squeeze(2)
