"""Dropout of attention weights on the fused path: two kernels forward, one backward.

Dropout acts after the softmax, whose normaliser counts the weights that are dropped too. With the
dropped scores hidden, a kernel gives the right mixture of values but the wrong normaliser; a
second one, over values a few channels wide, gives the right one: ``L``, the log-sum-exp of all of
a query's scores ``s``.

The backward pass knows ``L``. With the weights ``P = exp(s - L)``, the mask ``M``, 0 where a
weight is dropped and ``1 / (1 - p)`` elsewhere, and ``D_i = out_i . grad_i`` it wants

    grad_v_j = sum_i M_ij P_ij grad_i        grad_s_ij = P_ij (M_ij v_j . grad_i - D_i)

(FlashAttention, arXiv:2205.14135, appendix B.4). FlexAttention's backward kernel computes, for a
score function ``f`` whose gradient is ``f'``, and log-sum-exps ``l`` with gradients ``l'``,

    w = exp(f(s) - l)     grad_v_j = sum_i w_ij grad_i     grad_s = f'(w (v_j . grad_i - D_i + l'))

and is given ``f(s) = s - L - log(1 - p)``, or -inf where dropped, ``l = 0`` and ``l' = p D``.
What is left is the gradient of dropped scores, ``-P D``, where ``w`` is 0: ``f'`` says it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from .kernel import Kernel
from .masks.buffer import settled
from .masks.dropout import kept
from .masks.keys import visible_mod
from .masks.scores import SELF_SCORE, drop_scores, in_turn

_THIN = 16
"""Channels of the values for the log-sum-exp alone: the fewest that kernels take."""


_DEFAULTS = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
}
"""Kernel options that ``flex_attention`` fills in."""


def attend_dropped(
    kernel: Kernel,
    dropout: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    query_draw: Tensor,
    key_draw: Tensor,
    kept_slots: Tensor | None,
    lists: tuple[Tensor, ...],
) -> Tensor:
    """Local attention with dropout.

    Args:
        query_draw: int32 ``(rows, n)``; see ``masks.dropout``.
        key_draw: int32 ``(rows, slots)``.
        kept_slots: boolean ``(batch, heads or 1, slots)``, for a key mask.
        lists: the index tensors of the block mask.

    Returns:
        ``(b, h, n, d_v)`` in ``q``'s dtype.
    """
    let_through()
    drop = drop_scores(query_draw, key_draw, kernel.heads, dropout)
    mods = kernel.score_mods(None if bias is None else bias.detach())
    common: dict[str, Any] = {
        "block_mask": kernel.block_mask(lists, visible_mod(kernel.rule, kept_slots)),
        "scale": kernel.scale,
        "enable_gqa": kernel.grouped,
        "kernel_options": kernel.options,
        "return_aux": AuxRequest(lse=True),
    }
    fixed = q.detach(), k.detach(), v.detach()
    out, some = flex_attention(*fixed, score_mod=in_turn(*mods, drop), **common)
    thin = *fixed[:2], fixed[2][..., :_THIN]
    _, every = flex_attention(*thin, score_mod=in_turn(*mods), **common)
    total = every.lse
    blind = total == -torch.inf
    share = torch.where(blind, 0.0, some.lse - torch.where(blind, 0.0, total)).exp()
    if kernel.shared_qk:
        # A token that sees itself alone keeps all or nothing; its log-sum-exps are too far from 0
        # for a difference of two to tell.
        alone = total < SELF_SCORE / 2
        share, total = torch.where(alone, 1.0, share), torch.where(alone, SELF_SCORE, total)
    share = share / (1 - dropout)
    return _attach(
        kernel, dropout, q, k, v, bias, out, share, total, query_draw, key_draw, kept_slots, lists
    )


def let_through() -> None:
    """Has a compiler take ``_attach`` for an operator, since it cannot trace its backward pass."""
    torch.compiler.allow_in_graph(_attach)


def _attach(*arguments: Any) -> Tensor:
    *others, lists = arguments
    out: Tensor = _Dropped.apply(*others, *lists)  # type: ignore[no-untyped-call]
    return out


class _Dropped(torch.autograd.Function):
    """``out * share`` as a function of q, k, v and bias, with the gradients of the docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        dropout: float,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor,
        share: Tensor,
        total: Tensor,
        query_draw: Tensor,
        key_draw: Tensor,
        kept_slots: Tensor | None,
        *lists: Tensor,
    ) -> Tensor:
        out = (out * share[..., None]).to(q.dtype)
        ctx.kernel, ctx.dropout = kernel, dropout
        ctx.save_for_backward(q, k, v, bias, out, total, query_draw, key_draw, kept_slots, *lists)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, total, query_draw, key_draw, kept_slots, *lists = ctx.saved_tensors
        kernel, dropout = ctx.kernel, ctx.dropout
        along = settled((out.float() * grad.float()).sum(-1))
        scores = _Scores(kernel, dropout, ctx.needs_input_grad[5])
        slots = () if kept_slots is None else (kept_slots,)
        *grads, captured = torch.ops.higher_order.flex_attention_backward(
            q,
            k,
            v,
            out,
            settled(torch.zeros_like(total)),
            grad,
            along * (dropout * math.log(2)),  # log-sum-exps have base 2 there
            scores.shifted,
            scores.pulled_back,
            kernel.block_mask(tuple(lists), scores.visible).as_tuple(),
            kernel.scale,
            {**_DEFAULTS, **kernel.options},
            (query_draw, key_draw, total, along, *(() if bias is None else (bias,)), *slots),
            slots,
        )
        grad_bias = captured[4] if ctx.needs_input_grad[5] else None
        return (None, None, *grads, grad_bias, *[None] * (6 + len(lists)))


