"""FlashAttention 4's kernels, called directly, for windows that slide with their queries.

Such a window is two numbers to them: how many keys before and after itself a query sees. Nothing is
compiled but the kernels, by themselves. Inside a compiler the two passes are operators, which it
keeps whole. arXiv:2307.08691; https://github.com/Dao-AILab/flash-attention, ``flash_attn/cute``.

Shapes are those of ``spec``; theirs are ``(b, n, h, d)``. A row of documents is ``(n, h, d)`` to
them, beside the documents' cumulative lengths. Of their functions torch takes the same two for
FlexAttention's backend FLASH.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..positions import rule_of
from ..spec import Inputs, Result, Spec, numbered, wants_gradients
from ..torch_limits.gradients import refuse_to_be_differentiated
from .turned import Turn, turned


def attend(spec: Spec, inputs: Inputs, turn: Turn | None = None) -> Result:
    """Local attention over a sliding window.

    Args:
        spec: the call, resolved; ``flash.preferred`` says which there are.
        inputs: its tensors, shaped.
        turn: rotates the call's queries and keys, if they are to be rotated outside a compiler.

    Returns:
        ``(b, h, n, d)`` in ``q``'s order in memory, and with ``return_lse`` the log-sum-exps
        ``(b, h, n)``.
    """
    q, k, v, sinks, window = inputs.q, inputs.k, inputs.v, inputs.sinks, spec.rule.window
    sums = inputs.cu_seqlens
    if inputs.inv_freq is not None and turn is None:
        inputs = numbered(inputs)
        q, k = turned(rule_of(spec, inputs), None, inputs, None)
    if sums is not None:
        sums = sums.to(torch.int32).contiguous()
    assert spec.scale is not None
    numbers = spec.scale, spec.softcap or 0.0, window.before, window.after
    if torch.compiler.is_compiling():
        out, lse = _forward_operator(q, k, v, sinks, sums, *numbers)
    elif wants_gradients(inputs):
        out, lse = _Flash.apply(q, k, v, sinks, sums, turn, *numbers)  # type: ignore[no-untyped-call]
    else:
        q, k = (q, k) if turn is None else turn(q, k)
        out, lse = _forward(q, k, v, sinks, sums, *numbers)
    return (out, lse) if spec.return_lse else out


ASKED = {
    "_flash_attn_fwd": (
        "softmax_scale", "softcap", "window_size_left", "window_size_right", "learnable_sink",
        "cu_seqlens_q", "cu_seqlens_k", "return_lse", "out", "lse",
    ),
    "_flash_attn_bwd": (
        "softmax_scale", "softcap", "window_size_left", "window_size_right", "learnable_sink",
        "cu_seqlens_q", "cu_seqlens_k", "deterministic", "dq", "dk", "dv", "dlse",
    ),
}  # fmt: skip
"""Functions of ``flash_attn.cute.interface``, and arguments that are given by name here."""


def lacking(interface: Any) -> str | None:
    """What ``flash_attn.cute.interface`` does not have of ``ASKED``."""
    for name, asked in ASKED.items():
        function = getattr(interface, name, None)
        if function is None:
            return name
        known = inspect.signature(function).parameters
        for argument in asked:
            if argument not in known:
                return f"{name}({argument}=)"
    return None


def _by_token(x: Tensor, documents: bool) -> Tensor:
    """``(b, h, n, d)`` as ``(b, n, h, d)``, a single row of documents as ``(n, h, d)``; a view."""
    return x[0].transpose(0, 1) if documents else x.transpose(1, 2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    sums: Tensor | None,
    scale: float,
    softcap: float,
    before: int,
    after: int,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exps."""
    from flash_attn.cute.interface import _flash_attn_fwd

    packed = sums is not None
    out, lse = _empty_like(q), None
    if packed:
        lse = q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    with torch.cuda.device_of(q):
        if _sees_any(sums):
            _, found, *_ = _flash_attn_fwd(
                *(_by_token(x, packed) for x in (q, k, v)),
                cu_seqlens_q=sums,
                cu_seqlens_k=sums,
                softmax_scale=scale,
                softcap=softcap,
                **_sides(before, after, k),
                learnable_sink=sinks,
                return_lse=True,
                out=_by_token(out, packed),
                lse=None if lse is None else lse[0],
            )
        if sums is not None:
            _clear_past_last(sums, out)
    return out, found if lse is None else lse


