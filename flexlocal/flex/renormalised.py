"""Dropout and sinks on the flex path: weights that are not the softmax of a kernel's scores.

Dropout acts after the softmax, whose normaliser counts the dropped weights too. The first kernel
hides the dropped scores: its output mixes the right values, but is normalised by the kept weights
alone. A second kernel hides none of them and gives the log-sum-exp of all of a query's scores
``s``; its values are a few channels wide, since its output is not needed. A sink adds to it.
With the sum ``L`` of both, the output is multiplied by ``exp(l_1 - L) / (1 - p)``, where ``l_1`` is
the first kernel's log-sum-exp.

The backward pass knows ``L``. With the weights ``P = exp(s - L)``, the mask ``M``, 0 where a
weight is dropped and ``1 / (1 - p)`` elsewhere, and ``D_i = out_i . grad_i - grad_L_i`` it wants

    grad_v_j = sum_i M_ij P_ij grad_i        grad_s_ij = P_ij (M_ij v_j . grad_i - D_i)

(FlashAttention, arXiv:2205.14135, appendix B.4), and for a sink ``-sum_i exp(sink - L_i) D_i``.
FlexAttention's backward kernel computes, for a score function ``f`` whose gradient is ``f'``, and
log-sum-exps ``l`` with gradients ``l'``,

    w = exp(f(s) - l)     grad_v_j = sum_i w_ij grad_i
    grad_s = f'(w (v_j . grad_i - out_i . grad_i + l'))

Without dropout it is given ``l = L`` and ``l' = grad_L``. With it, ``f(s) = s - L``, or -inf where
dropped, ``l = log(1 - p)`` and ``l' = out_i . grad_i - (1 - p) D_i``. The gradient of a dropped
score is then missing, because its ``w`` is 0: ``f'`` returns it, ``-P D``.

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
from ..mods.sinks import gradient_of_sinks, sinks_of_rows, with_sink
from ..torch_limits.kernels import LEAST_HEAD
from ..torch_limits.memory import settled
from ..torch_limits.tracing import seen_as_constant
from .kernel import Kernel

_LOG2_E = 1 / math.log(2)

_DEFAULTS = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
}
"""Kernel options that ``flex_attention`` fills in, but the operator of its gradient does not."""


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """``flex_attention``'s output and log-sum-exps, either of which may be used alone."""
    keep_whole()
    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **arguments)
    return _together(out, aux.lse)


def attend_renormalised(
    kernel: Kernel,
    dropout: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    draws: tuple[Tensor, Tensor] | None,
    lists: tuple[Tensor, ...],
    looked_up: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Local attention with dropout, sinks or both.

    Args:
        sinks: ``(heads,)``.
        draws: int32 ``(rows, n)`` of queries and ``(rows, slots)`` of keys, see ``mods.dropout``;
            None without dropout.
        lists: the index tensors of the block mask.
        looked_up: what the mask looks up, see ``Kernel.mask_mod``.

    Returns:
        ``(b, h, n, d_v)`` in ``q``'s dtype, and the log-sum-exps ``(b, h, n)``.
    """
    keep_whole()
    common = kernel.arguments(lists, looked_up)
    aux = AuxRequest(lse=True)
    query, key, value = q.detach(), k.detach(), v.detach()
    full = kernel.score_mod(None if bias is None else bias.detach(), looked_up)
    kept = full
    if draws is not None:
        drop = drop_scores(*draws, kernel.heads, dropout)
        kept = drop if full is None else in_turn(full, drop)
    out, of_kept = flex_attention(query, key, value, score_mod=kept, return_aux=aux, **common)
    total = of_kept.lse
    if draws is not None:
        thin = value[..., :LEAST_HEAD]  # for the log-sum-exp alone
        _, of_all = flex_attention(query, key, thin, score_mod=full, return_aux=aux, **common)
        total = of_all.lse
    if sinks is not None:
        sink = sinks_of_rows(sinks.detach(), _rows(total), total.dtype)
        total = with_sink(total, sink[..., None])
    # `where` makes the difference exactly 0 where nothing is dropped. Inductor computes both sides
    # from log-sum-exps in base 2 and leaves one product unrounded, which shows near -5e4. `where`
    # also avoids -inf - -inf for queries that see no key.
    difference = torch.where(of_kept.lse == total, 0.0, of_kept.lse - total)
    share = difference.exp() / (1 - dropout)
    tensors = q, k, v, bias, sinks, out, share, total
    return _attach(kernel, dropout, tensors, draws or (), looked_up, lists)


def _rows(lse: Tensor) -> Tensor:
    """The row of each head, ``(b, h)``."""
    b, h = lse.shape[:2]
    return torch.arange(b * h, device=lse.device).view(b, h)


@seen_as_constant
def keep_whole() -> None:
    """Makes functions opaque to Dynamo, which cannot trace their backward passes."""
    torch.compiler.allow_in_graph(_attach)
    torch.compiler.allow_in_graph(_together)


def _together(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _Together.apply(out, lse)  # type: ignore[no-untyped-call]
    return found


class _Together(torch.autograd.Function):
    """Both tensors, with a gradient of zeros for the one that is not used.

    FlexAttention's backward pass fails without a gradient of its output (torch 2.11: NoneType has
    no make_loader).
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad_lse


