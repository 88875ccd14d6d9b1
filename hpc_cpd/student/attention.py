"""Causal Transformer blocks that look back at a limited number of observations, whole windows at once.

Places are told apart by rotation (rotary embedding, arXiv 2104.09864): what a query finds in a key depends on how far
apart they are and on nothing else. A window that moves on by one observation therefore keeps all its keys and values,
and `acting.py` computes one observation per control tick instead of the window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_cpd.student.moe.gate import seeded_linear

FEED_FORWARD_FACTOR = 4
ROTARY_BASE = 100.0
"""Slowest wavelength over the fastest. Windows are some tens of observations long, not thousands of words."""


def reaches(history: int, layers: int) -> list[int]:
    """Observations that each block's queries see, their own included.

    Together the blocks see exactly `history` of them. With `history` for each, a block would see through the keys of
    the one before it what lies further back, and a student that acts with kept keys would not be the one that learnt.
    """
    share, rest = divmod(history - 1, layers)
    return [1 + share + (layer < rest) for layer in range(layers)]


def rotation(places: Tensor, head_size: int) -> Tensor:
    """Cosines and sines by which queries and keys at `places` int64 [...] turn: float32 [2, ..., head_size / 2]."""
    half = head_size // 2
    exponents = torch.arange(half, dtype=torch.float64, device=places.device) / half
    angles = places[..., None] * ROTARY_BASE**-exponents  # in float64: an episode may last for days
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotated(vectors: Tensor, turn: Tensor) -> Tensor:
    """`vectors` [..., head size] turned by `turn` [2, ..., head size / 2], which is broadcast."""
    one, other = vectors.chunk(2, dim=-1)
    cosine, sine = turn.to(vectors.dtype)
    return torch.cat([one * cosine - other * sine, one * sine + other * cosine], dim=-1)


class Block(nn.Module):
    """Pre-LayerNorm causal Transformer block: [B, L, width] -> [B, L, width]."""

    def __init__(self, width: int, heads: int, reach: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.reach = reach
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = seeded_linear(width, 3 * width, generator)
        self.attention_out = seeded_linear(width, width, generator)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward_in = seeded_linear(width, FEED_FORWARD_FACTOR * width, generator)
        self.feed_forward_out = seeded_linear(FEED_FORWARD_FACTOR * width, width, generator)

    def forward(self, tokens: Tensor, turn: Tensor, rows: Tensor | None = None) -> Tensor:
        """`turn`: `rotation` of the places, [2, L, head size / 2].

        `rows` int64 [n] (into B * L): only these come out, [n, width]; what nobody reads is not computed.
        """
        length = tokens.shape[1]
        query, key, value = self.query_key_and_value(tokens, turn)
        allowed = None
        if self.reach < length:
            apart = torch.arange(length, device=tokens.device)[:, None] - torch.arange(length, device=tokens.device)
            allowed = (apart >= 0) & (apart < self.reach)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=allowed is None)
        attended = attended.transpose(1, 2).flatten(2)
        if rows is not None:
            tokens, attended = (each.flatten(0, 1).index_select(0, rows) for each in (tokens, attended))
        return self.after_attention(tokens, attended)

    def query_key_and_value(self, tokens: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, L, width], `turn` [2, B or 1, L, head size / 2] -> three times [B, heads, L, head size]."""
        size = tokens.shape[2] // self.heads
        mixed = self.query_key_value(self.norm_attention(tokens)).unflatten(2, (3, self.heads, size)).transpose(1, 3)
        # split and unbound, never indexed: the gradient of each index would be a tensor of zeros with a part filled in
        turning, value = mixed.split([2, 1], dim=2)
        query, key = rotated(turning, turn.unflatten(-2, (1, 1, -1))).unbind(2)
        return query, key, value.squeeze(2)

    def after_attention(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention, token by token: [..., width] each."""
        tokens = tokens + self.attention_out(attended)
        hidden = F.gelu(self.feed_forward_in(self.norm_feed_forward(tokens)))
        after: Tensor = tokens + self.feed_forward_out(hidden)
        return after
