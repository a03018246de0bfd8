"""Short sequences on a GPU: all pairs of tokens by ``scaled_dot_product_attention``'s kernels.

Outside a compiled model a GPU has all their scores sooner than the host can launch a compiled
kernel, and no size has to be compiled for. What a window hides stands in a table, which is kept.
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
from .dense_inputs import Padding, Treatment, rotations_of, treated
from .kept import kept
from .tuning import TABLE, capability, overridden

LONGEST = 1024
"""The most tokens, where the window hides something: its table then takes 2 MB in 16 bits."""

MOST_SCORES = 2**23
"""The most scores of all heads, where the window hides something: ``profiling.bench --host``."""

MOST_WHOLE = 2**25
"""The most where it hides nothing, and other kernels have as much to do."""

_ALIGNED = 8
"""Rows of a tensor begin at multiples of so many numbers, or kernels cannot read it."""

_ALIGNED_BYTES = 16
"""And the first of them at a multiple of so many bytes."""

_LOW = -(2.0**24)
"""Added to the scores of padding; or a dtype's lowest number, if that is higher.

It is finite, so that a query that sees padding alone has a softmax. Lower ones would cost the
backward pass digits of the log-sum-exp. Keys and values of padding are zeros, and so is the output
of such a query.
"""


def serves(spec: Spec, inputs: Inputs) -> bool:
    """Whether a call on a GPU is one of these.

    Without rotary embeddings they are measured to take the host less time. With them they take it
    as much, but no length has to be compiled for.
    """
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
        ``(b, h, n, d)``, in memory by head or by token as ``q`` is.
    """
    by_head = inputs.q.stride(1) >= inputs.q.stride(2)
    out = _attend(spec, inputs)
    return out.contiguous() if by_head else out  # kernels write heads side by side


def _attend(spec: Spec, inputs: Inputs) -> Tensor:
    window, mask, (b, h, n, _) = spec.rule.window, inputs.mask, inputs.q.shape
    trains, rotations, padding, hiding = wants_gradients(inputs), None, None, None
    whole = mask is None and window.hides_nothing(n)
    if not whole:
        table = _table(window, inputs.q)
        hiding = _hiding(table, mask, n).expand(b, h, -1, -1)
        padding = None if mask is None else Padding(mask[..., None], table.zero)
    if inputs.inv_freq is not None:
        rotations = rotations_of(inputs.inv_freq, n, window.after, inputs.q.dtype)
    q, k, v = map(_aligned, treated(*inputs[:3], Treatment(rotations, padding), trains))
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
    rows_fit = last == 1 and not (rows[0] | rows[1] | rows[2]) % _ALIGNED
    begins = x.data_ptr() if has_values(x) else x.storage_offset() * x.element_size()
    fits = rows_fit and not begins % _ALIGNED_BYTES
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
