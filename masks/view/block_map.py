"""The block map: which blocks of a mask a kernel skips, masks, or computes as they are.

Not the mask. FlexAttention works on blocks of queries and keys: an empty block is skipped, a full
one computed, a partial one computed whole and masked afterwards. The map shows the block lists
that ``masks.block_mask`` makes. These name some empty blocks as partial: with a key mask, blocks
that keep some key, though their kept keys may lie outside the window; and blocks between the ends
of queries that see no key at all.
"""

from dataclasses import dataclass
from os import PathLike
from typing import IO

import torch
from torch import Tensor

from ..block_intervals import block_intervals, block_mask_bytes, kept_blocks
from ..block_lists import EMPTY, FULL, PARTIAL
from ..rule import Rule
from .counting import Intervals, sides_of, step_of
from .drawing import Drawing
from .html import html, page
from .png import png
from .symbols import BLOCKS
from .text import text


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The blocks of a rule on ``n`` queries and ``n_keys`` keys; ``print`` it for a picture.

    Attributes:
        rule: the mask rule.
        n, n_keys: queries, and key slots.
        key_mask: boolean ``(n_keys,)`` by slot, True = keep; ``None`` to keep every key.
        block_size: queries and keys in a block.
        batch, head: the entry that is shown, for rules that differ by entry.
    """

    rule: Rule
    n: int
    n_keys: int
    key_mask: Tensor | None
    block_size: tuple[int, int]
    batch: int = 0
    head: int = 0

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title})"

    @property
    def title(self) -> str:
        """The rule's parameters and the size of the blocks."""
        queries, keys = self.block_size
        name = f"{self.rule.reach.label}, blocks of {queries} queries by {keys} keys"
        return name + suffix_of(self.key_mask, self.batch, self.head)

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks of queries, and blocks of keys."""
        queries, keys = self.block_size
        return -(-self.n // queries), -(-self.n_keys // keys)

    @property
    def index_bytes(self) -> int:
        """Bytes of the block mask's index tensors on the GPU, one batch entry and head."""
        return block_mask_bytes(self.rule, self.n, self.n_keys, block_size=self.block_size)

    def count(self) -> tuple[int, int, int]:
        """How many blocks are empty, partial and full."""
        touched, full = (sum(int(part.sum()) for part in x.counts()) for x in self._intervals())
        return self.shape[0] * self.shape[1] - touched, touched - full, full

    def states(self, step: int = 1) -> Tensor:
        """``EMPTY``, ``PARTIAL`` or ``FULL``, int64 ``(rows, columns)``.

        Args:
            step: blocks on a side of a cell; a cell is empty or full when all its blocks are.
        """
        touched, full = (x.cells(step) for x in self._intervals())
        rows, columns = (sides_of(blocks, step) for blocks in self.shape)
        states = torch.where(touched > 0, PARTIAL, EMPTY)
        return states.masked_fill(full == rows[:, None] * columns, FULL)

    def step(self, cells: int) -> int:
        """Blocks on a side of a picture's cell: the least power of two that ``cells`` allow."""
        return step_of(self.shape, cells)

    def drawing(self, cells: int) -> Drawing:
        """What every picture of the map shows, in ``cells`` rows and columns at most."""
        step = self.step(cells)
        return Drawing(
            title="Block map: what a kernel computes, not the mask",
            subtitle=self.title,
            shape=self.shape,
            grid=tuple(map(tuple, self.states(step).tolist())),
            kinds=BLOCKS,
            step=step,
            edge=1,
            axes=("query block", "key block"),
        )

    def text(self, *, color: bool | None = None, plain: bool | None = None, cells: int = 32) -> str:
        """The map for a terminal; arguments as ``MaskPicture.text``."""
        return text(self.drawing(cells), color, plain)

    def png(self, file: str | PathLike[str] | IO[bytes], *, cells: int = 64) -> None:
        """Writes the map as a PNG; arguments and errors as ``MaskPicture.png``."""
        png(self.drawing(cells), file)

    def html(self, *, cells: int = 64) -> str:
        """A page of its own."""
        return page(f"block map of {self.title}", html(self.drawing(cells)))

    def _repr_html_(self) -> str:
        return html(self.drawing(64))

    def _intervals(self) -> tuple[Intervals, Intervals]:
        """The blocks that each block of queries touches, and those that are full."""
        blocks = block_intervals(
            self.rule, self.n, self.n_keys, self.block_size, batch=self.batch, head=self.head
        )
        some = every = None
        if self.key_mask is not None:
            some, every = kept_blocks(self.key_mask, self.block_size[1])
        touched = lambda rows: (blocks.first[rows], blocks.last[rows])  # noqa: E731
        full = lambda rows: (blocks.first_full[rows], blocks.last_full[rows])  # noqa: E731
        return Intervals(*self.shape, touched, some), Intervals(*self.shape, full, every)


def suffix_of(key_mask: Tensor | None, batch: int, head: int) -> str:
    """What a title adds where not the whole rule is shown as it is."""
    hidden = "" if key_mask is None else ", key mask"
    return hidden + (f", batch entry {batch}, head {head}" if batch or head else "")