def _backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    sums: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    before: int,
    after: int,
) -> list[Tensor]:
    """Gradients of q, k, v and, where there are any, of sinks."""
    from flash_attn.cute.interface import _flash_attn_bwd

    packed = sums is not None
    # By themselves they would take the order in memory of copies, where they have to make any.
    grads = [_empty_like(x) for x in (q, k, v)]
    dq, dk, dv = (_by_token(x, packed) for x in grads)
    if packed:
        lse, grad_lse = lse[0], None if grad_lse is None else grad_lse[0]
    with torch.cuda.device_of(q):
        if _sees_any(sums):
            *_, last = _flash_attn_bwd(
                *(_by_token(x, packed) for x in (q, k, v, out, grad)),
                lse,
                cu_seqlens_q=sums,
                cu_seqlens_k=sums,
                softmax_scale=scale,
                softcap=softcap,
                **_sides(before, after, k),
                deterministic=torch.are_deterministic_algorithms_enabled(),
                dq=dq,
                dk=dk,
                dv=dv,
                dlse=grad_lse,
                learnable_sink=sinks,
            )
        elif sinks is not None:
            last = torch.zeros_like(sinks)
        if sums is not None:
            _clear_past_last(sums, *grads)
    return grads if sinks is None else [*grads, last]


def _sees_any(sums: Tensor | None) -> bool:
    """Whether there are documents, if these are told of: kernels cannot be launched for none."""
    return sums is None or sums.shape[0] > 1


def _sides(before: int, after: int, k: Tensor) -> dict[str, int | None]:
    """How far a query sees, with None for as far as there are keys: kernels mask no block there."""
    sides = {"window_size_left": before, "window_size_right": after}
    return {name: None if side >= k.shape[2] else side for name, side in sides.items()}


def _empty_like(x: Tensor) -> Tensor:
    """What kernels write: in ``x``'s order in memory, but each token in one piece."""
    like = torch.empty_like(x)
    return like if like.stride(3) == 1 else like.new_empty(x.shape)


def _clear_past_last(sums: Tensor, *tensors: Tensor) -> None:
    from .flash_tail import clear  # here, because a processor needs no Triton

    clear(sums, *tensors)


def _gradients(
    ctx: Any,
    run: Callable[..., Sequence[Tensor]],
    grad: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """What autograd wants of either way: a gradient, or None, for each argument."""
    *tensors, out, lse = ctx.saved_tensors  # the arguments, and the results
    if grad is None:
        grad = torch.zeros_like(out)
    found = run(grad, grad_lse, *tensors, out, lse, *ctx.numbers)
    return *found, *[None] * (len(tensors) + len(ctx.numbers) - len(found))


class _Flash(torch.autograd.Function):
    """Both passes outside a compiler, where an operator's dispatch would only cost time.

    They rotate as well: another function of autograd's for that took the host 60 to 100 us a step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        sums: Tensor | None,
        turn: Turn | None,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor]:
        if turn is not None:
            q, k = turn(q, k)
        out, lse = _forward(q, k, v, sinks, sums, *numbers)
        ctx.save_for_backward(q, k, v, sinks, sums, out, lse)
        ctx.turn, ctx.numbers = turn, numbers
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        refuse_to_be_differentiated("FlashAttention 4's")
        return *_gradients(ctx, partial(_backward_and_turn, ctx.turn), grad, grad_lse), None


def _backward_and_turn(turn: Turn | None, *arguments: Any) -> Sequence[Tensor]:
    """``_backward``, whose gradients of rotated queries and keys are rotated back."""
    dq, dk, *others = _backward(*arguments)
    if turn is not None:
        dq, dk = turn(dq, dk, back=True)
    return dq, dk, *others


_forward_operator: Any = torch.library.custom_op(
    "flexlocal::flash_forward", _forward, mutates_args=()
)
_backward_operator: Any = torch.library.custom_op(
    "flexlocal::flash_backward", _backward, mutates_args=()
)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _fake_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    *others: object,
) -> list[Tensor]:  # fmt: skip
    grads = [_empty_like(x) for x in (q, k, v)]
    return grads if sinks is None else [*grads, torch.empty_like(sinks)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.numbers = *inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward_of_operator(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _backward_operator, grad, grad_lse)


_forward_operator.register_fake(_fake_forward)
_backward_operator.register_fake(_fake_backward)
_forward_operator.register_autograd(_backward_of_operator, setup_context=_keep)
