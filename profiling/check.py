"""What is right: local attention by brute force, and how far a result is from it.

The truth compares positions as the rule is written and shares no code with ``flexlocal.masks``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlocal import Window

from .problems import Problem

MOST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Norm of the difference over the norm of the truth; fp32 allows for TF32."""

NAMES = ("the output", "the gradient of q", "the gradient of k", "the gradient of v")


def visible(window: Window, query: Tensor, n: int) -> Tensor:
    """Which of ``n`` keys the queries at ``query`` see: ``(queries, n)``."""
    size, i, j = window.size, query[:, None], torch.arange(n, device=query.device)[None, :]
    own = i // size
    seen = (own - window.look_backward <= j // size) & (j // size <= own + window.look_forward)
    if window.causal:
        seen &= j <= i
    if window.exact:
        seen &= j >= i - window.look_backward * size
    if window.exact and not window.causal:
        seen &= j <= i + window.look_forward * size
    return seen


def truth(problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """``results`` in fp64 of q, k, v and the output's gradient."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(problem.n, device=q.device)
        if problem.rotary:
            # The documented layer turns queries as if they stood in the last window they look at.
            q = _turned(q, position + problem.window.look_forward * problem.window.size)
            k = _turned(k, position)
        seen = visible(problem.window, position, problem.n)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    q, k, v, grad = (x.detach().double() for x in tensors)
    return results(attend, [*(x.requires_grad_() for x in (q, k, v)), grad])


def _turned(x: Tensor, position: Tensor) -> Tensor:
    d = x.shape[-1]
    angle = position[:, None] * 10000 ** (-torch.arange(0, d, 2, device=x.device).to(x) / d)
    # A pair of channels is one complex number.
    pair = torch.complex(x[..., : d // 2], x[..., d // 2 :])
    turned = pair * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def results(
    attend: Callable[..., Tensor], tensors: Sequence[Tensor], train: bool = True
) -> list[Tensor]:
    """The output of ``attend`` and, with ``train``, gradients; the last of ``tensors`` is its."""
    *leaves, grad = tensors
    if not train:
        with torch.no_grad():
            return [attend(*leaves)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(
    found: Sequence[Tensor], true: Sequence[Tensor], names: Sequence[str] = NAMES
) -> dict[str, float]:
    """How far each result is from the truth; ``true`` may be longer, and lie elsewhere."""
    return {
        name: _distance(one, other.to(one.device))
        for name, one, other in zip(names, found, true, strict=False)
    }


def complaint(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong, None when all is within the bound of the dtype."""
    most = MOST_ERROR[dtype]
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= most]
    return f"off: {', '.join(wrong)}; {most:.0e} is allowed" if wrong else None


def apart(
    attend: Callable[..., Tensor],
    other: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    train: bool = True,
    names: Sequence[str] = NAMES,
) -> str | None:
    """How two ways to attend differ, None where they agree within the bound of the dtype."""
    found, expected = results(attend, tensors, train), results(other, tensors, train)
    return complaint(errors(found, expected, names), tensors[0].dtype)


def shortened(problem: Problem) -> Problem:
    """The problem on a few windows and heads, as ragged at its end, for the truth to take."""
    # Kernels work in blocks of 128: a length that they divide evenly stays one.
    blocks = -(-(problem.window.most_seen + problem.window.size) // 128)
    return replace(problem, n=min(problem.n, 128 * blocks + problem.n % 128), batch=1, heads=2)


def _distance(found: Tensor, true: Tensor) -> float:
    if found.shape != true.shape:
        return float("inf")
    wide = torch.promote_types(true.dtype, torch.float32)
    found, true = found.to(wide), true.to(wide)
    distance = (found - true).norm()
    return (distance / true.norm()).item() if distance != 0 else 0.0
