"""A small transformer language model around the layer, to trace it where it is used."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


class Block(nn.Module):
    """Attention, then a feed-forward layer, each on a normalised input and added to it."""

    def __init__(self, heads: int, d: int, attention: nn.Module) -> None:
        super().__init__()
        width = heads * d
        self.heads = heads
        self.attention = attention
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, n, width)``."""
        # Views (batch, heads, n, d) of what the projection wrote: nothing is copied.
        split = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        x = x + self.from_heads(self.attention(q, k, v).transpose(1, 2).flatten(2))
        fed: Tensor = x + self.feed_forward(x)
        return fed


class Model(nn.Module):
    """Tokens in, logits of the next token out.

    Args:
        heads, d: of the attention; the model is ``heads * d`` wide.
        attention: makes the attention of a block.
    """

    def __init__(
        self, heads: int, d: int, attention: Callable[[], nn.Module], blocks: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, heads * d)
        self.blocks = nn.Sequential(*(Block(heads, d, attention()) for _ in range(blocks)))
        self.norm = nn.LayerNorm(heads * d)
        self.to_logits = nn.Linear(heads * d, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, n)`` to ``(batch, n, VOCABULARY)``."""
        logits: Tensor = self.to_logits(self.norm(self.blocks(self.embedding(tokens))))
        return logits


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of each token but the first, in fp32; ``model`` may be a compiled one."""
    logits = model(tokens)[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, tokens[:, 1:].flatten())
