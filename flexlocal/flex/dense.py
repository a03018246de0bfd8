"""Short sequences on a GPU: all pairs of tokens by ``scaled_dot_product_attention``'s kernels.

Outside a compiled model a GPU has all their scores sooner than the host can launch FlexAttention's
kernel, and no size has to be compiled for. What a window hides stands in a table, which is kept.
Shapes are those of ``spec``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..masks.keys import for_each_head
from ..spec import Inputs, Spec, is_placed, is_plain, may_hide_first, wants_gradients
from ..torch_limits.attention import efficient_on_gpu, flash_on_gpu
from ..torch_limits.kernels import KERNEL_DTYPES
from ..torch_limits.tensors import has_address
from ..torch_limits.tracing import is_tracing
from . import dense_tables
from .dense_inputs import ALIGNED, Beside, Treatment
from .dense_tables import hidden_by, rotations_of
from .tuning import TABLE, capability, overridden

MOST_SCORES = 2**23
"""The most scores of all heads, where the window hides something: ``profiling.bench --host``."""

MOST_WHOLE = 2**25
"""The most where it hides nothing, and other kernels have as much to do."""

_ALIGNED_BYTES = 16
"""The first row of a tensor begins at a multiple of so many bytes, or kernels cannot read it."""


def serves(spec: Spec, inputs: Inputs) -> bool:
    """Whether a call on a GPU is one of these: they are measured to take the host less time."""
    q, k, v, mask, bias = inputs[:5]
    if spec.backend != "auto" or spec.kernel_options is not None or overridden() is not None:
        return False
    if torch.compiler.is_compiling() or is_tracing():
        return False
    if is_placed(inputs) and not _by_documents_of_rows(inputs):
        return False
    if torch.are_deterministic_algorithms_enabled():  # these kernels add up in any order
        return False
    if not (spec.rule.is_window and is_plain(spec, None, inputs.sinks) and _fits(bias, q)):
        return False
    if not all(x is None or has_address(x) for x in (*inputs[:5], inputs.inv_freq)):
        return False
    if not may_hide_first(spec):
        return False
    n, d = q.shape[-2:]
    if q.dtype not in KERNEL_DTYPES or d != v.shape[-1] or d % ALIGNED:
        return False
    if capability(q.device) not in [entry.capability for entry in TABLE]:
        return False
    scores = q.shape[:-1].numel() * n
    adds = mask is not None or bias is not None or is_placed(inputs)
    if not adds and spec.rule.window.hides_nothing(n):
        return scores <= MOST_WHOLE
    return n <= dense_tables.LONGEST and scores <= MOST_SCORES


def _by_documents_of_rows(inputs: Inputs) -> bool:
    """Whether documents alone place tokens, the same for all heads of a batch entry.

    Not where cumulative lengths tell them apart, since these are FlashAttention 4's.
    """
    q, documents = inputs.q, inputs.documents
    places = inputs.q_offset, inputs.kv_offset, inputs.seeing, inputs.begin, inputs.cu_seqlens
    if documents is None or q.dim() != 4 or any(x is not None for x in places):
        return False
    return documents.dim() == 1 or documents.shape[0] in (1, q.shape[0])


def _fits(bias: Tensor | None, q: Tensor) -> bool:
    """Whether a bias may be added to scores in their kernels' dtype, and is not learned."""
    if bias is None:
        return True
    learned = torch.is_grad_enabled() and bias.requires_grad
    by_head = q.dim() == 4 and q.shape[1] % bias.shape[0] == 0
    return by_head and bias.dtype == q.dtype and not learned


def prepared(spec: Spec, inputs: Inputs) -> Callable[[Inputs], Tensor]:
    """Local attention for calls like this one.

    Args:
        spec: the call, resolved; ``serves`` says which there are.
        inputs: its tensors, shaped.

    Returns:
        A function of a call's shaped tensors. Its result is ``(b, h, n, d)``, in memory by head or
        by token as ``q`` is.
    """
    inputs = _padded_by_documents(inputs)
    q, k, v, mask, bias = inputs[:5]
    window, (b, h, n, _), scale = spec.rule.window, q.shape, spec.scale
    trains, turns = wants_gradients(inputs), inputs.inv_freq is not None
    adds = mask is not None or bias is not None
    whole = not adds and window.hides_nothing(n)
    treat = Treatment(window, inputs, trains) if turns or adds else None
    causal = whole and window.causal
    by_head = q.stride(1) >= q.stride(2)
    rows_fit = all(map(_rows_fit, (q, k, v)))

    def run(inputs: Inputs) -> Tensor:
        inputs = _padded_by_documents(inputs)
        q, k, v, mask, bias = inputs[:5]
        table = None if whole else hidden_by(window, q)
        scores = None
        if treat is not None:
            rotations = rotations_of(inputs.inv_freq, n, window.after, q.dtype)
            q, k, v, scores = treat(q, k, v, Beside(rotations, mask, inputs.documents, table, bias))
        if scores is None and table is not None:
            scores = table[:n, :n]
        if not rows_fit or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % _ALIGNED_BYTES:
            q, k, v = _aligned(q), _aligned(k), _aligned(v)
        if whole and q.dtype != torch.float32:
            found: Tensor = flash_on_gpu(q, k, v, 0.0, causal, scale=scale)[0]
        else:
            k, v = for_each_head(k, h), for_each_head(v, h)
            scores = None if scores is None else scores.expand(b, h, n, n)
            found = efficient_on_gpu(q, k, v, scores, trains, 0.0, causal, scale=scale)[0]
        return found.contiguous() if by_head else found  # kernels write heads side by side

    return run


def _padded_by_documents(inputs: Inputs) -> Inputs:
    """Shaped ``inputs``, documents for each batch entry, and padding among them in the mask."""
    documents, mask = inputs.documents, inputs.mask
    if documents is None:
        return inputs
    documents = documents.expand(inputs.q.shape[0], -1, -1).contiguous()
    there = documents >= 0
    return inputs._replace(documents=documents, mask=there if mask is None else mask & there)


def _rows_fit(x: Tensor) -> bool:
    *rows, last = x.stride()
    return last == 1 and not (rows[0] | rows[1] | rows[2]) % ALIGNED


def _aligned(x: Tensor) -> Tensor:
    fits = _rows_fit(x) and not x.data_ptr() % _ALIGNED_BYTES
    return x if fits else x.clone(memory_format=torch.contiguous_format)
