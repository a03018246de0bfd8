"""A user's tensors in the shapes that the paths take, which ``spec`` names."""

import math
from typing import Any

import torch
from torch import Tensor

from .masks.keys import for_each_head, mask_of_rows
from .spec import Inputs, is_placed
from .torch_limits.sizes import plain_int


def shaped(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """``inputs`` in the shapes that the paths take; q, k and v cast to ``dtype``, unless None."""
    q, k, v, mask = inputs[:4]
    placed = is_placed(inputs)
    if dtype is None and mask is None and q.dim() == 4 and not placed:
        return inputs
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q.dim() != 4:
        batch = _batch_of(inputs) if q.dim() < 4 else None
        q, k, v = (_four_dimensional(x, batch) for x in (q, k, v))
    b, h = q.shape[:2]
    if mask is not None:
        mask = mask_of_rows(mask, b, h)
        if mask.shape[1] > 1:
            k, v = for_each_head(k, h), for_each_head(v, h)
    if not placed:
        return Inputs(q, k, v, mask, *inputs[4:])
    documents, q_offset, kv_offset = inputs.documents, inputs.q_offset, inputs.kv_offset
    if documents is not None:
        documents = _by_row(documents if documents.dim() == 2 else documents[None], b, h)
    same = q_offset is kv_offset
    q_offset = _offset_by_row(q_offset, b, h)
    kv_offset = q_offset if same else _offset_by_row(kv_offset, b, h)
    begin = _offset_by_row(inputs.begin, b, h)
    of_rows = documents, q_offset, kv_offset, begin
    if any(isinstance(x, Tensor) and x.shape[1] > 1 for x in of_rows):
        k, v = for_each_head(k, h), for_each_head(v, h)
    return inputs._replace(
        q=q, k=k, v=v, mask=mask, documents=documents, q_offset=q_offset, kv_offset=kv_offset,
        begin=begin,
    )  # fmt: skip


def _batch_of(inputs: Inputs) -> int | None:
    """Batch entries among the rows, by the first of a call's tensors that tells some apart."""
    if inputs.mask is not None:
        return inputs.mask.shape[0]
    documents, *offsets = inputs.documents, inputs.q_offset, inputs.kv_offset, inputs.begin
    if documents is not None and documents.dim() == 2 and documents.shape[0] > 1:
        return documents.shape[0]
    several = [x.shape[0] for x in offsets if isinstance(x, Tensor) and x.shape[0] > 1]
    return several[0] if several else None


def _by_row(x: Tensor, b: int, h: int) -> Tensor:
    """``(batch, n)`` as ``(b or 1, h or 1, n)``; 1 where all rows are alike."""
    return x[:, None] if x.shape[0] == 1 else mask_of_rows(x, b, h)


def _offset_by_row(offset: Any, b: int, h: int) -> Any:
    """``(batch,)`` as int32 ``(b or 1, h or 1, 1)``; a number and None stay what they are."""
    if not isinstance(offset, Tensor):
        return offset
    return _by_row(offset[:, None], b, h).to(torch.int32)


def _four_dimensional(x: Tensor, batch: int | None) -> Tensor:
    """``(*lead, n, d)`` as ``(b, h, n, d)``, the rows in the same order.

    A view, except that five dimensions that are transposed are copied. A kernel is compiled for one
    ``h`` and serves any ``b``.

    Args:
        batch: batch entries among the rows, where some tensor tells them apart.
    """
    if x.dim() > 4:
        return x.flatten(0, -4)
    rows = math.prod(x.shape[:-2])
    # Rows that share a mask become heads of one batch entry, so that the mask needs no heads.
    batch = max(1, rows if batch is None else batch)
    heads = plain_int(rows // batch)
    # `expand` states the number of heads: Dynamo would else know a quotient of symbolic sizes.
    return x.reshape(batch, heads, *x.shape[-2:]).expand(-1, heads, -1, -1)
