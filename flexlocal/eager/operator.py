"""The eager path as one operator of torch, which compilers keep whole.

A compiler that looked inside would compute all tiles at once, by loops that it writes itself, and
take two to three times as long on a processor.
Shapes are those of ``spec``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..masks.rule import Rule
from ..spec import Inputs, Spec
from ..torch_limits.tracing import is_exporting, is_transformed
from . import fused, fused_autograd
from .autograd import empty_output, gradients, output_by_torch, outputs
from .call import ARGUMENTS, Call, call_of
from .cutting import bias_within
from .formula import operands_of


def serves(spec: Spec, rule: Rule, inputs: Inputs) -> bool:
    """Whether the operator does the call: on the CPU, and not in an exported graph.

    Exported graphs run where there is no flexlocal, and become ONNX. Plain numbers say what a
    ``Window`` is; of another rule the operator knows the bounds, but not the positions, which a
    bias, ``shared_qk`` and xpos go by.
    """
    if inputs.q.device.type != "cpu" or is_exporting() or is_transformed():
        return False
    by_bounds = inputs.bias is None and not spec.shared_qk and spec.xpos_base is None
    return rule.is_window or by_bounds and not rule.has_holes and isinstance(rule.lead, int)


def attend(
    spec: Spec, rule: Rule, inputs: Inputs, draws: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """The output ``(b, h, n, d_v)`` and log-sum-exps ``(b, h, n)``; arguments as ``in_tiles``."""
    out, lse = attend_in_tiles(*call_of(spec, rule, inputs, draws))
    return out, lse if spec.return_lse else None


@torch.library.custom_op(
    "flexlocal::attend_in_tiles", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor)"
)
def attend_in_tiles(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The output ``(b, h, n, d_v)`` and log-sum-exps ``(b, h, n)``.

    Log-sum-exps are ``(0,)`` where neither the caller nor the backward pass asks for them.
    Arguments are those of ``Call``.
    """
    call = Call(*arguments)
    with without_autocast(call.q.device):
        lse = _log_sum_exps(call.q, call.shape_of_lse)
        parts = call.parts()
        if parts is None:
            out, found = _attend(call)
            return out, found if found.shape == lse.shape else lse
        out = empty_output(call.q, call.v)
        for entries, tokens, part in parts:
            out[entries, :, tokens], found = _attend(part)
            if lse.numel() and found.numel():
                lse[entries, :, tokens] = found
    return out, lse


def _attend(call: Call) -> tuple[Tensor, Tensor]:
    """``attend_in_tiles`` of all tokens at once; log-sum-exps are ``(0,)`` where it has none."""
    spec, inputs = call.described
    if call.trains and fused.serves_backward(spec, spec.rule, inputs):
        return fused_autograd.result(spec, spec.rule, inputs)
    if fused.serves(spec, spec.rule, inputs):
        out = output_by_torch(spec, spec.rule, operands_of(inputs))
        return out, _log_sum_exps(call.q, (0,))
    out, lse = outputs(*call.in_tiles())
    return out, _log_sum_exps(call.q, (0,)) if lse is None else lse


def _log_sum_exps(q: Tensor, shape: Sequence[int]) -> Tensor:
    """Such as nothing asks for, or as are yet to be filled in."""
    return q.new_full(shape, torch.nan, dtype=torch.promote_types(q.dtype, torch.float32))


@attend_in_tiles.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Call(*arguments)
    compute = torch.promote_types(call.q.dtype, torch.float32)
    return empty_output(call.q, call.v), call.q.new_empty(call.shape_of_lse, dtype=compute)


@torch.library.custom_op(
    "flexlocal::gradients_in_tiles",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? grad_lse, Tensor? out, Tensor? lse, {ARGUMENTS}) -> Tensor[]",
)
def gradients_in_tiles(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, *arguments: Any
) -> list[Tensor]:
    """The gradients of ``Call.learned``, from those of the output and the log-sum-exps.

    Args:
        out, lse: what ``attend_in_tiles`` returned, if ``Call.keeps_result``.
    """
    call = Call(*arguments)
    with without_autocast(grad.device):
        parts = call.parts()
        if parts is None:
            return _gradients(call, grad, grad_lse, out, lse)
        totals = [None if x is None else torch.zeros_like(x) for x in call.learned]
        for entries, tokens, part in parts:
            of_lse, *result = [
                None if x is None else x[entries, :, tokens] for x in (grad_lse, out, lse)
            ]
            found = iter(_gradients(part, grad[entries, :, tokens], of_lse, *result))
            for x, total in zip(part.learned, totals, strict=True):
                if x is not None and total is not None:
                    by_token = x.dim() == 4  # all but the sinks'
                    (total[entries, :, tokens] if by_token else total).add_(next(found))
    return [x for x in totals if x is not None]


def _gradients(
    call: Call, grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None
) -> list[Tensor]:
    """``gradients_in_tiles`` of all tokens at once."""
    spec, inputs = call.described
    if out is not None and lse is not None and fused.serves_backward(spec, spec.rule, inputs):
        return list(fused_autograd.gradients(spec, spec.rule, inputs, (out, lse), grad))
    operands, formula, sizes = call.in_tiles()
    *others, grad_bias, grad_sinks = gradients(operands, formula, sizes, grad, grad_lse)
    if call.bias is not None and grad_bias is not None:
        whole = torch.zeros_like(call.bias)
        bias_within(whole, sizes, call.rule).copy_(grad_bias)
        grad_bias = whole
    return [x for x in (*others, grad_bias, grad_sinks) if x is not None]


@gradients_in_tiles.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, *arguments: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x in Call(*arguments).learned if x is not None]


_TENSORS = Call._fields.index("numbers")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    kept = output if Call(*inputs).keeps_result else (None, None)
    ctx.save_for_backward(*inputs[:_TENSORS], *kept)
    ctx.numbers = inputs[_TENSORS:]


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    call = Call(*tensors, *ctx.numbers)
    given = grad_lse if call.return_lse else None
    found = iter(gradients_in_tiles(grad, given, out, lse, *call))
    grads = [None if x is None else next(found) for x in call.learned]
    return *grads, *(None for _ in call[len(grads) :])


attend_in_tiles.register_autograd(_backward, setup_context=_keep)
