"""What ``dense`` gives to its kernels: queries, keys and values, and what is added to scores.

It is one launch, for any size: what counts there is the host's time. Shapes are those of ``spec``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..masks.window import Window
from ..spec import Inputs
from . import dense_tables

_LOW = -(2.0**24)
"""The scores of padding; or a dtype's lowest number, if that is higher.

It is finite, so that a query that sees padding alone has a softmax. Lower ones would cost the
backward pass digits of the log-sum-exp. Keys and values of padding are zeros, and so is the output
of such a query.
"""

ALIGNED = 8
"""Rows of a tensor begin at multiples of so many numbers, or kernels cannot read it."""

_TOKENS = 32
"""Tokens of a program of the launch."""

Treated = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries, keys and values, and what is added to scores: ``(b or 1, h or 1, n, n)``, or None."""


class Beside(NamedTuple):
    """What a call is treated with.

    Attributes:
        rotations: ``dense_tables.rotations_of``.
        mask: ``(b, h or 1, n)``, False where a token is padding, or None.
        documents: ``(b, 1, n)``, or None.
        table: ``dense_tables.hidden_by``, if what is added to scores is to be written.
        bias: ``(heads, W, span)`` in queries' dtype, or None.
    """

    rotations: dense_tables.Rotations
    mask: Tensor | None
    documents: Tensor | None
    table: Tensor | None
    bias: Tensor | None


class Treatment:
    """Rotates, clears padding, and writes what is added to scores, for calls of one kind."""

    def __init__(self, window: Window, inputs: Inputs, trains: bool) -> None:
        """Of calls like this one.

        Args:
            trains: whether gradients will be taken.
        """
        turns, clears = inputs.inv_freq is not None, inputs.mask is not None
        self._forward = _Launch(window, inputs, trains=trains)
        self._back = _Launch(window, inputs, back=True) if trains and (turns or clears) else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, beside: Beside) -> Treated:
        """A call's tensors, treated."""
        if self._back is None:
            return self._forward(q, k, v, beside)
        with torch.no_grad():
            *made, scores = self._forward(q, k, v, beside)
        q, k, v = _Treated.apply(q, k, v, made, beside, self._back)  # type: ignore[no-untyped-call]
        return q, k, v, scores


class _Treated(torch.autograd.Function):
    """Queries, keys and values that were ``made`` of others, as one step of autograd.

    Gradients of padding are 0 as they come, but for those of values: a query that sees padding
    alone gives it weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        made: list[Tensor],
        beside: Beside,
        back: "_Launch",
    ) -> tuple[Tensor, ...]:
        ctx.back, ctx.rotations = back, beside.rotations
        ctx.save_for_backward(beside.mask)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        dq, dk, dv, _ = ctx.back(*grads, Beside(ctx.rotations, mask, None, None, None))
        return dq, dk, dv, None, None, None


class _Launch:
    """The launch of ``dense_kernel.prepare`` for calls of one kind."""

    def __init__(
        self, window: Window, inputs: Inputs, trains: bool = False, back: bool = False
    ) -> None:
        from .dense_kernel import prepare  # here, because a processor needs no Triton

        q, k, _, mask, bias = inputs[:5]
        (b, h, n, d), turns, clears = q.shape, inputs.inv_freq is not None, mask is not None
        mask_heads = 1 if mask is None else mask.shape[1]
        self._writes_q = turns or (clears and trains)
        self._writes_k = turns or (clears and not back)
        self._writes_v = clears
        self._scores_shape: tuple[int, int, int, int] | None = None
        if not back and (clears or bias is not None):
            heads = mask_heads if bias is None else h
            self._scores_shape = b if clears else 1, heads, n, n + -n % ALIGNED
        self._fills_rows = n % ALIGNED == 0
        of_bias = 1, 1, 0, 1  # a kernel is compiled for these, and any would do
        if bias is not None:
            of_bias = bias.shape[0], window.size, window.look_backward, window.span
        self._numbers = (
            b, n, h, k.shape[1], mask_heads, d, trains, back, _TOKENS, dense_tables.LONGEST,
            max(torch.finfo(q.dtype).min, _LOW), *of_bias, ALIGNED,
        )  # fmt: skip
        self._grid = b * h, -(-n // _TOKENS), 4
        self._several = torch.cuda.device_count() > 1
        self._prepare = prepare[self._grid]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, beside: Beside) -> Treated:
        if self._several:
            with torch.cuda.device_of(q):
                return self._launched(q, k, v, beside)
        return self._launched(q, k, v, beside)

    def _launched(self, q: Tensor, k: Tensor, v: Tensor, beside: Beside) -> Treated:
        rotations, mask, documents, table, bias = beside
        q, k, v = _in_pieces(q), _in_pieces(k), _in_pieces(v)
        q_out = _like(q) if self._writes_q else None
        k_out = _like(k) if self._writes_k else None
        v_out = _like(v) if self._writes_v else None
        scores = None if self._scores_shape is None else q.new_empty(self._scores_shape)
        compiled = self._prepare(
            q, k, v, q_out, k_out, v_out, *rotations, mask, documents, table,
            None if bias is None else bias.contiguous(), scores,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *self._numbers,
        )  # fmt: skip
        if compiled is not None:  # the kernel of this kind, which is launched in half of the time
            self._prepare = compiled[self._grid]
        return (
            q if q_out is None else q_out,
            k if k_out is None else k_out,
            v if v_out is None else v_out,
            scores if scores is None or self._fills_rows else scores[..., : q.shape[2]],
        )


def _in_pieces(x: Tensor) -> Tensor:
    """``x``, each token in one piece."""
    return x if x.stride(3) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