def _attach(
    kernel: Kernel,
    dropout: float,
    tensors: tuple[Tensor | None, ...],
    draws: tuple[Tensor, ...],
    looked_up: tuple[Tensor, ...],
    lists: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    every = *tensors, *draws, *looked_up, *lists
    counts = len(draws), len(looked_up)
    found: tuple[Tensor, Tensor] = _Renormalised.apply(kernel, dropout, counts, *every)  # type: ignore[no-untyped-call]
    return found


class _Renormalised(torch.autograd.Function):
    """``out * share`` and ``total`` as functions of q, k, v, bias and sinks.

    The gradients are those of the file's head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        dropout: float,
        counts: tuple[int, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        out: Tensor,
        share: Tensor,
        total: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out = (out * share[..., None]).to(q.dtype)
        ctx.kernel, ctx.dropout, ctx.counts = kernel, dropout, counts
        ctx.save_for_backward(q, k, v, bias, sinks, out, total, *others)
        return out, total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sinks, out, total, *others = ctx.saved_tensors
        kernel: Kernel = ctx.kernel
        draws, looked_up = ctx.counts
        drawn, others = tuple(others[:draws]), others[draws:]
        found, lists = tuple(others[:looked_up]), tuple(others[looked_up:])
        seeing = total > -torch.inf
        across = (out.float() * grad.float()).sum(-1)
        along = torch.where(seeing, across - grad_total, 0.0)
        # The operator takes log-sum-exps in base 2, and 0 for queries that see no key. A tensor of
        # equal numbers would not do: Inductor makes a constant of it, and may leave gaps between
        # its rows (torch 2.11).
        by_token: tuple[Tensor, ...] = ()
        if drawn:
            by_token = *drawn, settled(total), settled(along)
            norm = math.log1p(-ctx.dropout) * _LOG2_E
            norms = torch.zeros_like(total).masked_fill(seeing, norm)
            pulled = across - (1 - ctx.dropout) * along
        else:
            norms = torch.where(seeing, total * _LOG2_E, 0.0)
            pulled = torch.where(seeing, grad_total, 0.0)
        captured = *by_token, *([] if bias is None else [bias]), *found
        learned: bool = ctx.needs_input_grad[_FIRST_TENSOR + 3]
        scores = _Scores(kernel, ctx.dropout, bool(drawn), learned)
        *grads, grads_captured = torch.ops.higher_order.flex_attention_backward(
            q,
            k,
            v,
            out,
            settled(norms),
            grad,
            settled(pulled / _LOG2_E),
            scores.value,
            scores.pulled_back,
            kernel.blocks.mask(lists, scores.visible).as_tuple(),
            kernel.scale,
            {**_DEFAULTS, **kernel.options},
            captured,
            found,
        )
        grad_bias = grads_captured[len(by_token)] if learned else None
        grad_sinks = None
        if sinks is not None:
            rows = _rows(total)
            sink = sinks_of_rows(sinks, rows, total.dtype)[..., None]
            weight = torch.where(seeing, (sink - total).exp(), 0.0)
            grad_sinks = gradient_of_sinks(sinks, rows, -(weight * along).sum(-1)).to(sinks.dtype)
        others_count = len(ctx.needs_input_grad) - _FIRST_TENSOR - 5
        return (*[None] * _FIRST_TENSOR, *grads, grad_bias, grad_sinks, *[None] * others_count)


_FIRST_TENSOR = 3
"""The place of ``q`` among the arguments of ``_Renormalised``."""


class _Captured(NamedTuple):
    """What the functions of a score look up, in the order in which the operator is given it.

    The first four are there with dropout only.
    """

    query_draws: Tensor | None
    key_draws: Tensor | None
    total: Tensor | None
    """``L``."""
    along: Tensor | None
    """``D``."""
    bias: Tensor | None
    looked_up: tuple[Tensor, ...]


_BY_TOKEN = _Captured._fields.index("bias")


@dataclass(frozen=True)
class _Scores:
    """``f`` and ``f'`` of the file's head, and the mask, for the operator of the gradient.

    The operator hands over the tensors that they look up as arguments. First come the four numbers
    of a score's place: batch entry, head, query and key slot. Then come the tensors of
    ``_Captured``, without those that there are not; for ``visible`` those of ``looked_up`` alone.

    Attributes:
        drops: weights are dropped.
        learned: the bias wants a gradient.
    """

    kernel: Kernel
    dropout: float
    drops: bool
    learned: bool

    def visible(self, *arguments: Tensor) -> Tensor:
        """The mask_mod."""
        return self.kernel.mask_mod(arguments[4:])(*arguments[:4])

    def value(self, score: Tensor, *arguments: Tensor) -> Tensor:
        """``f``: the score; with dropout less its query's log-sum-exp, hidden where dropped."""
        place, captured = arguments[:4], self._captured(arguments[4:])
        score = self._modified(score, place, captured)
        if not self.drops:
            return score
        log_weight = score - captured.total[place[:3]]  # type: ignore[index]
        return torch.where(self._keeps(place, captured), log_weight, -torch.inf)

    def pulled_back(self, score: Tensor, *arguments: Tensor) -> list[Tensor | None]:
        """``f'``: gradients of all that ``f`` takes; the gradient of ``f`` follows the place."""
        place, grad, captured = arguments[:4], arguments[4], self._captured(arguments[5:])
        if self.drops:
            grad = torch.where(
                self._keeps(place, captured), grad, self._of_dropped(score, place, captured)
            )
        of_bias, of_score = self.kernel.pulled_back(grad, score, place, captured.looked_up)
        grads: list[Tensor | None] = [None] * (len(arguments) - 1)  # place and captured tensors
        if self.learned and captured.bias is not None:
            where = self.kernel.bias_place(captured.looked_up)(*place)
            first = len(place) + (_BY_TOKEN if self.drops else 0)
            grads[first] = gathered(of_bias, captured.bias.shape, where)
        return [of_score, *grads]

    def _captured(self, tensors: Sequence[Tensor]) -> _Captured:
        count = _BY_TOKEN if self.drops else 0
        first = tensors[:count] if self.drops else (None,) * _BY_TOKEN
        rest = tuple(tensors[count:])
        has_bias = self.kernel.bias_heads is not None
        bias = rest[0] if has_bias else None
        return _Captured(first[0], first[1], first[2], first[3], bias, rest[has_bias:])

    def _modified(self, score: Tensor, place: Sequence[Tensor], captured: _Captured) -> Tensor:
        """``s``."""
        mod = self.kernel.score_mod(captured.bias, captured.looked_up)
        return score if mod is None else mod(score, *place)

    def _of_dropped(self, score: Tensor, place: Sequence[Tensor], captured: _Captured) -> Tensor:
        """``-P D``."""
        log_weight = self._modified(score, place, captured) - captured.total[place[:3]]  # type: ignore[index]
        weight = (log_weight * _LOG2_E).exp2()  # half the instructions of exp
        dropped = -weight * captured.along[place[:3]]  # type: ignore[index]
        if not self.learned:
            return dropped
        # Kernels add to the bias's gradient before they apply the mask (torch 2.11).
        visible = self.kernel.mask_mod(captured.looked_up)
        return torch.where(visible(*place), dropped, 0.0)

    def _keeps(self, place: Sequence[Tensor], captured: _Captured) -> Tensor:
        assert captured.query_draws is not None and captured.key_draws is not None
        keep = dropout_mod(
            captured.query_draws, captured.key_draws, self.kernel.heads, self.dropout
        )
        return keep(*place)
