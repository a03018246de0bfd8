"""The demonstration's model: a small transformer over bytes, with ``LocalAttention``.

Shapes: b batch, n tokens, e embedding, h heads, d head dimension.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import LocalAttention, LocalCache
from ..spec import BackendName

EMBEDDING, HEADS, LAYERS = 128, 4, 3


class Block(nn.Module):
    """Attention, then a feed-forward layer, each on a normalised input and added to it."""

    def __init__(self, window: int, backend: BackendName) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(EMBEDDING)
        self.to_qkv = nn.Linear(EMBEDDING, 3 * EMBEDDING, bias=False)
        self.attention = LocalAttention(
            window,
            causal=True,
            exact_windowsize=True,
            dim=EMBEDDING // HEADS,
            dropout=0.0,
            backend=backend,
        )
        self.from_heads = nn.Linear(EMBEDDING, EMBEDDING, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(EMBEDDING),
            nn.Linear(EMBEDDING, 4 * EMBEDDING),
            nn.GELU(),
            nn.Linear(4 * EMBEDDING, EMBEDDING),
        )

    def forward(self, x_bne: Tensor, cache: LocalCache | None = None) -> Tensor:
        """The next layer's input."""
        fused = self.to_qkv(self.attention_norm(x_bne))
        q_bhnd, k_bhnd, v_bhnd = rearrange(  # views: nothing is copied
            fused, "b n (three h d) -> three b h n d", three=3, h=HEADS
        )
        mixed_bhnd = self.attention(q_bhnd, k_bhnd, v_bhnd, cache=cache)
        x_bne = x_bne + self.from_heads(rearrange(mixed_bhnd, "b h n d -> b n (h d)"))
        fed_bne: Tensor = x_bne + self.feed_forward(x_bne)
        return fed_bne


class ByteModel(nn.Module):
    """Bytes in, logits of the next byte out; the embedding is the last layer as well."""

    def __init__(self, window: int, backend: BackendName) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, EMBEDDING)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING**-0.5)
        self.blocks = nn.ModuleList(Block(window, backend) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(EMBEDDING)

    def forward(self, bytes_bn: Tensor, caches: Sequence[LocalCache] | None = None) -> Tensor:
        """Logits ``(b, n, 256)``.

        Args:
            bytes_bn: with caches the new bytes alone.
            caches: those of ``new_caches``, which hold the bytes so far.
        """
        x_bne = self.embedding(bytes_bn)
        for layer, block in enumerate(self.blocks):
            x_bne = block(x_bne, None if caches is None else caches[layer])
        return F.linear(self.norm(x_bne), self.embedding.weight)

    def new_caches(self, batch: int) -> list[LocalCache]:
        """An empty cache for each layer."""
        weight = self.embedding.weight
        head_size = EMBEDDING // HEADS
        return [
            LocalCache(
                layer.window, batch, HEADS, head_size, dtype=weight.dtype, device=weight.device
            )
            for layer in self.attentions
        ]

    @property
    def attentions(self) -> list[LocalAttention]:
        """The attention of each layer."""
        return [module for module in self.modules() if isinstance(module, LocalAttention)]
