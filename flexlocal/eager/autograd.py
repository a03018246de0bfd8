"""The eager path's tiles computed a portion at a time, forward and backward.

The scores of a portion stay in the processor's cache. Memory stays linear in the sequence, since
the backward pass computes the weights again. Shapes are those of ``tiles``.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..masks.rule import Rule
from ..mods.sinks import gradient_of_sinks
from ..regions import region
from ..spec import Spec
from ..torch_limits.gradients import for_each_gradient
from ..torch_limits.tracing import is_transformed
from . import fused
from .formula import Formula, Operands, times
from .tiles import Sizes, Tiles, every_tile, some_at_a_time

_SCORES_ON_CPU, _SCORES_ELSEWHERE = 2**20, 2**26
"""Scores in a portion: few enough for the cache, many enough to outweigh an operator's overhead."""

_Gradients = list[Tensor | None]
"""Of an ``Operands``' tensors up to the mask."""


def attend_in_portions(
    operands: Operands, formula: Formula, sizes: Sizes
) -> tuple[Tensor, Tensor | None]:
    """All tiles' output ``(b, h, n, d_v)`` and log-sum-exps ``(b, h, n)``, with gradients."""
    out, lse = _Tiled.apply(formula, sizes, *operands)  # type: ignore[no-untyped-call]
    return out, lse


class _Tiled(torch.autograd.Function):
    """``Formula`` for a portion of tiles at a time, forward and backward."""

    # Without `setup_context`, which has torch look the signature up in each call: 60 us.
    @staticmethod
    def forward(
        ctx: Any, formula: Formula, sizes: Sizes, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.formula, ctx.sizes = formula, sizes
        ctx.save_for_backward(*tensors)
        return outputs(Operands(*tensors), formula, sizes)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = Operands(*ctx.saved_tensors)
        plain = torch.is_grad_enabled() or is_transformed()
        found = differentiable_gradients if plain else gradients
        with without_autocast(grad.device), region("attention backward"):
            of = partial(found, operands, ctx.formula, ctx.sizes)
            grads = for_each_gradient(of, grad, grad_lse)
        return (None, None, *grads, None)


def outputs(operands: Operands, formula: Formula, sizes: Sizes) -> tuple[Tensor, Tensor | None]:
    """All tiles' output and log-sum-exps, of which autograd knows nothing."""
    q, v = operands.q, operands.v
    if fused.serves(formula.spec, formula.rule, operands):
        return output_by_torch(formula.spec, formula.rule, operands), None
    out, lse = empty_output(q, v), None
    if formula.spec.return_lse:
        lse = q.new_empty(q.shape[:-1], dtype=formula.compute)
    for tiles in map(formula.narrowed, portions(sizes, q.device)):
        part, part_lse = formula.output(tiles, operands)
        start = tiles.first * sizes.tile
        place = tiles.batch, tiles.heads, slice(start, start + part.shape[2])
        out[place] = part
        if lse is not None and part_lse is not None:
            lse[place] = part_lse
    return out, lse


def output_by_torch(
    spec: Spec, rule: Rule, operands: Operands, lse: Tensor | None = None
) -> Tensor:
    """The output of a call that torch's kernel serves, for which no formula is needed.

    Args:
        lse: as in ``fused.output``.
    """
    return fused.output(spec, rule, operands, lse, scores_in_a_portion(operands.q.device))


def gradients(
    operands: Operands, formula: Formula, sizes: Sizes, grad: Tensor, grad_lse: Tensor | None
) -> _Gradients:
    """Gradients as in FlashAttention (arXiv:2205.14135, appendix B.2)."""
    q, k, v, bias, sinks, _ = operands
    compute = formula.compute
    grad_q = torch.empty_like(q)
    summed = k, v, bias, sinks
    totals = [None if x is None else torch.zeros_like(x, dtype=compute) for x in summed]
    grad_k, grad_v, grad_bias, grad_sinks = totals
    assert grad_k is not None and grad_v is not None
    for tiles in map(formula.narrowed, portions(sizes, q.device)):
        q_factor, k_factor = formula.factors(tiles)
        q_tiles, k_tiles = formula.scaled(tiles, q, k)
        found = formula.weigh(tiles, q_tiles, k_tiles, operands)
        weights, keep = found.weights, formula.keep(tiles)
        grad_out = found.seeing(tiles.queries(grad).to(compute))
        tiles.add_keys(grad_v, times(weights, keep).transpose(-1, -2) @ grad_out)
        grad_weights = times(grad_out @ tiles.keys(v).to(compute).transpose(-1, -2), keep)
        # FlashAttention sums over the output instead. Its rounding would show where most of the
        # weight is on one key.
        grad_scores = grad_weights.mul_(weights)
        along = grad_scores.sum(-1, keepdim=True)
        if grad_lse is not None:
            along -= found.seeing(tiles.queries(grad_lse[..., None]))
        grad_scores.addcmul_(weights, along, value=-1)
        if sinks is not None and grad_sinks is not None:
            assert found.lse is not None
            weight = (formula.sinks(tiles, sinks) - found.lse).exp()
            of_rows = -(weight * along).sum((2, 3, 4))
            grad_sinks += gradient_of_sinks(sinks, tiles.rows(q.device), of_rows)
        grad_scores = found.backward(grad_scores, grad_bias)
        tiles.put_queries(grad_q, grad_scores @ k_tiles * q_factor)
        tiles.add_keys(grad_k, times(grad_scores.transpose(-1, -2) @ q_tiles, k_factor))
    of_sums = [
        None if x is None or total is None else total.to(x.dtype)
        for x, total in zip(summed, totals, strict=True)
    ]
    return [grad_q, *of_sums]


def differentiable_gradients(
    operands: Operands, formula: Formula, sizes: Sizes, grad: Tensor, grad_lse: Tensor | None
) -> _Gradients:
    """The same gradients by autograd, for gradients of gradients and for batches of gradients."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh views cut the graph between q, k and v, so that aliased inputs do not receive each
        # other's gradients.
        fresh = Operands(*(None if x is None else x.view_as(x) for x in operands))  # type: ignore[arg-type]
        out, lse = formula.output(every_tile(sizes), fresh)
    wanted = [x for x in fresh if x is not None and x.requires_grad]
    outputs, grads = ([out], [grad]) if lse is None else ([out, lse], [grad, grad_lse])
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=again))
    return [next(found) if x is not None and x.requires_grad else None for x in fresh[:-1]]


def portions(sizes: Sizes, device: torch.device) -> Iterator[Tiles]:
    """Tiles in portions that suit the device."""
    return some_at_a_time(sizes, scores_in_a_portion(device))


def scores_in_a_portion(device: torch.device) -> int:
    """About how many scores are computed at a time on ``device``."""
    return _SCORES_ON_CPU if device.type == "cpu" else _SCORES_ELSEWHERE


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Memory for the output of these queries and values, as the queries lie where it can be."""
    same = v.shape[-1] == q.shape[-1]
    return torch.empty_like(q) if same else q.new_empty((*q.shape[:-1], v.shape[-1]))
