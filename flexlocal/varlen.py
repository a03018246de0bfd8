"""``local_attention_varlen``: documents one after the other, as varlen functions take them."""

from typing import Any

from torch import Tensor

from .functional import local_attention
from .masks import Rule
from .masks.arguments import kind_of
from .masks.documents import documents_from_cu_seqlens


def local_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Rule | int,
    cu_seqlens: Tensor,
    **arguments: Any,
) -> Any:
    """``local_attention`` of documents that lie one after the other, without a batch dimension.

    Args:
        q: ``(total, heads, d)``.
        k: ``(total, kv_heads, d)``, ``kv_heads`` a divisor of ``heads``.
        v: ``(total, kv_heads, d_v)``.
        window: the rule.
        cu_seqlens: int32 ``(documents + 1,)``: where each document begins, and last where the last
            one ends; FlashAttention's and torch's varlen functions take it so.
        arguments: as for ``local_attention``, but for ``documents``; a ``mask`` is ``(1, total)``.

    Returns:
        ``(total, heads, d_v)``; with ``return_lse`` a pair of that and ``(heads, total)``, as
        FlashAttention returns it. Zeros for tokens past the last document.

    Raises:
        ValueError, TypeError: as ``local_attention``, and for other shapes.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {kind_of(x)}")
        if x.dim() != 3:
            raise ValueError(f"{name} must have the shape (total, heads, d), got {tuple(x.shape)}")
    if arguments.get("documents") is not None:
        raise ValueError("documents must be None where cu_seqlens gives them, got both")
    arguments["documents"] = documents_from_cu_seqlens(cu_seqlens, k.shape[0])
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = local_attention(q, k, v, window, **arguments)
    # Not found[0], whose gradient would be copied into zeros.
    if isinstance(found, Tensor):
        return found.squeeze(0).transpose(0, 1)
    out, lse = found
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)
