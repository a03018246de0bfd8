"""Calls of which torch's fused kernel computes both passes.

The backward pass takes the output and the log-sum-exps from the forward pass, and computes the
weights again from them. Shapes are those of ``formula``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..masks.rule import Rule
from ..regions import region
from ..spec import Inputs, Spec
from ..torch_limits.gradients import for_each_gradient
from ..torch_limits.tracing import is_transformed
from . import fused_alike
from .autograd import differentiable_gradients, output_by_torch, scores_in_a_portion
from .cutting import in_tiles
from .formula import operands_of
from .fused_kernel import QKV


def attend(spec: Spec, rule: Rule, inputs: Inputs) -> Tensor:
    """The output ``(b, h, n, d)`` with gradients, where ``fused.serves_backward``."""
    out: Tensor = _Fused.apply(spec, rule, *inputs[:4])  # type: ignore[no-untyped-call]
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Spec, rule: Rule, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        ctx.spec, ctx.rule = spec, rule
        out, lse = result(spec, rule, Inputs(q, k, v, mask))
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, out, lse = ctx.saved_tensors
        spec, rule, inputs = ctx.spec, ctx.rule, Inputs(*given)
        of: Callable[..., Sequence[Tensor | None]]
        with without_autocast(grad.device), region("attention backward"):
            if torch.is_grad_enabled() or is_transformed():
                tiles = in_tiles(spec, rule, inputs, None)
                of = partial(differentiable_gradients, *tiles, grad_lse=None)
            else:
                of = partial(gradients, spec, rule, inputs, (out, lse))
            found = for_each_gradient(lambda grad: of(grad=grad), grad)
        return None, None, *found[:3], None


def result(spec: Spec, rule: Rule, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exps ``(b, h, n)``."""
    lse = inputs.q.new_empty(inputs.q.shape[:-1])
    return output_by_torch(spec, rule, operands_of(inputs), lse), lse


def gradients(
    spec: Spec, rule: Rule, inputs: Inputs, result: tuple[Tensor, Tensor], grad: Tensor
) -> QKV:
    """Those of queries, keys and values, from what ``result`` gave and the output's gradient."""
    q, k, v, mask, *_ = inputs
    scores = scores_in_a_portion(grad.device)
    return fused_alike.gradients(spec, rule, (q, k, v), mask, result, grad, scores)
