"""The arithmetic of the eager path within tiles: scores, weights and the output.

Shapes are those of ``tiles``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks.rule import Rule
from ..mods.bias import add_gradient_of_tiles, add_to_tiles, bias_place
from ..mods.dropout import keeps
from ..mods.shared_qk import clear_own_gradients, own_key, with_own_scores
from ..mods.sinks import sinks_of_rows, with_sink
from ..mods.softcap import cap_tiles, pull_back_tiles
from ..spec import Inputs, Spec, xpos_of
from ..torch_limits.gradients import added_in_place
from ..torch_limits.kernels import has_float64
from ..torch_limits.sizes import at_least, at_most
from ..xpos import Xpos, xpos_products_fit
from .tiles import Sizes, Tiles

Backward = Callable[[Tensor, Tensor | None], Tensor]
"""Turns the gradient of scores into that of the products of queries and keys, in place.

Adds the bias's gradient to its second argument, if there is one.
"""


class Operands(NamedTuple):
    """The tensors of a call within tiles; the first five may require gradients.

    Attributes:
        q: ``(batch, heads, n, d)``.
        k, v: ``(batch, kv_heads, m, d or d_v)``.
        bias: ``(bias heads, W, span)``.
        sinks: ``(sink heads,)``.
        mask: boolean ``(batch, heads or 1, m)``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None


def operands_of(inputs: Inputs) -> Operands:
    """A call's tensors; its bias is the whole one."""
    return Operands(inputs.q, inputs.k, inputs.v, inputs.bias, inputs.sinks, inputs.mask)


class Weighed(NamedTuple):
    """The weights of tiles.

    Attributes:
        weights: softmax over the visible keys, ``(b, h, g, t, s)``.
        blind: True for a query that sees no key, whose weights mean nothing, ``(b or 1, h or 1, g,
            t, 1)``; None where every query sees one.
        lse: log-sum-exp of the scores and the sink, ``(b, h, g, t, 1)``; None where not asked for.
        backward: see ``Backward``.
    """

    weights: Tensor
    blind: Tensor | None
    lse: Tensor | None
    backward: Backward

    def seeing(self, x: Tensor, value: float = 0.0) -> Tensor:
        """``x``, but ``value`` for queries that see no key."""
        return x if self.blind is None else x.masked_fill(self.blind, value)


