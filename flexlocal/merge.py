"""``merge_attention``: attentions over disjoint sets of keys as one."""

import torch
from torch import Tensor

from .masks.arguments import kind_of


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of two attentions that share none.

    Args:
        out_a, out_b: ``(*lead, n, d_v)`` of one floating-point dtype.
        lse_a, lse_b: ``(*lead, n)``, the log-sum-exps of their scores: natural logarithms, -inf
            for a query that has seen no key. ``local_attention`` gives both with ``return_lse``.

    Returns:
        The output and the log-sum-exps of all scores, in the shapes and dtypes of the first
        attention's. Zeros and -inf for a query that has seen no key of either. Differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices differ, or an argument is no tensor.

    Source: FlashDecoding and cascade attention merge so; the formula is that of the online softmax
    (Milakov and Gimelshein, arXiv:1805.02867).
    """
    _check(out_a, lse_a, out_b, lse_b)
    compute = torch.promote_types(lse_a.dtype, torch.float32)
    a, b = lse_a.to(compute), lse_b.to(compute)
    top = torch.maximum(a, b).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)
    share_a, share_b = (a - top).exp(), (b - top).exp()
    total = share_a + share_b
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = out_a.to(compute) * (share_a / total)[..., None]
    out = out + out_b.to(compute) * (share_b / total)[..., None]
    lse = (top + total.log()).masked_fill(empty, -torch.inf)
    return out.to(out_a.dtype), lse.to(lse_a.dtype)


def _check(out_a: object, lse_a: object, out_b: object, lse_b: object) -> None:
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {kind_of(x)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {x.dtype}")
    first, *_ = tensors = [x for x in given.values() if isinstance(x, Tensor)]
    if first.dim() < 2:
        raise ValueError(f"out_a must have the shape (*lead, n, d_v), got {tuple(first.shape)}")
    wanted = (first.shape, first.shape[:-1], first.shape, first.shape[:-1])
    for name, x, shape in zip(given, tensors, wanted, strict=True):
        if x.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.device != first.device:
            raise ValueError(f"{name} must be on out_a's device {first.device}, got {x.device}")
