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

and is given ``f(s) = s - L``, or -inf where dropped, ``l = log(1 - p)`` and ``l' = p D``.
What is left is the gradient of a dropped score, where ``w`` is 0: ``f'`` says it, ``-P D``.

The two operators of ``torch.ops`` here are those that FlexAttention's own gradient is made of;
torch documents neither (the same in 2.11 to 2.14).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from .kernel import LEAST_HEAD, Kernel, MaskReads
from .masks.buffer import settled
from .masks.scores import drop_scores, dropout_mod, in_turn

_LOG2_E = 1 / math.log(2)

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
    draws: tuple[Tensor, Tensor],
    lists: tuple[Tensor, ...],
    reads: MaskReads,
) -> Tensor:
    """Local attention with dropout.

    Args:
        draws: int32 ``(rows, n)`` of queries and ``(rows, slots)`` of keys; see ``masks.dropout``.
        lists: the index tensors of the block mask.
        reads: what the mask looks up.

    Returns:
        ``(b, h, n, d_v)`` in ``q``'s dtype.
    """
    let_through()
    common = kernel.arguments(lists, reads)
    aux = AuxRequest(lse=True)
    query, key, value = q.detach(), k.detach(), v.detach()
    score = kernel.score_mod(None if bias is None else bias.detach())
    drop = drop_scores(*draws, kernel.heads, dropout)
    remaining = drop if score is None else in_turn(score, drop)
    out, some = flex_attention(query, key, value, score_mod=remaining, return_aux=aux, **common)
    thin = value[..., :LEAST_HEAD]  # for the log-sum-exp alone
    _, every = flex_attention(query, key, thin, score_mod=score, return_aux=aux, **common)
    # Where nothing is lost the difference is 0 and no rounding of one side: a compiler makes it of
    # log-sum-exps in base 2 with the product of one side unrounded, which tells near -5e4. That
    # holds for queries that see no key at all, too.
    lost = torch.where(some.lse == every.lse, 0.0, some.lse - every.lse)
    share = lost.exp() / (1 - dropout)
    return _attach(kernel, dropout, q, k, v, bias, out, share, every.lse, draws, lists, reads)


def let_through() -> None:
    """Has a compiler take ``_attach`` for an operator, since it cannot trace its backward pass."""
    torch.compiler.allow_in_graph(_attach)


