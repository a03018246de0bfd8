"""The arithmetic of the eager path within tiles: scores, weights and the output.

Shapes are those of ``tiles``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import Window
from .masks.dropout import keeps
from .masks.rule import sees
from .masks.scores import SELF_SCORE
from .rotary import Xpos, xpos_products_fit
from .tiles import Sizes, Tiles


@dataclass(frozen=True)
class Formula:
    """Attention within tiles."""

    window: Window
    scale: float
    shared_qk: bool
    dropout: float
    draws: tuple[Tensor, Tensor] | None
    xpos: Xpos | None
    compute: torch.dtype
    hidden: Tensor
    """0 where a tile's query may see the tile's key, -inf elsewhere: ``(t, s)``."""

    def output(
        self,
        tiles: Tiles,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """The tiles' output, ``(b, h, queries, d_v)``."""
        weights = self.of_tiles(tiles, q, k, bias, mask)
        out = times(weights, self.keep(tiles)) @ tiles.keys(v).to(self.compute)
        return out.flatten(2, 3)[:, :, : tiles.sizes.n - tiles.first * tiles.sizes.tile].to(q.dtype)

    def of_tiles(
        self, tiles: Tiles, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """The tiles' weights, ``(b, h, g, t, s)``."""
        q_factor, k_factor = self.factors(tiles)
        q_tiles = tiles.queries(q).to(self.compute) * q_factor
        k_tiles = times(tiles.keys(k).to(self.compute), k_factor)
        return self.weights(tiles, q_tiles, k_tiles, bias, mask)

    def factors(self, tiles: Tiles) -> tuple[Tensor | float, Tensor | None]:
        """What a tile's queries and keys are multiplied by before their product."""
        if self.xpos is None:
            return self.scale, None
        sizes, shift = tiles.sizes, self.window.after
        scales = self.xpos.scales(sizes.tile, sizes.before, sizes.after, shift, self.compute)
        q_factor, k_factor = (half.repeat(1, 2) for half in scales)
        return q_factor * self.scale, k_factor

    def weights(
        self, tiles: Tiles, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Softmax over the visible keys, ``(b, h, g, t, s)``; zeros for a query that sees none."""
        scores = q @ k.transpose(-1, -2)
        if bias is not None:
            scores += bias[tiles.rows(q.device) % bias.shape[0]][:, :, None]
        if self.shared_qk:
            self.self_scores(tiles, scores).fill_(SELF_SCORE)
        scores += self.hidden
        if mask is not None or not tiles.inside:
            scores += _hiding(tiles.kept_keys(mask, q.device), self.compute)
        if bias is None and mask is None and not tiles.ragged:
            return scores.softmax(-1)  # every query sees its own key
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)

    def self_scores(self, tiles: Tiles, scores: Tensor) -> Tensor:
        """The scores of tokens with themselves: a tile's first query is its key ``before``."""
        return scores.diagonal(tiles.sizes.before, -2, -1)

    def keep(self, tiles: Tiles) -> Tensor | None:
        """What dropout multiplies the weights by."""
        if self.draws is None:
            return None
        by_query, by_key = (
            draw.unflatten(0, (tiles.sizes.batch, tiles.sizes.heads))[..., None]
            for draw in self.draws
        )
        by_query, by_key = tiles.queries(by_query), tiles.keys(by_key)
        keep = keeps(by_query, by_key.transpose(-1, -2), self.dropout)
        return keep.to(self.compute) / (1 - self.dropout)


def formula_of(
    q: Tensor,
    sizes: Sizes,
    window: Window,
    scale: float,
    shared_qk: bool,
    xpos: Xpos | None,
    dropout: float = 0.0,
    draws: tuple[Tensor, Tensor] | None = None,
) -> Formula:
    """The formula for tiles of these sizes; arguments as ``eager.attend``'s and ``Formula``'s."""
    compute = torch.promote_types(q.dtype, torch.float32)
    if xpos is not None and not xpos_products_fit(window, xpos.base, compute):
        compute = torch.float64
    # Tiles are whole windows, or there is one: what the first one sees, every one sees.
    query = torch.arange(sizes.tile, device=q.device)[:, None]
    key = torch.arange(sizes.span, device=q.device) - sizes.before
    hidden = _hiding(sees(window, query, key), compute)
    return Formula(window, scale, shared_qk, dropout, draws, xpos, compute, hidden)


def _hiding(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(seen, 0.0, -torch.inf).to(dtype)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x`` times a factor, if there is one."""
    return x if factor is None else x * factor
