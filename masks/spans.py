"""The windowed layout: a row for each query, a column for each key of its windows."""

import torch
from torch import Tensor

from .window import Window

MOST_DENSE = 2**24
"""Token pairs that a dense mask or map holds at most: a square of 4096 tokens."""


def from_spans(values: Tensor, window: Window) -> Tensor:
    """``(..., n, window.span)`` as ``(..., n, n)``, 0 outside the windows.

    Column ``c`` of query ``i`` becomes column ``window.span_start(i) + c``.
    """
    n = values.shape[-2]
    query = torch.arange(n, device=values.device)[:, None]
    key = window.span_start(query) + torch.arange(window.span, device=values.device)
    inside = (key >= 0) & (key < n)
    dense = values.new_zeros(*values.shape[:-1], n)
    dense[..., query.expand_as(key)[inside], key[inside]] = values[..., inside]
    return dense