def _attach(*arguments: Any) -> Tensor:
    *others, draws, lists, reads = arguments
    out: Tensor = _Dropped.apply(*others, *draws, *reads, *lists)  # type: ignore[no-untyped-call]
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
        query_draws: Tensor,
        key_draws: Tensor,
        kept: Tensor | None,
        length: Tensor | None,
        *lists: Tensor,
    ) -> Tensor:
        out = (out * share[..., None]).to(q.dtype)
        ctx.kernel, ctx.dropout = kernel, dropout
        ctx.save_for_backward(
            q, k, v, bias, out, total, query_draws, key_draws, kept, length, *lists
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, total, query_draws, key_draws, kept, length, *lists = ctx.saved_tensors
        kernel: Kernel = ctx.kernel
        along = (out.float() * grad.float()).sum(-1)
        reads = kept, length
        captured = _Captured(query_draws, key_draws, settled(total), settled(along), bias, *reads)
        learned: bool = ctx.needs_input_grad[5]
        scores = _Scores(kernel, ctx.dropout, learned)
        # Log-sum-exps have base 2 there. Blind queries want 0; were all numbers equal, a compiler
        # would make a constant of them, and may leave gaps between its rows that kernels read.
        norm = math.log1p(-ctx.dropout) * _LOG2_E
        norms = torch.zeros_like(total).masked_fill(total > -torch.inf, norm)
        *grads, grads_captured = torch.ops.higher_order.flex_attention_backward(
            q,
            k,
            v,
            out,
            settled(norms),
            grad,
            along * (ctx.dropout / _LOG2_E),
            scores.shifted,
            scores.pulled_back,
            kernel.blocks.mask(tuple(lists), scores.visible).as_tuple(),
            kernel.scale,
            {**_DEFAULTS, **kernel.options},
            tuple(x for x in captured if x is not None),
            tuple(x for x in reads if x is not None),
        )
        grad_bias = grads_captured[_BIAS] if learned else None
        others = len(ctx.needs_input_grad) - 6
        return (None, None, *grads, grad_bias, *[None] * others)


class _Captured(NamedTuple):
    """What the functions of a score look up, in the order in which the backward pass takes it."""

    query_draws: Tensor
    key_draws: Tensor
    total: Tensor
    """``L``."""
    along: Tensor
    """``D``."""
    bias: Tensor | None
    kept: Tensor | None
    length: Tensor | None


_BIAS = _Captured._fields.index("bias")


@dataclass(frozen=True)
class _Scores:
    """``f`` and ``f'`` of the docstring, and the mask, which take their tensors as arguments.

    The first of them is a place: batch entry, head, query and key slot of a score. What they look
    up follows: of ``_Captured`` as much as there is.

    Attributes:
        learned: the bias wants a gradient.
    """

    kernel: Kernel
    dropout: float
    learned: bool

    def visible(self, *arguments: Tensor) -> Tensor:
        """The mask_mod."""
        place, reads = arguments[:4], self._reads(list(arguments[4:]))
        return self.kernel.mask_mod(reads)(*place)

    def shifted(self, score: Tensor, *arguments: Tensor) -> Tensor:
        """``f``: the score less its query's log-sum-exp, hidden where dropped."""
        place, at = arguments[:4], self._captured(arguments[4:])
        return torch.where(self._keeps(place, at), self._log_weight(score, place, at), -torch.inf)

    def pulled_back(self, score: Tensor, *arguments: Tensor) -> list[Tensor | None]:
        """``f'``: gradients of all that ``f`` takes, of the gradient that follows the place."""
        place, grad, at = arguments[:4], arguments[4], self._captured(arguments[5:])
        log_weight = self._log_weight(score, place, at)
        weight = (log_weight * _LOG2_E).exp2()  # half the instructions of exp
        dropped = -weight * at.along[place[:3]]
        if self.learned:  # kernels add to its gradient before they ask the mask
            visible = self.kernel.mask_mod(MaskReads(at.kept, at.length))
            dropped = torch.where(visible(*place), dropped, 0.0)
        grad_score = torch.where(self._keeps(place, at), grad, dropped)
        if self.kernel.itself_by_score:  # which is a constant
            own = self.kernel.blocks.rule.key_position(*place[2:]) == place[2]
            grad_score = torch.where(own, 0.0, grad_score)
        grads: list[Tensor | None] = [None] * (len(arguments) - 1)  # place and captured tensors
        if self.learned and at.bias is not None:
            where = self.kernel.bias_place(*place)
            found = torch.ops.flex_lib.zeros_and_scatter(at.bias.shape, where, grad_score)
            grads[len(place) + _BIAS] = found
        return [grad_score, *grads]

    def _captured(self, tensors: Sequence[Tensor]) -> _Captured:
        rest = list(tensors)
        reads = self._reads(rest)
        bias = rest.pop() if self.kernel.bias_heads is not None else None
        query_draws, key_draws, total, along = rest
        return _Captured(query_draws, key_draws, total, along, bias, *reads)

    def _reads(self, tensors: list[Tensor]) -> MaskReads:
        """Taken from the end of ``tensors``."""
        length = tensors.pop() if self.kernel.asks_length else None
        return MaskReads(tensors.pop() if self.kernel.blocks.masked else None, length)

    def _log_weight(self, score: Tensor, place: Sequence[Tensor], at: _Captured) -> Tensor:
        """``s - L``."""
        mod = self.kernel.score_mod(at.bias)
        return (score if mod is None else mod(score, *place)) - at.total[place[:3]]

    def _keeps(self, place: Sequence[Tensor], at: _Captured) -> Tensor:
        keep = dropout_mod(at.query_draws, at.key_draws, self.kernel.heads, self.dropout)
        return keep(*place)
