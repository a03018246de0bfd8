"""Which sparse blocks and kernel options a call takes, from a table of measurements.

``tuned.json`` holds, by GPU architecture and head size, the fastest of the candidates that
``profiling/tune.py`` swept over windows of several reaches. A call takes the entry whose reach
is nearest in ratio; where the table knows nothing of the GPU or the dtype, FlexAttention's own
options stand.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .masks import Window

STOCK_BLOCK = 128
"""FlexAttention's own sparse block, and the length whose multiples its kernels need not check."""


def decodes(n: int) -> bool:
    """Whether so few queries go to FlexAttention's decoding kernel on a GPU.

    It has options of its own, and walks through block lists in another way.
    """
    return n < 128


@dataclass(frozen=True)
class Tuning:
    """How a kernel works through a mask.

    Attributes:
        block: queries, and keys, in a sparse block.
        options: ``kernel_options`` of ``flex_attention``, as sorted pairs.
        one_list: treat full blocks as partial ones where this leaves the list of a block's
            neighbours without gaps. To mask a full block costs less than to look the next one up,
            unless there are many.
    """

    block: int
    options: tuple[tuple[str, Any], ...]
    one_list: bool = False


STOCK = Tuning(STOCK_BLOCK, ())

FLASH = Tuning(STOCK_BLOCK, (("BACKEND", "FLASH"),))
"""FlexAttention's backend of FlashAttention 4, which wants blocks of this size."""


@dataclass(frozen=True)
class Entry:
    """A line of the table: what was fastest for ``reach`` keys on ``capability``.

    Attributes:
        flash: FlashAttention 4's kernel is faster still, where it can be had.
    """

    capability: tuple[int, int]
    head_size: int
    reach: int
    tuning: Tuning
    flash: bool


def _table() -> tuple[Entry, ...]:
    lines = json.loads((Path(__file__).parent / "tuned.json").read_text())["entries"]
    return tuple(
        Entry(
            tuple(line["capability"]),
            line["head_size"],
            line["reach"],
            Tuning(line["block"], tuple(sorted(line["options"].items())), line["one_list"]),
            line["flash"],
        )
        for line in lines
    )


TABLE = _table()


def nearest(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, window: Window
) -> Entry | None:
    """The table's entry for 16-bit tensors, None where it has none.

    Args:
        capability: of the GPU, ``(9, 0)`` for an H100.
        dtype: of query, key and value.
        head_size: the larger of the key's and the value's.
        window: the rule; its reach is ``window.most_seen``.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    fits = [e for e in TABLE if e.capability == capability and e.head_size >= head_size]
    if not fits:
        return None
    head = min([e.head_size for e in fits])
    fits = [e for e in fits if e.head_size == head]
    ratios = [_ratio(e.reach, window.most_seen) for e in fits]
    return fits[ratios.index(min(ratios))]


def _ratio(one: int, other: int) -> float:
    return max(one / other, other / one)
