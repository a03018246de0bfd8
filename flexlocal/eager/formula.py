"""The arithmetic of the eager path within tiles: scores, weights and the output.

Shapes are those of ``tiles``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks.rule import Rule, sees
from ..mods.bias import add_gradient_of_tiles, add_to_tiles
from ..mods.dropout import keeps
from ..mods.shared_qk import clear_own_gradients, set_own_scores
from ..rotary import Xpos, xpos_products_fit
from ..spec import Inputs, Spec, xpos_of
from .tiles import Sizes, Tiles

Backward = Callable[[Tensor, Tensor | None], Tensor]
"""Turns the gradient of scores into that of the products of queries and keys, in place.

Adds the bias's gradient to its second argument, if there is one.
"""


@dataclass(frozen=True)
class Formula:
    """Attention within tiles.

    Attributes:
        draws: dropout's numbers of queries and of keys, both ``(b * h, n)``; None without dropout.
        compute: the dtype of scores and weights.
        hiding: 0 where a tile's query sees the tile's key, -inf elsewhere, ``(h or 1, 1, t, s)``;
            the same for all tiles, as ``Reach.step`` promises. None where each tile asks the rule.
    """

    spec: Spec
    rule: Rule
    draws: tuple[Tensor, Tensor] | None
    xpos: Xpos | None
    compute: torch.dtype
    hiding: Tensor | None

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
        weights, _ = self.weights(tiles, *self.scaled(tiles, q, k), bias, mask)
        out = times(weights, self.keep(tiles)) @ tiles.keys(v).to(self.compute)
        return out.flatten(2, 3)[:, :, : tiles.sizes.n - tiles.first * tiles.sizes.tile].to(q.dtype)

    def scaled(self, tiles: Tiles, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The tiles' queries and keys times ``factors``: scores begin as their products."""
        q_factor, k_factor = self.factors(tiles)
        q_tiles = tiles.queries(q).to(self.compute) * q_factor
        return q_tiles, times(tiles.keys(k).to(self.compute), k_factor)

    def factors(self, tiles: Tiles) -> tuple[Tensor | float, Tensor | None]:
        """What a tile's queries and keys are multiplied by: the scale, and xpos's factors."""
        scale = self.spec.scale
        assert scale is not None
        if self.xpos is None:
            return scale, None
        sizes, shift = tiles.sizes, self.rule.window.after
        scales = self.xpos.scales(sizes.tile, sizes.before, sizes.after, shift, self.compute)
        q_factor, k_factor = (half.repeat(1, 2) for half in scales)
        return q_factor * scale, k_factor

    def weights(
        self, tiles: Tiles, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Backward]:
        """Softmax over the visible keys, ``(b, h, g, t, s)``; zeros for a query that sees none.

        Args:
            q, k: the tiles' queries and keys, ``scaled``.

        Returns:
            The weights, and the function that turns the gradient of their scores back.
        """

        def backward(grad_scores: Tensor, grad_bias: Tensor | None) -> Tensor:
            if self.spec.shared_qk:
                clear_own_gradients(grad_scores, tiles.sizes.before)
            if grad_bias is not None:
                add_gradient_of_tiles(grad_bias, grad_scores, tiles.rows(q.device))
            return grad_scores

        scores = q @ k.transpose(-1, -2)
        if bias is not None:
            add_to_tiles(scores, bias, tiles.rows(q.device))
        if self.spec.shared_qk:
            set_own_scores(scores, tiles.sizes.before)
        scores += self._hiding(tiles, q.device) if self.hiding is None else self.hiding
        if mask is not None or not tiles.inside:
            scores += hiding(tiles.kept_keys(mask, q.device), self.compute)
        if bias is None and mask is None and self.hiding is not None and not tiles.ragged:
            return scores.softmax(-1), backward  # every query sees its own key
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0), backward

    def keep(self, tiles: Tiles) -> Tensor | None:
        """What dropout multiplies the weights by."""
        if self.draws is None:
            return None
        by_query, by_key = (
            draw.unflatten(0, (tiles.sizes.batch, tiles.sizes.heads))[..., None]
            for draw in self.draws
        )
        by_query, by_key = tiles.queries(by_query), tiles.keys(by_key)
        keep = keeps(by_query, by_key.transpose(-1, -2), self.spec.dropout)
        return keep.to(self.compute) / (1 - self.spec.dropout)

    def _hiding(self, tiles: Tiles, device: torch.device) -> Tensor:
        """As ``hiding``, of these tiles: ``(b or 1, h or 1, g, t, s)``."""
        batch, head, query, key = tiles.indices(device)
        return hiding(sees(self.rule, batch, head, query, key), self.compute)


def formula_of(
    spec: Spec,
    rule: Rule,
    inputs: Inputs,
    sizes: Sizes,
    draws: tuple[Tensor, Tensor] | None = None,
) -> Formula:
    """The formula for tiles of these sizes; arguments as ``Formula``'s."""
    q, xpos = inputs.q, xpos_of(spec, inputs)
    compute = torch.promote_types(q.dtype, torch.float32)
    if xpos is not None and not xpos_products_fit(rule.window, xpos.base, compute):
        compute = torch.float64
    same_hiding = None
    step = rule.reach.step
    if step and not rule.tensors and (sizes.tile % step == 0 or sizes.tiles == 1):
        head = torch.arange(sizes.heads, device=q.device)[:, None, None, None]
        query = torch.arange(sizes.tile, device=q.device)[:, None]
        key = torch.arange(sizes.span, device=q.device) - sizes.before
        same_hiding = hiding(sees(rule, 0, head, query, key), compute)
    return Formula(spec, rule, draws, xpos, compute, same_hiding)


def hiding(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``seen``, -inf elsewhere, to be added to scores."""
    return torch.where(seen, 0.0, -torch.inf).to(dtype)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x * factor``; ``x`` where there is no factor."""
    return x if factor is None else x * factor