@dataclass(frozen=True)
class Formula:
    """Attention within tiles.

    Attributes:
        draws: dropout's numbers of queries and of keys, both ``(b * h, n)``; None without dropout.
        compute: the dtype of scores and weights.
        same: which of a tile's keys each of its queries sees, ``(t, s)`` or ``(h, 1, t, s)``; the
            same for all tiles, as ``Reach.step`` promises. None where each tile asks the rule.
    """

    spec: Spec
    rule: Rule
    draws: tuple[Tensor, Tensor] | None
    xpos: Xpos | None
    compute: torch.dtype
    same: Tensor | None
    _hidden: dict[object, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False)
    """The last portion's ``_hiding``."""

    def narrowed(self, tiles: Tiles) -> Tiles:
        """``tiles``, where they are one, without keys that none of its queries may see.

        Long windows are cut into several tiles, whose intervals of keys begin or end together.
        """
        if self.same is not None or tiles.count > 1:
            return tiles
        sizes, (start, stop) = tiles.sizes, tiles.key_range
        low, high = 0, sizes.m
        if not self.rule.tensors and not self.rule.by_head:
            first, end = tiles.query_range
            low = max(low, self.rule.keys(0, 0, first)[0])
            high = min(high, self.rule.keys(0, 0, min(end, sizes.n) - 1)[1] + 1)
        low, high = max(low, start), min(high, stop)
        if low >= high:
            return tiles
        before, after = sizes.before - (low - start), sizes.after - (stop - high)
        return replace(tiles, sizes=replace(sizes, before=before, after=after))

    def output(self, tiles: Tiles, operands: Operands) -> tuple[Tensor, Tensor | None]:
        """The tiles' output, ``(b, h, queries, d_v)``, and log-sum-exps ``(b, h, queries)``."""
        q, v = operands.q, operands.v
        found = self.weigh(tiles, *self.scaled(tiles, q, operands.k), operands)
        weights = times(found.weights, self.keep(tiles))
        out = found.seeing(weights @ tiles.keys(v).to(self.compute))
        lse = None
        if self.spec.return_lse:
            assert found.lse is not None
            lse = tiles.joined(found.seeing(found.lse, -torch.inf)[..., 0])
        return tiles.joined(out).to(q.dtype), lse

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

    def weigh(self, tiles: Tiles, q: Tensor, k: Tensor, operands: Operands) -> Weighed:
        """The tiles' weights; ``q`` and ``k`` are their queries and keys, ``scaled``."""
        spec, bias, device = self.spec, operands.bias, q.device
        ratio = own = None

        def backward(grad_scores: Tensor, grad_bias: Tensor | None) -> Tensor:
            if spec.shared_qk:
                clear_own_gradients(grad_scores, tiles.sizes.before, own)
            if grad_bias is not None:
                self._add_bias_gradient(tiles, grad_bias, grad_scores)
            if ratio is not None:
                pull_back_tiles(grad_scores, ratio)
            return grad_scores

        scores = q @ k.transpose(-1, -2)
        if spec.softcap is not None:
            scores, ratio = cap_tiles(scores, spec.softcap)
        if bias is not None:
            scores = self._biased(tiles, scores, bias)
        if spec.shared_qk:
            own = None if self.rule.is_window else own_key(self.rule, *tiles.indices(device))
            scores = with_own_scores(scores, tiles.sizes.before, own)
        hiding, blind = self._hiding(tiles, operands.mask, device)
        scores = added_in_place(scores, hiding)
        if bias is not None:  # which may hide keys as well
            hidden = (scores == -torch.inf).all(-1, keepdim=True)
            scores = scores.masked_fill(hidden, 0.0)
            blind = hidden if blind is None else hidden | blind
        weights = scores.softmax(-1)
        if not spec.return_lse and operands.sinks is None:
            return Weighed(weights, blind, None, backward)
        # From the highest score and its weight: logsumexp would take the exponentials once more.
        lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
        if operands.sinks is not None:
            total = with_sink(lse, self.sinks(tiles, operands.sinks))
            weights, lse = weights * (lse - total).exp(), total
        return Weighed(weights, blind, lse, backward)

    def sinks(self, tiles: Tiles, sinks: Tensor) -> Tensor:
        """The sink of each head, ``(b, h, 1, 1, 1)``."""
        rows = tiles.rows(sinks.device)[..., None, None, None]
        return sinks_of_rows(sinks, rows, self.compute)

    def keep(self, tiles: Tiles) -> Tensor | None:
        """What dropout multiplies the weights by."""
        if self.draws is None:
            return None
        by_query, by_key = (
            draw.view(tiles.sizes.batch, tiles.sizes.heads, -1, 1) for draw in self.draws
        )
        by_query, by_key = tiles.queries(by_query), tiles.keys(by_key)
        keep = keeps(by_query, by_key.transpose(-1, -2), self.spec.dropout)
        return keep.to(self.compute) / (1 - self.spec.dropout)

    def _biased(self, tiles: Tiles, scores: Tensor, bias: Tensor) -> Tensor:
        if self.rule.is_window:
            return add_to_tiles(scores, bias, tiles.rows(scores.device))
        place = bias_place(self.rule, tiles.sizes.heads, bias.shape[0])
        seen = self.rule.sees(*tiles.indices(scores.device))
        # A bias may hold anything for keys that the window hides.
        return scores + torch.where(seen, bias[place(*tiles.indices(scores.device))], 0.0)

    def _add_bias_gradient(self, tiles: Tiles, total: Tensor, grad_scores: Tensor) -> None:
        if self.rule.is_window:
            add_gradient_of_tiles(total, grad_scores, tiles.rows(grad_scores.device))
            return
        place = bias_place(self.rule, tiles.sizes.heads, total.shape[0])
        where = torch.broadcast_tensors(*place(*tiles.indices(grad_scores.device)), grad_scores)
        total.index_put_(where[:3], grad_scores, accumulate=True)

    def _hiding(
        self, tiles: Tiles, mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """What is added to hide scores, ``(b or 1, h or 1, g or 1, t, s)``, and ``Weighed.blind``.

        0 where a query sees a key, -inf elsewhere, and 0 throughout for a query that sees none.
        """
        portion = None  # not hashable in a compiler, where all tiles are one
        if not tiles.whole:
            portion = tiles.batch.start, tiles.batch.stop, tiles.first, tiles.count
            if portion in self._hidden:
                return self._hidden[portion]
        blind: Tensor | None
        if self.same is None and mask is None and not self.rule.has_holes:
            shown, blind = self._shown_by_bounds(tiles, device)
        else:
            shown, blind = self._shown(tiles, mask, device)
        hiding = torch.where(shown, 0.0, -torch.inf).to(self.compute)
        if portion and not self.rule.by_head and (mask is None or mask.shape[1] == 1):
            self._hidden.clear()
            self._hidden[portion] = hiding, blind  # for the heads that come next
        return hiding, blind

    def _shown(
        self, tiles: Tiles, mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Which scores are not hidden, and ``Weighed.blind``."""
        seen = self.same
        if seen is None:
            seen = self.rule.sees(*tiles.indices(device))
        elif seen.dim() == 4 and seen.shape[0] > 1:
            seen = seen[tiles.heads]
        sees_itself = self.same is not None and mask is None and not tiles.ragged
        if mask is not None or not tiles.inside:
            seen = seen & tiles.kept_keys(mask, device)
        if sees_itself:
            return seen, None
        blind = ~seen.any(-1, keepdim=True)
        return seen | blind, blind

    def _shown_by_bounds(self, tiles: Tiles, device: torch.device) -> tuple[Tensor, Tensor]:
        """``_shown`` without a mask: two comparisons of 32-bit numbers for each score."""
        batch, head, query, key = tiles.indices(device)
        first, last = self.rule.keys(batch, head, query)
        first, last = at_least(first, 0), at_most(last, tiles.sizes.m - 1)
        blind = last < first
        first = torch.where(blind, -_FAR, first).to(torch.int32)
        last = torch.where(blind, _FAR, last).to(torch.int32)
        key = key.to(torch.int32)
        return (first <= key) & (key <= last), blind


_FAR = 2**31 - 1
"""Before and past every key."""


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
    if xpos is not None and not xpos_products_fit(sizes.span, xpos.base, compute):
        if not has_float64(q.device):
            raise ValueError(
                f"rotary's scale_base must be larger on {q.device}, which has no float64: xpos's "
                f"factors over {sizes.span} tokens overflow float32, got {xpos.base}"
            )
        compute = torch.float64
    same = None
    step = rule.reach.step
    if step and not rule.tensors and (sizes.tile % step == 0 or sizes.tiles == 1):
        head = torch.arange(sizes.heads, device=q.device)[:, None, None, None]
        query = torch.arange(sizes.tile, device=q.device)[:, None]
        key = torch.arange(sizes.span, device=q.device) - sizes.before
        same = rule.sees(0, head, query, key)
    return Formula(spec, rule, draws, xpos, compute, same)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x * factor``; ``x`` where there is no factor."""
    return x if factor is None else x * factor
