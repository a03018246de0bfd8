"""Key masks: padding that no query sees.

Shapes: ``b`` batch entries, ``h`` query heads, ``kv`` key heads, ``n`` tokens, ``d`` the last size.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..torch_limits.tensors import has_values
from ..torch_limits.tracing import is_transformed
from .rule import MaskMod


def mask_of_rows(key_mask: Tensor, batch: int, heads: int) -> Tensor:
    """A key mask ``(m, n)`` as ``(b, h or 1, n)``, for ``batch * heads`` rows; or other numbers.

    ``m`` divides the number of rows, and row ``r`` takes the mask ``r // (rows / m)``.
    """
    if batch * heads == 0:
        return key_mask.new_ones(batch, 1, key_mask.shape[1])
    rows_each = batch * heads // key_mask.shape[0]
    copies, masks = (rows_each, heads) if rows_each % heads else (rows_each // heads, 1)
    if copies == masks == 1:
        return key_mask.contiguous().unsqueeze(1)
    # Not repeat_interleave, which launches a copy even where it repeats nothing.
    return key_mask[:, None].expand(-1, copies, -1).contiguous().view(batch, masks, -1)


def hides_none(key_mask: Tensor) -> bool:
    """Whether a processor, which computes the call now, knows that the mask keeps every key."""
    return _is_computed_now(key_mask) and bool(key_mask.all())


def padding_mod(kept: Tensor) -> MaskMod:
    """FlexAttention's mask_mod of ``kept``, boolean ``(b, h or 1, slots)``, True = keep."""
    by_head = kept.shape[1] > 1  # a bool, because kernels cannot capture a symbolic size

    def keeps(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Looked up at the kernel's own index: arithmetic on it would cost more than the look-up.
        return kept[batch, head if by_head else 0, key]

    keeps.__name__ = "key_padding"
    return keeps


def for_each_head(keys: Tensor, heads: int) -> Tensor:
    """``(b, kv, n, d)`` as ``(b, h, n, d)``: a copy for each query head that shares a key head.

    A mask by head may hide a key from one of these query heads and show it to another.
    """
    kv_heads = keys.shape[1]
    return keys if heads == kv_heads else keys.repeat_interleave(heads // kv_heads, dim=1)


def without_padding(keys: Tensor, key_mask: Tensor) -> Tensor:
    """``keys`` ``(b, h, n, d)``, zeros where ``key_mask`` ``(b, h or 1, n)`` hides them.

    A hidden NaN or inf would spread otherwise: its weight is 0, and 0 * NaN is NaN.
    """
    return _cleared(keys, key_mask[..., None])


def does_no_harm(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether a processor may read hidden keys and values, where no gradients are taken.

    So it is if all values are finite, and all scores: none is above the product of the norms of
    queries and keys. To ask takes as long as to clear one of them, but no memory.
    """
    if not all(map(_is_computed_now, (q, k, v))):
        return False
    norms = (
        torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()
        for x in (q, k)
    )
    most = math.prod(norms, start=max(1.0, abs(scale)))
    return most < torch.finfo(torch.float32).max and _is_finite(v)


def finite_padding(queries: Tensor, key_mask: Tensor) -> Tensor:
    """``queries`` ``(b, h, n, d)`` with zeros for NaN and inf where ``key_mask`` hides their keys.

    Nobody reads the result of padding, whose gradient is 0. But a NaN in its query makes its
    weights NaN, and the gradients of all keys that it sees: 0 * NaN again.
    """
    if _is_computed_now(queries) and _is_finite(queries):
        return queries  # as nearly always: to ask takes a twentieth of the time
    return _cleared(queries, key_mask[..., None] | queries.isfinite())


def _is_finite(x: Tensor) -> bool:
    """Whether all of ``x`` is; a sum that is too large may deny it."""
    return bool(x.detach().sum().isfinite())


def _is_computed_now(x: Tensor) -> bool:
    """Whether a processor computes the call now, and nothing traces it."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed():
        return False
    return has_values(x)


def _cleared(x: Tensor, kept: Tensor) -> Tensor:
    if is_transformed():
        return torch.where(kept, x, 0.0)
    cleared: Tensor = _Cleared.apply(x, kept)  # type: ignore[no-untyped-call]
    return cleared


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Cleared(torch.autograd.Function):
    """Zeros for what is not kept. Backward changes nothing: its gradients are zero already."""

    @staticmethod
    def forward(x: Tensor, kept: Tensor) -> Tensor:
        if not _is_computed_now(x):
            return torch.where(kept, x, 0.0)
        # All bits or none. A processor takes six times as long for `where`.
        bits = _BITS[x.element_size()]
        return (x.view(bits) & -kept.to(bits)).view(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
