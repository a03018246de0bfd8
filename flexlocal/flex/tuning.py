"""Which sparse blocks and kernel options a call takes, from a table of measurements.

``tuned.json`` holds, by GPU architecture and head size, the fastest of the candidates that
``profiling/tune.py`` swept over windows of several reaches. A call takes the entry whose reach
is nearest in ratio; where the table knows nothing of the GPU or the dtype, FlexAttention's own
options stand.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..masks.rule import Rule
from ..spec import Inputs, Spec
from ..torch_limits.tracing import seen_as_constant

STOCK_BLOCK = 128
"""FlexAttention's own block size. Kernels check no bounds in sequences of whole such blocks."""


@dataclass(frozen=True)
class Tuning:
    """How a kernel works through a mask.

    Attributes:
        block: queries, and keys, in a sparse block.
        options: ``kernel_options`` of ``flex_attention``, as sorted pairs.
        one_list: list full blocks among the partial ones, where that leaves the list without gaps.
            To mask a full block costs less than to look up the next one, unless there are many.
    """

    block: int
    options: tuple[tuple[str, Any], ...]
    one_list: bool = False

    def decodes(self, n: int) -> bool:
        """Whether a GPU may take FlexAttention's decoding kernel for ``n`` queries.

        Only where a caller's options say so. That kernel is made for few queries and many keys. All
        queries are one tile, which takes minutes to compile for wide heads in fp32. It has options
        of its own, and walks through block lists in another way.
        """
        return dict(self.options).get("BACKEND") in ("AUTO", "TRITON_DECODE") and n < 128


STOCK = Tuning(STOCK_BLOCK, ())

DECODING = Tuning(STOCK_BLOCK, (("BACKEND", "AUTO"),))
"""For few queries over a cache: torch takes its decoding kernel, which shares the keys out."""

TUNED_DECODING = Tuning(
    STOCK_BLOCK,
    (("BACKEND", "AUTO"), ("BLOCK_N", 64), ("num_stages", 3), ("num_warps", 4)),
)
"""Where the table knows the GPU: 124 us instead of 235 for a query of 32 heads over 8 key heads of
128, 4096 keys and 32 rows (H200, torch 2.11)."""

FLASH = Tuning(STOCK_BLOCK, (("BACKEND", "FLASH"),))
"""FlexAttention's backend of FlashAttention 4, which wants blocks of this size."""


@dataclass(frozen=True)
class Entry:
    """A line of the table: what was fastest for ``reach`` keys on ``capability``.

    Attributes:
        flash: for which calls FlashAttention 4's kernels are faster still, where they can be had:
            the "forward" pass alone and "training", over sliding windows, and "standing" windows.
    """

    capability: tuple[int, int]
    head_size: int
    reach: int
    tuning: Tuning
    flash: frozenset[str]


def _table() -> tuple[Entry, ...]:
    lines = json.loads((Path(__file__).parent / "tuned.json").read_text())["entries"]
    return tuple(
        Entry(
            tuple(line["capability"]),
            line["head_size"],
            line["reach"],
            Tuning(line["block"], tuple(sorted(line["options"].items())), line["one_list"]),
            frozenset(line["flash"]),
        )
        for line in lines
    )


TABLE = _table()


def nearest(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, rule: Rule
) -> Entry | None:
    """The table's entry for 16-bit tensors, None where it has none.

    Args:
        capability: of the GPU, ``(9, 0)`` for an H100.
        dtype: of query, key and value.
        head_size: the larger of the key's and the value's.
        rule: the call's; the entry with the ``reach`` nearest to its ``reach.keys`` is taken.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    fits = [e for e in TABLE if e.capability == capability and e.head_size >= head_size]
    if not fits:
        return None
    head = min([e.head_size for e in fits])
    fits = [e for e in fits if e.head_size == head]
    ratios = [_ratio(e.reach, rule.reach.keys) for e in fits]
    return fits[ratios.index(min(ratios))]


def _ratio(one: int, other: int) -> float:
    return max(one / other, other / one)


def tuning_of(spec: Spec, inputs: Inputs, flash: bool) -> Tuning:
    """The caller's options, else those of the table, else FlexAttention's own.

    Args:
        flash: take FlashAttention 4's kernel.
    """
    q, v = inputs.q, inputs.v
    if _override is not None:
        return _override
    if spec.kernel_options is not None:
        return Tuning(STOCK_BLOCK, spec.kernel_options)
    if flash:
        return FLASH
    if q.device.type != "cuda":
        return STOCK
    entry = nearest(capability(q.device), q.dtype, max(q.shape[-1], v.shape[-1]), spec.rule)
    if spec.rule.has_holes:
        return DECODING if entry is None else TUNED_DECODING
    if entry is None:
        return STOCK
    return entry.tuning if spec.softcap is None else capped_tuning(entry)


def capped_tuning(entry: Entry) -> Tuning:
    """``entry.tuning`` for capped scores, whose derivatives take registers of their own.

    Narrow heads leave the backward pass time to wait for these: smaller tiles are faster (slide256
    on an H200, torch 2.11: 1040 us instead of 1127). Wide heads do not.
    """
    if entry.head_size > 64:
        return entry.tuning
    options = {**dict(entry.tuning.options), "bwd_BLOCK_M1": 16, "bwd_BLOCK_N2": 16}
    return replace(entry.tuning, options=tuple(sorted(options.items())))


_MANY_QUERIES = 2**16
"""Queries of all heads from which on a GPU takes longer than the host. Below, a further graph for
sequences of whole blocks would only take time to compile."""


def without_bounds(tuning: Tuning, spec: Spec, inputs: Inputs) -> Tuning:
    """``tuning`` for kernels that check no bounds, where a call's sequences are whole blocks.

    torch (2.11 to 2.15) sees to that in a graph of one length, and not in a graph of any length:
    slide256 took 1.47 times as long forward and 1.34 times backward (H200, torch 2.11).

    Args:
        inputs: shaped.
    """
    (b, h, n, _), m = inputs.q.shape, inputs.k.shape[2]
    # xpos lays keys out, and those far from all queries are left away: kernels get another number.
    nearby = inputs.q_offset is None or not spec.rule.reach.sees_few(n, m)
    as_given = spec.xpos_base is None and nearby
    whole = as_given and n % STOCK_BLOCK == 0 and m % STOCK_BLOCK == 0
    if inputs.q.device.type != "cuda" or not whole or b * h * n < _MANY_QUERIES:
        return tuning
    options = {"IS_DIVISIBLE": True, **dict(tuning.options)}
    return replace(tuning, options=tuple(sorted(options.items())))


_override: Tuning | None = None


@contextmanager
def overriding(tuning: Tuning) -> Iterator[None]:
    """Calls inside take these blocks and options instead of the table's, in all threads."""
    global _override
    before, _override = _override, tuning
    try:
        yield
    finally:
        _override = before


def overridden() -> Tuning | None:
    """What ``overriding`` has calls take; a part of the key of prepared calls."""
    return _override


@seen_as_constant
def capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU, ``(9, 0)`` for an H100."""
    return torch.cuda.get_device_capability(device)
