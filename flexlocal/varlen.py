"""``local_attention_varlen``: documents one after the other, as varlen functions take them."""

from typing import Any

from torch import Tensor

from . import dispatch
from .masks import Rule
from .masks.arguments import kind_of
from .rotary import Rotary
from .spec import BackendName, call_of


def local_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Rule | int,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    shared_qk: bool = False,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    rotary: Rotary | None = None,
    q_offset: int | Tensor | None = None,
    kv_offset: int | Tensor | None = None,
    return_lse: bool = False,
    backend: BackendName = "auto",
    kernel_options: dict[str, Any] | None = None,
) -> Any:
    """``local_attention`` of documents that lie one after the other, without a batch dimension.

    On a GPU it may be faster than ``local_attention`` with ``documents``: FlashAttention 4's
    kernels know documents by their cumulative lengths alone.

    Args:
        q: ``(total, heads, d)``.
        k: ``(total, kv_heads, d)``, ``kv_heads`` a divisor of ``heads``.
        v: ``(total, kv_heads, d_v)``.
        window: the rule.
        cu_seqlens: int32 or int64 ``(documents + 1,)``, from 0 on and never decreasing: where each
            document begins, and last where the last one ends; FlashAttention's and torch's varlen
            functions take it so. On a GPU the numbers are never read on the host.
        mask: boolean ``(1, total)``, True for keys to keep.
        attn_bias, scale, softcap, sinks, shared_qk, dropout, dropout_seed, rotary, q_offset,
            kv_offset, return_lse, backend, kernel_options: as for ``local_attention``.

    Returns:
        ``(total, heads, d_v)``; with ``return_lse`` a pair of that and ``(heads, total)``, as
        FlashAttention returns it. Zeros for tokens past the last document.

    Raises:
        ValueError, TypeError: as ``local_attention``, and for other shapes.
    """
    q, k, v = in_a_row(q, k, v)
    spec, inputs = call_of(
        q, k, v, window, mask, attn_bias, scale, softcap, sinks, shared_qk, dropout, dropout_seed,
        rotary, None, q_offset, kv_offset, return_lse, backend, kernel_options,
    )  # fmt: skip
    found = dispatch.attend(spec, inputs._replace(cu_seqlens=cu_seqlens))
    # Not found[0], whose gradient would be copied into zeros.
    if isinstance(found, Tensor):
        return found.squeeze(0).transpose(0, 1)
    out, lse = found
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)


def in_a_row(*tensors: Tensor) -> list[Tensor]:
    """q, k and v, ``(total, heads, d)``, as ``(1, heads, total, d)``; views.

    Raises:
        ValueError, TypeError: one has another shape, or is no tensor.
    """
    for name, x in zip("qkv", tensors, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {kind_of(x)}")
        if x.dim() != 3:
            raise ValueError(f"{name} must have the shape (total, heads, d), got {tuple(x.shape)}")
    return [x.transpose(0, 1)[None] for x in tensors]
