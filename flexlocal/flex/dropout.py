"""Dropout of attention weights on the flex path: two kernels forward, one backward.

Dropout acts after the softmax, whose normaliser counts the dropped weights too. The first kernel
hides the dropped scores: its output mixes the right values, but is normalised by the kept weights
alone. The second kernel hides none of them and gives ``L``, the log-sum-exp of all of a query's
scores ``s``; its values are a few channels wide, since its output is not needed.

The backward pass knows ``L``. With the weights ``P = exp(s - L)``, the mask ``M``, 0 where a
weight is dropped and ``1 / (1 - p)`` elsewhere, and ``D_i = out_i . grad_i`` it wants

    grad_v_j = sum_i M_ij P_ij grad_i        grad_s_ij = P_ij (M_ij v_j . grad_i - D_i)

(FlashAttention, arXiv:2205.14135, appendix B.4). FlexAttention's backward kernel computes, for a
score function ``f`` whose gradient is ``f'``, and log-sum-exps ``l`` with gradients ``l'``,

    w = exp(f(s) - l)     grad_v_j = sum_i w_ij grad_i     grad_s = f'(w (v_j . grad_i - D_i + l'))

It is given ``f(s) = s - L``, or -inf where dropped, ``l = log(1 - p)`` and ``l' = p D``. The
gradient of a dropped score is then missing, because its ``w`` is 0: ``f'`` returns it, ``-P D``.

FlexAttention's own gradient is made of ``flex_attention_backward``, which is called here, and
``zeros_and_scatter``, which ``mods.bias`` calls. torch documents neither (unchanged from 2.11 to
2.15).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ..mods.bias import gathered
from ..mods.dropout import drop_scores, dropout_mod
from ..mods.score import in_turn
from ..torch_limits import LEAST_HEAD, seen_as_constant, settled
from .kernel import Kernel

_LOG2_E = 1 / math.log(2)

_DEFAULTS = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
}
"""Kernel options that ``flex_attention`` fills in, but the operator of its gradient does not."""


def attend_dropped(
    kernel: Kernel,
    dropout: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    draws: tuple[Tensor, Tensor],
    lists: tuple[Tensor, ...],
    looked_up: tuple[Tensor, ...],
) -> Tensor:
    """Local attention with dropout.

    Args:
        draws: int32 ``(rows, n)`` of queries and ``(rows, slots)`` of keys; see ``mods.dropout``.
        lists: the index tensors of the block mask.
        looked_up: what the mask looks up, see ``Kernel.mask_mod``.

    Returns:
        ``(b, h, n, d_v)`` in ``q``'s dtype.
    """
    keep_whole()
    common = kernel.arguments(lists, looked_up)
    aux = AuxRequest(lse=True)
    query, key, value = q.detach(), k.detach(), v.detach()
    full = kernel.score_mod(None if bias is None else bias.detach())
    drop = drop_scores(*draws, kernel.heads, dropout)
    kept = drop if full is None else in_turn(full, drop)
    out, of_kept = flex_attention(query, key, value, score_mod=kept, return_aux=aux, **common)
    thin = value[..., :LEAST_HEAD]  # for the log-sum-exp alone
    _, of_all = flex_attention(query, key, thin, score_mod=full, return_aux=aux, **common)
    # `where` makes the difference exactly 0 where nothing is dropped. Inductor computes both sides
    # from log-sum-exps in base 2 and leaves one product unrounded, which shows near -5e4. `where`
    # also avoids -inf - -inf for queries that see no key.
    difference = torch.where(of_kept.lse == of_all.lse, 0.0, of_kept.lse - of_all.lse)
    share = difference.exp() / (1 - dropout)
    tensors = q, k, v, bias, out, share, of_all.lse, *draws
    return _attach(kernel, dropout, tensors, looked_up, lists)


@seen_as_constant
def keep_whole() -> None:
    """Makes ``_attach`` opaque to Dynamo, which cannot trace its backward pass."""
    torch.compiler.allow_in_graph(_attach)


def _attach(
    kernel: Kernel,
    dropout: float,
    tensors: tuple[Tensor | None, ...],
    looked_up: tuple[Tensor, ...],
    lists: tuple[Tensor, ...],
) -> Tensor:
    every = *tensors, *looked_up, *lists
    out: Tensor = _Dropped.apply(kernel, dropout, len(looked_up), *every)  # type: ignore[no-untyped-call]
    return out


class _Dropped(torch.autograd.Function):
    """``out * share`` as a function of q, k, v and bias, with the gradients of the file's head."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        dropout: float,
        looked_up: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor,
        share: Tensor,
        total: Tensor,
        query_draws: Tensor,
        key_draws: Tensor,
        *others: Tensor,
    ) -> Tensor:
        out = (out * share[..., None]).to(q.dtype)
        ctx.kernel, ctx.dropout, ctx.looked_up = kernel, dropout, looked_up
        ctx.save_for_backward(q, k, v, bias, out, total, query_draws, key_draws, *others)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, total, query_draws, key_draws, *others = ctx.saved_tensors
        kernel: Kernel = ctx.kernel
        looked_up, lists = tuple(others[: ctx.looked_up]), tuple(others[ctx.looked_up :])
        along = (out.float() * grad.float()).sum(-1)
        by_token = query_draws, key_draws, settled(total), settled(along)
        captured = *by_token, *([] if bias is None else [bias]), *looked_up
        learned: bool = ctx.needs_input_grad[_FIRST_TENSOR + 3]
        scores = _Scores(kernel, ctx.dropout, learned)
        # The operator takes log-sum-exps in base 2, and 0 for queries that see no key. A tensor of
        # equal numbers would not do: Inductor makes a constant of it, and may leave gaps between
        # its rows.
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
            kernel.blocks.mask(lists, scores.visible).as_tuple(),
            kernel.scale,
            {**_DEFAULTS, **kernel.options},
            captured,
            looked_up,
        )
        grad_bias = grads_captured[_BIAS] if learned else None
        others_count = len(ctx.needs_input_grad) - _FIRST_TENSOR - 4
        return (*[None] * _FIRST_TENSOR, *grads, grad_bias, *[None] * others_count)


