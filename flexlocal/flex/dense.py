"""Short sequences on a GPU: all pairs of tokens by ``scaled_dot_product_attention``'s kernels.

A GPU is done with their scores sooner than the host has launched a compiled kernel, outside a
compiled model; and no size is compiled for. What the window hides stands in a table, which is kept.
Shapes are those of ``spec``.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks.keys import finite_padding, for_each_head
from ..masks.window import Window
from ..spec import Inputs, Spec, is_placed, is_plain, mask_of_queries, wants_gradients
from ..torch_limits import (
    KERNEL_DTYPES,
    efficient_on_gpu,
    flash_on_gpu,
    has_values,
    is_tracing,
)
from .kept import kept
from .tuning import TABLE, capability, overridden

LONGEST = 1024
"""Tokens of a sequence whose window hides something, at most: a table takes 2 MB in 16 bits."""

MOST_SCORES = 2**23
"""Scores of all heads for which a window's table repays itself: ``profiling.bench --host``."""

MOST_WHOLE = 2**25
"""As ``MOST_SCORES``, where the window hides nothing: all kernels have the same to do."""

_ALIGNED = 8
"""Numbers: rows of a tensor begin at multiples, or kernels cannot read it."""

_LOW = -(2.0**24)
"""What hides padding, or the lowest number of a dtype. It is finite, so that a query that sees
padding alone has a softmax; of lower ones the backward pass knows the log-sum-exp too roughly. Keys
and values of padding are zeros: so is what such a query is given.
"""


def serves(spec: Spec, inputs: Inputs) -> bool:
    """Whether a call on a GPU is one of these: measured to be faster so."""
    q, k, v, mask = inputs[:4]
    if spec.backend != "auto" or spec.kernel_options is not None or overridden() is not None:
        return False
    if torch.compiler.is_compiling() or is_tracing() or is_placed(inputs):
        return False
    if torch.are_deterministic_algorithms_enabled():  # these kernels add up in any order
        return False
    if not (spec.rule.is_window and is_plain(spec, inputs.bias, inputs.sinks)):
        return False
    if spec.scale is not None and spec.scale <= 0:  # kernels may hide scores before they scale them
        return False
    n, d = q.shape[-2:]
    if q.dtype not in KERNEL_DTYPES or d != v.shape[-1] or d % _ALIGNED:
        return False
    if capability(q.device) not in [entry.capability for entry in TABLE]:
        return False
    scores = q.shape[:-1].numel() * n
    if mask is None and spec.rule.window.hides_nothing(n):
        return scores <= MOST_WHOLE
    return n <= LONGEST and scores <= MOST_SCORES


def attend(spec: Spec, inputs: Inputs) -> Tensor:
    """Local attention.

    Args:
        spec: the call, resolved; ``serves`` says which there are.
        inputs: its tensors, shaped, queries and keys rotated.

    Returns:
        ``(b, h, n, d)`` in ``q``'s order in memory.
    """
    by_head = inputs.q.stride(1) >= inputs.q.stride(2)
    out = _attend(spec, inputs)
    return out.contiguous() if by_head else out  # kernels write heads side by side


def _attend(spec: Spec, inputs: Inputs) -> Tensor:
    q, k, v = (_aligned(x) for x in inputs[:3])
    window, (b, h, n, _) = spec.rule.window, q.shape
    whole = inputs.mask is None and window.hides_nothing(n)
    if whole and q.dtype != torch.float32:
        found: Tensor = flash_on_gpu(q, k, v, 0.0, window.causal, scale=spec.scale)[0]
        return found
    hiding = None
    if not whole:
        q, k, v, hiding = _hidden(window, inputs._replace(q=q, k=k, v=v))
        hiding = hiding.expand(b, h, -1, -1)
    k, v = for_each_head(k, h), for_each_head(v, h)
    causal, trains = whole and window.causal, wants_gradients(inputs)
    found = efficient_on_gpu(q, k, v, hiding, trains, 0.0, causal, scale=spec.scale)[0]
    return found


def _hidden(window: Window, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, free of padding, and what is added to scores, ``(b, h, n, n)``.

    ``b`` and ``h`` of the latter may be 1.
    """
    q, k, v, mask = inputs[:4]
    n, table = q.shape[2], _table(window, q)
    if mask is None:
        return q, k, v, table[..., :n, :n]
    padded_queries = mask_of_queries(window, inputs)
    if padded_queries is not None:
        q = finite_padding(q, padded_queries)
    # Not `without_padding`, whose backward pass lets gradients of hidden values through.
    k, v = (torch.where(mask[..., None], x, 0.0) for x in (k, v))
    beyond = -n % _ALIGNED
    mask = F.pad(mask, (0, beyond)) if beyond else mask
    low = max(torch.finfo(q.dtype).min, _LOW)
    hiding = torch.where(mask[:, :, None], table[..., :n, : n + beyond], low)
    return q, k, v, hiding[..., :n]


def _aligned(x: Tensor) -> Tensor:
    places = x.storage_offset(), *x.stride()[:3]
    fits = x.stride(3) == 1 and not any(place % _ALIGNED for place in places)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _table(window: Window, q: Tensor) -> Tensor:
    """0 where a token sees another, else -inf: ``(1, 1, LONGEST, LONGEST)`` in ``q``'s dtype."""
    make = partial(_made, window, q.dtype, q.device)
    return kept((window, q.dtype), q.device, make) if has_values(q) else make()


def _made(window: Window, dtype: torch.dtype, device: torch.device) -> Tensor:
    token = torch.arange(LONGEST, device=device)
    table = torch.full((1, 1, LONGEST, LONGEST), -torch.inf, dtype=dtype, device=device)
    return table.masked_fill_(window.sees(0, 0, token[:, None], token), 0.0)
