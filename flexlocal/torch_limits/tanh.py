"""The GPU's own instruction for tanh.

Triton's takes some thirty instructions, more than all else that is done to a score.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .tracing import seen_as_constant


@torch.library.custom_op("flexlocal::fast_tanh", mutates_args=())
def fast_tanh(x: Tensor) -> Tensor:
    """``tanh`` of fp32 by the GPU's own instruction, whose relative error is 2**-11.

    For kernels alone, after ``lower_fast_tanh``; it has no gradient.
    """
    return x.tanh()


@torch.library.custom_op("flexlocal::fast_capped", mutates_args=())
def fast_capped(x: Tensor, bound: float) -> Tensor:
    """``bound * fast_tanh(x)``, with a gradient."""
    return x.tanh() * bound


@fast_tanh.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@fast_capped.register_fake
def _(x: Tensor, bound: float) -> Tensor:
    return torch.empty_like(x)


def _keep_both(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x, ctx.bound = inputs
    ctx.save_for_backward(x, output)


def _gradient_of_capped(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    x, output = ctx.saved_tensors
    return grad * (ctx.bound - output * fast_tanh(x)), None


fast_capped.register_autograd(_gradient_of_capped, setup_context=_keep_both)


@seen_as_constant
def lower_fast_tanh() -> None:
    """Tells Inductor what the GPU's instruction is."""
    _lower_fast_tanh()


@lru_cache
def _lower_fast_tanh() -> None:
    from torch._inductor.lowering import make_pointwise, register_lowering
    from torch._inductor.virtualized import ops

    def tanh(x: Any) -> Any:
        asm = "tanh.approx.f32 $0, $1;"
        return ops.inline_asm_elementwise(x, asm=asm, constraints="=f,f", dtype=torch.float32)

    def capped(x: Any, bound: float) -> Any:
        return make_pointwise(lambda x: ops.mul(tanh(x), ops.constant(bound, torch.float32)))(x)

    operators = torch.ops.flexlocal
    register_lowering(operators.fast_tanh, type_promotion_kind=None)(make_pointwise(tanh))
    register_lowering(operators.fast_capped, type_promotion_kind=None)(capped)