_FIRST_TENSOR = 3
"""The place of ``q`` among the arguments of ``_Dropped``."""


class _Captured(NamedTuple):
    """What the functions of a score look up, in the order in which the operator is given it."""

    query_draws: Tensor
    key_draws: Tensor
    total: Tensor
    """``L``."""
    along: Tensor
    """``D``."""
    bias: Tensor | None
    looked_up: tuple[Tensor, ...]


_BIAS = _Captured._fields.index("bias")


@dataclass(frozen=True)
class _Scores:
    """``f`` and ``f'`` of the file's head, and the mask, for the operator of the gradient.

    The operator hands over the tensors that they look up as arguments. First come the four numbers
    of a score's place: batch entry, head, query and key slot. Then come the tensors of
    ``_Captured``, without a bias where there is none; for ``visible`` those of ``looked_up`` alone.

    Attributes:
        learned: the bias wants a gradient.
    """

    kernel: Kernel
    dropout: float
    learned: bool

    def visible(self, *arguments: Tensor) -> Tensor:
        """The mask_mod."""
        return self.kernel.mask_mod(arguments[4:])(*arguments[:4])

    def shifted(self, score: Tensor, *arguments: Tensor) -> Tensor:
        """``f``: the score less its query's log-sum-exp, hidden where dropped."""
        place, captured = arguments[:4], self._captured(arguments[4:])
        return torch.where(
            self._keeps(place, captured), self._log_weight(score, place, captured), -torch.inf
        )

    def pulled_back(self, score: Tensor, *arguments: Tensor) -> list[Tensor | None]:
        """``f'``: gradients of all that ``f`` takes; the gradient of ``f`` follows the place."""
        place, grad, captured = arguments[:4], arguments[4], self._captured(arguments[5:])
        log_weight = self._log_weight(score, place, captured)
        weight = (log_weight * _LOG2_E).exp2()  # half the instructions of exp
        dropped = -weight * captured.along[place[:3]]
        if self.learned:  # kernels add to the bias's gradient before they apply the mask
            visible = self.kernel.mask_mod(captured.looked_up)
            dropped = torch.where(visible(*place), dropped, 0.0)
        grad_score = torch.where(self._keeps(place, captured), grad, dropped)
        own = self.kernel.own_score
        if own is not None and own.gradient is not None:
            grad_score = own.gradient(grad_score, score, *place)
        grads: list[Tensor | None] = [None] * (len(arguments) - 1)  # place and captured tensors
        if self.learned and captured.bias is not None:
            where = self.kernel.bias_place(*place)
            grads[len(place) + _BIAS] = gathered(grad_score, captured.bias.shape, where)
        return [grad_score, *grads]

    def _captured(self, tensors: Sequence[Tensor]) -> _Captured:
        first, rest = tensors[:_BIAS], tuple(tensors[_BIAS:])
        has_bias = self.kernel.bias_heads is not None
        bias = rest[0] if has_bias else None
        return _Captured(first[0], first[1], first[2], first[3], bias, rest[has_bias:])

    def _log_weight(self, score: Tensor, place: Sequence[Tensor], captured: _Captured) -> Tensor:
        """``s - L``."""
        mod = self.kernel.score_mod(captured.bias)
        return (score if mod is None else mod(score, *place)) - captured.total[place[:3]]

    def _keeps(self, place: Sequence[Tensor], captured: _Captured) -> Tensor:
        keep = dropout_mod(
            captured.query_draws, captured.key_draws, self.kernel.heads, self.dropout
        )
        return keep(*place)
