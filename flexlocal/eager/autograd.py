"""The eager path's tiles computed a portion at a time, forward and backward.

The scores of a portion stay in the processor's cache. Memory stays linear in the sequence, since
the backward pass computes the weights again. Shapes are those of ``tiles``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..regions import region
from .formula import Formula, times
from .tiles import Sizes, Tiles, every_tile, some_at_a_time

_SCORES_ON_CPU, _SCORES_ELSEWHERE = 2**20, 2**26
"""Scores in a portion: few enough for the cache, many enough to outweigh an operator's overhead."""


def attend_in_portions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    formula: Formula,
    sizes: Sizes,
) -> Tensor:
    """All tiles' output, ``(b, h, n, d_v)``, and its gradients."""
    out: Tensor = _Tiled.apply(q, k, v, bias, mask, formula, sizes)  # type: ignore[no-untyped-call]
    return out


class _Tiled(torch.autograd.Function):
    """``Formula`` for a portion of tiles at a time, forward and backward."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        formula: Formula,
        sizes: Sizes,
    ) -> Tensor:
        out = torch.empty_like(q) if v.shape[-1] == q.shape[-1] else _empty(q, v.shape[-1])
        for tiles in portions(sizes, q.device):
            part = formula.output(tiles, q, k, v, bias, mask)
            start = tiles.first * sizes.tile
            out[tiles.batch, tiles.heads, start : start + part.shape[2]] = part
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.formula, ctx.sizes = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask = ctx.saved_tensors
        with without_autocast(grad.device), region("attention backward"):
            if torch.is_grad_enabled():
                grads = _differentiable_gradients(ctx.formula, ctx.sizes, q, k, v, bias, mask, grad)
            else:
                grads = _gradients(ctx.formula, ctx.sizes, q, k, v, bias, mask, grad)
        return (*grads, None, None, None)


def _gradients(
    formula: Formula,
    sizes: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of q, k, v and bias, as in FlashAttention (arXiv:2205.14135, appendix B.2)."""
    compute = formula.compute
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=compute) for x in (q, k, v))
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=compute)
    for tiles in portions(sizes, q.device):
        q_factor, k_factor = formula.factors(tiles)
        q_tiles, k_tiles = formula.scaled(tiles, q, k)
        grad_out = tiles.queries(grad).to(compute)
        weights, backward = formula.weights(tiles, q_tiles, k_tiles, bias, mask)
        keep = formula.keep(tiles)
        tiles.add_keys(grad_v, times(weights, keep).transpose(-1, -2) @ grad_out)
        grad_weights = times(grad_out @ tiles.keys(v).to(compute).transpose(-1, -2), keep)
        # FlashAttention sums over the output instead. Its rounding would show where most of the
        # weight is on one key.
        grad_scores = grad_weights.mul_(weights)
        grad_scores.addcmul_(weights, grad_scores.sum(-1, keepdim=True), value=-1)
        grad_scores = backward(grad_scores, grad_bias)
        tiles.add_queries(grad_q, grad_scores @ k_tiles * q_factor)
        tiles.add_keys(grad_k, times(grad_scores.transpose(-1, -2) @ q_tiles, k_factor))
    grads = [grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)]
    return [*grads, None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)]


def _differentiable_gradients(
    formula: Formula,
    sizes: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    grad: Tensor,
) -> list[Tensor | None]:
    """The same gradients with a graph of their own, for gradients of gradients."""
    # Fresh views cut the graph between q, k and v, so that aliased inputs do not receive each
    # other's gradients.
    q, k, v = (x.view_as(x) for x in (q, k, v))
    bias = None if bias is None else bias.view_as(bias)
    wanted = [x for x in (q, k, v, bias) if x is not None and x.requires_grad]
    output = formula.output(every_tile(sizes), q, k, v, bias, mask)
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in (q, k, v, bias)]


def portions(sizes: Sizes, device: torch.device) -> Iterator[Tiles]:
    """Tiles in portions that suit the device."""
    return some_at_a_time(sizes, _SCORES_ON_CPU if device.type == "cpu" else _SCORES_ELSEWHERE)


def _empty(q: Tensor, d_v: int) -> Tensor:
    return q.new_empty((*q.shape[:-1], d_v))