@dataclass(frozen=True)
class _Scores:
    """``f`` and ``f'`` of the docstring, and the mask, which take their tensors as arguments.

    A place is the batch entry, the head, the query and the key slot of a score.

    Attributes:
        learned: the bias wants a gradient.
    """

    kernel: Kernel
    dropout: float
    learned: bool

    def visible(self, *arguments: Tensor) -> Tensor:
        """The mask_mod: of a place, and the kept slots where a key mask says them."""
        place, kept_slots = arguments[:4], arguments[4:]
        return visible_mod(self.kernel.rule, kept_slots[0] if kept_slots else None)(*place)

    def shifted(self, score: Tensor, *arguments: Tensor) -> Tensor:
        """``f``: the score less its query's log-sum-exp and a constant, hidden where dropped."""
        place, (query_draw, key_draw, total) = arguments[:4], arguments[4:7]
        bias, _ = self._parted(arguments[8:])
        weight = self._final(score, place, bias) - total[place[:3]]
        kept = self._kept(place, query_draw, key_draw)
        return torch.where(kept, weight - math.log1p(-self.dropout), -torch.inf)

    def pulled_back(self, score: Tensor, *arguments: Tensor) -> list[Tensor | None]:
        """``f'``: gradients of all that ``f`` takes, of the gradient that follows the place."""
        place, grad = arguments[:4], arguments[4]
        query_draw, key_draw, total, along = arguments[5:9]
        bias, kept_slots = self._parted(arguments[9:])
        final, pull = torch.func.vjp(  # type: ignore[misc]
            lambda score, *bias: self._final(score, place, bias), score, *bias
        )
        dropped = -(final - total[place[:3]]).exp() * along[place[:3]]
        if self.learned:  # kernels add to its gradient before they ask the mask
            dropped = torch.where(self.visible(*place, *kept_slots), dropped, 0.0)
        through = torch.where(self._kept(place, query_draw, key_draw), grad, dropped)
        grad_score, *grad_bias = pull(through.to(final.dtype))
        of_bias = grad_bias if self.learned else [None] * len(bias)
        return [grad_score, *[None] * 8, *of_bias, *[None] * len(kept_slots)]

    def _parted(self, more: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The bias and the kept slots, where there are such."""
        count = len(more) - self.kernel.masked
        return more[:count], more[count:]

    def _final(self, score: Tensor, place: Sequence[Tensor], bias: Sequence[Tensor]) -> Tensor:
        for mod in self.kernel.score_mods(bias[0] if bias else None):
            score = mod(score, *place)
        return score

    def _kept(self, place: Sequence[Tensor], query_draw: Tensor, key_draw: Tensor) -> Tensor:
        batch, head, query, key = place
        row = batch * self.kernel.heads + head
        return kept(query_draw[row, query], key_draw[row, key], self.dropout)
