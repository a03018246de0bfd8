"""One new token in each row on a processor, which attends to a slice of the ring.

The host may look at lengths there without waiting. Where what the tokens see lies in the same slots
of all rows, one after the other, no mask is needed, which takes longer to make than to attend.
Shapes are those of ``decoding``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import LocalCache
from .spec import Inputs, Spec, is_plain
from .torch_limits.tensors import has_values
from .torch_limits.tracing import is_transformed


class Slice(NamedTuple):
    """What all rows see.

    Attributes:
        lengths: of the rows, each once.
        start, stop: the first slot, and the one after the last.
    """

    lengths: set[int]
    start: int
    stop: int


def serves(spec: Spec, inputs: Inputs) -> bool:
    """Whether torch's operator does calls of this kind, outside a compiler."""
    q = inputs.q
    if q.device.type != "cpu" or q.shape[2] != 1 or spec.backend == "flex":
        return False
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return is_plain(spec, inputs.bias, inputs.sinks)


def slice_of(q: Tensor, cache: LocalCache) -> Slice | None:
    """The slice that queries see; None where there is none, or no number can be looked at."""
    if not has_values(q):
        return None
    lengths = set(cache.lengths.tolist())
    slots, *others = {cache.slots_seen(length) for length in lengths}
    return None if slots is None or others else Slice(lengths, *slots)


def attend(spec: Spec, inputs: Inputs, cache: LocalCache, seen: Slice) -> Tensor:
    """The output ``(b, h, 1, d_v)`` of tokens that the cache stores.

    Args:
        inputs: queries and keys are rotated.
    """
    q, k, v = inputs[:3]
    b, h, _, d = q.shape
    length, *others = seen.lengths
    if others:
        cache.append(k, v, 1)
    else:
        cache.append_one(k, v, length)
    keys, values = cache.keys, cache.values
    if (seen.start, seen.stop) != (0, cache.slots):
        keys, values = (x[:, :, seen.start : seen.stop] for x in (keys, values))
    kv_heads = k.shape[1]
    if h > kv_heads:
        # The heads of a group as queries of one head: torch would copy the keys for each of them.
        grouped = q.reshape(b, kv_heads, -1, d)
        return _attended(spec, grouped, keys, values).reshape(b, h, 1, -1)
    if q.dtype == torch.bfloat16:
        # torch multiplies a single row in bf16 number by number: two take 0.4 of its time (Zen 3).
        return _attended(spec, q.repeat(1, 1, 2, 1), keys, values)[:, :, :1]
    return _attended(spec, q, keys, values)


def _attended(spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=spec.scale)
