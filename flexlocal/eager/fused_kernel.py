"""torch's fused kernel for processors, and its backward pass.

``scaled_dot_product_attention`` calls the same. Shapes are those of ``formula``, with ``s`` keys.
"""

import torch
from torch import Tensor

from ..torch_limits.attention import flash_backward_on_cpu, flash_on_cpu, multiplies_float16

QKV = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, or their gradients."""


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What the kernel is given for tensors of ``dtype``.

    Where the processor does not multiply fp16, the kernel does so number by number: 2 to 3 times
    as long as with fp32 copies, which are also rounded less (torch 2.13, AMD EPYC).
    """
    return torch.float32 if dtype == torch.float16 and not multiplies_float16() else dtype


def hiding_of(seen: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """What hides keys from groups of heads, to be added to their scores: 0 or -inf.

    Args:
        seen: which keys each query sees, ``(1, h or 1, t, s)``.
        dtype: what the kernel is given.

    Returns:
        ``(1, h_kv or 1, groups * t, s)``.
    """
    hiding = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    hiding.masked_fill_(~seen, -torch.inf)
    if hiding.shape[1] > 1:
        return hiding.reshape(1, hiding.shape[1] // groups, -1, seen.shape[-1])
    return hiding.repeat(1, 1, groups, 1) if groups > 1 else hiding


def attention(
    q: Tensor, k: Tensor, v: Tensor, hiding: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The output ``(b, h, t, d)``, in the dtype it is computed in, and log-sum-exps ``(b, h, t)``.

    Args:
        hiding: see ``hiding_of``. With None nothing is hidden but later keys, where it is
            ``causal``.
    """
    if q.numel() == 0:  # by which the kernel would divide
        return torch.empty_like(q), q.new_empty(q.shape[:-1])
    q, k, v = (x.to(computed_in(x.dtype)) for x in (q, k, v))
    # The heads of a group as queries of one head: torch would copy the keys for each of them.
    grouped = q if hiding is None else _folded(q, k)
    out, lse = flash_on_cpu(grouped, k, v, 0.0, causal, attn_mask=hiding, scale=scale)
    # Detached: to a view that an autograd.Function returns nobody may write.
    return out.reshape(q.shape).detach(), lse.reshape(q.shape[:-1])


def gradients(
    grad: Tensor,
    qkv: QKV,
    result: tuple[Tensor, Tensor],
    hiding: Tensor | None,
    causal: bool,
    scale: float | None,
) -> QKV:
    """Those of queries, keys and values.

    Args:
        grad: the output's.
        result: what ``attention`` returned; other arguments are as there.
    """
    q, k, v = qkv
    if q.numel() == 0:
        return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    out, lse = result
    groups = q.shape[1] // k.shape[1]
    if hiding is None and groups > 1:  # which the backward pass does not know
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    grad, q, out = (_folded(x, k) for x in (grad, q, out))
    lse = _folded(lse[..., None], k)[..., 0]
    grad_q, *others = flash_backward_on_cpu(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=hiding, scale=scale
    )
    grad_k, grad_v = others
    if hiding is None and groups > 1:
        grad_k, grad_v = (x.unflatten(1, (-1, groups)).sum(2) for x in others)
    return grad_q.reshape(qkv[0].shape), grad_k, grad_v


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """``x``, of queries, with those of a group of heads as queries of one head."""
    if x.shape[1] == k.shape[1]:
        return x
    return x.reshape(len(x), k.shape[1], -1, x.shape[3])
