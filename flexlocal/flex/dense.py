"""Short sequences on a GPU: all pairs of tokens by ``scaled_dot_product_attention``'s kernels.

A GPU is done with their scores sooner than the host has launched a compiled kernel, outside a
compiled model; and no size is compiled for. What the window hides stands in a table, which is kept.
Shapes are those of ``spec``.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks.keys import for_each_head
from ..masks.window import Window
from ..spec import Inputs, Spec, is_placed, is_plain, wants_gradients
from ..torch_limits import (
    KERNEL_DTYPES,
    efficient_on_gpu,
    flash_on_gpu,
    has_values,
    is_tracing,
)
from .dense_inputs import Padding, Treatment, treated, turns_of
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


class _Table(NamedTuple):
    """What a window hides, and numbers that would otherwise have to be sent to the GPU.

    Attributes:
        hiding: 0 where a token sees another, else -inf: ``(LONGEST, LONGEST)``.
        low: what hides padding, ``()``.
        zero: what takes the place of padding, ``()``.
    """

    hiding: Tensor
    low: Tensor
    zero: Tensor


def attend(spec: Spec, inputs: Inputs) -> Tensor:
    """Local attention.

    Args:
        spec: the call, resolved; ``serves`` says which there are.
        inputs: its tensors, shaped.

    Returns:
        ``(b, h, n, d)`` in ``q``'s order in memory.
    """
    by_head = inputs.q.stride(1) >= inputs.q.stride(2)
    out = _attend(spec, inputs)
    return out.contiguous() if by_head else out  # kernels write heads side by side


def _attend(spec: Spec, inputs: Inputs) -> Tensor:
    window, mask, (b, h, n, _) = spec.rule.window, inputs.mask, inputs.q.shape
    trains, turns, padding, hiding = wants_gradients(inputs), None, None, None
    whole = mask is None and window.hides_nothing(n)
    if not whole:
        table = _table(window, inputs.q)
        hiding = _hiding(table, mask, n).expand(b, h, -1, -1)
        padding = None if mask is None else Padding(mask[..., None], table.zero)
    if inputs.inv_freq is not None:
        turns = turns_of(inputs.inv_freq, n, window.after, inputs.q.dtype)
    q, k, v = map(_aligned, treated(*inputs[:3], Treatment(turns, padding), trains))
    if whole and q.dtype != torch.float32:
        found: Tensor = flash_on_gpu(q, k, v, 0.0, window.causal, scale=spec.scale)[0]
        return found
    k, v = for_each_head(k, h), for_each_head(v, h)
    causal = whole and window.causal
    found = efficient_on_gpu(q, k, v, hiding, trains, 0.0, causal, scale=spec.scale)[0]
    return found


def _hiding(table: _Table, mask: Tensor | None, n: int) -> Tensor:
    """What is added to scores: ``(n, n)``, and with a key mask ``(b, h or 1, n, n)``."""
    if mask is None:
        return table.hiding[:n, :n]
    beyond = -n % _ALIGNED
    if not beyond:
        return torch.where(mask[:, :, None], table.hiding[:n, :n], table.low)
    mask = F.pad(mask, (0, beyond))
    return torch.where(mask[:, :, None], table.hiding[:n, : n + beyond], table.low)[..., :n]


def _aligned(x: Tensor) -> Tensor:
    *rows, last = x.stride()
    fits = last == 1 and not (x.storage_offset() | rows[0] | rows[1] | rows[2]) % _ALIGNED
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _table(window: Window, q: Tensor) -> _Table:
    """In ``q``'s dtype, on its device."""
    make = partial(_made, window, q.dtype, q.device)
    return kept((window, q.dtype), q.device, make) if has_values(q) else make()


def _made(window: Window, dtype: torch.dtype, device: torch.device) -> _Table:
    token = torch.arange(LONGEST, device=device)
    hiding = torch.full((LONGEST, LONGEST), -torch.inf, dtype=dtype, device=device)
    hiding.masked_fill_(window.sees(0, 0, token[:, None], token), 0.0)
    low = max(torch.finfo(dtype).min, _LOW)
    return _Table(hiding, hiding.new_full((), low), hiding.new_zeros(()))
