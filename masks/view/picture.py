"""A mask made visible: which keys every query sees, as text, PNG, HTML and numbers.

Everything follows from the rule's bounds, never from queries and keys, and takes time linear in
the sequence at most: a long mask is described at once, and pictured in cells of many tokens.
"""

from dataclasses import dataclass, replace
from os import PathLike
from typing import IO

import torch
from torch import Tensor

from ..arguments import check_block_size, check_count, check_integers, kind_of
from ..placed import place
from ..rule import Rule
from ..spans import MOST_DENSE
from ..window import as_rule
from .block_map import BlockMap, suffix_of
from .counting import Intervals, bounds_of, sides_of, step_of
from .description import Description, described
from .drawing import Drawing
from .html import html, page
from .png import png
from .query import QueryWords, query_words
from .symbols import HIDDEN, OWN, SEEN, SHADES, STRUCK, TOKENS, Kind, shade
from .text import text


def inspect(
    rule: Rule | int,
    n: int,
    *,
    n_keys: int | None = None,
    key_mask: Tensor | None = None,
    block_size: int | tuple[int, int] = 128,
    head_size: int = 64,
    batch: int = 0,
    head: int = 0,
    documents: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_offset: int | Tensor | None = None,
) -> "MaskPicture":
    """A picture of which keys the queries of ``rule`` see.

    Args:
        rule: a ``Window`` or any other rule; an int is the size of a window that looks one back
            and one forward.
        n: queries, at least 1.
        n_keys: key slots, ``n`` by default.
        key_mask: boolean ``(n_keys,)`` or ``(1, n_keys)``, True = keep.
        block_size: tokens in a block of the block map, or ``(queries, keys)`` in one.
        head_size: channels of a head, for the floating-point operations.
        batch, head: the batch entry and the head to show, for rules that differ by them; at
            least 0.
        documents: integer ``(batch, n_keys)`` or ``(n_keys,)``, see ``local_attention``; with a
            ``Window`` only, as the offsets.
        q_offset, kv_offset: position of the first query and of the first key, ints or integer
            ``(batch,)``.

    Raises:
        ValueError: a number out of range, or a key mask of another shape or dtype.
        TypeError: an argument is of the wrong kind.

    >>> from flexlocal.masks import Window, inspect
    >>> print(inspect(Window(2, causal=True, exact=True), 5).query(3))
    query 3 sees 3 keys: 1 to 3, the query's own included
    """
    rule = as_rule(rule, "rule")
    if rule.has_holes:
        raise ValueError(
            f"rule must be one whose queries see whole intervals, got {type(rule).__name__}"
        )
    if rule.tensors:
        rule = rule.with_tensors([x.cpu() for x in rule.tensors])
    n = check_count("n", n)
    keys = n if n_keys is None else check_count("n_keys", n_keys)
    head_size = check_count("head_size", head_size)
    batch, head = check_count("batch", batch, least=0), check_count("head", head, least=0)
    if not documents is q_offset is kv_offset is None:
        rule = _placed(rule, n, keys, batch, documents, q_offset, kv_offset)
    sizes, kept = check_block_size(block_size), _checked_mask(key_mask, keys)
    return MaskPicture(rule, n, keys, kept, sizes, head_size, batch, head)


@dataclass(frozen=True, eq=False)
class MaskPicture:
    """A rule on ``n`` queries and ``n_keys`` key slots, and the ways to look at it.

    ``print`` it for the token picture; a notebook shows its HTML. Made by ``inspect`` and by
    ``LocalAttention.mask``.

    Attributes:
        rule: the mask rule.
        n, n_keys: queries, and key slots.
        key_mask: boolean ``(n_keys,)`` by slot, True = keep; ``None`` to keep every key.
        block_size: queries and keys in a block of the block map.
        head_size: channels of a head.
        batch, head: the entry that is shown, for rules that differ by entry.
    """

    rule: Rule
    n: int
    n_keys: int
    key_mask: Tensor | None
    block_size: tuple[int, int]
    head_size: int
    batch: int = 0
    head: int = 0

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title})"

    @property
    def title(self) -> str:
        """The rule's parameters and the numbers of queries and keys."""
        name = f"{self.rule.reach.label}, {self.n} queries, {self.n_keys} keys"
        return name + suffix_of(self.key_mask, self.batch, self.head)

    @property
    def words(self) -> str:
        """What the rule says, in countable words."""
        return self.rule.words

    def text(self, *, color: bool | None = None, plain: bool | None = None, cells: int = 64) -> str:
        """The token picture for a terminal.

        Args:
            color: with ANSI colours; ``None`` asks whether standard output is a terminal, and
                honours ``NO_COLOR``.
            plain: ASCII only; ``None`` asks whether standard output can write more.
            cells: rows and columns at most, at least 1; a longer mask is drawn in cells of
                several tokens, shaded by the share of their pairs that see each other.
        """
        return text(self.drawing(cells), color, plain)

    def png(self, file: str | PathLike[str] | IO[bytes], *, cells: int = 512) -> None:
        """Writes the token picture as a PNG; ``file`` is a path or a binary file.

        Raises:
            ModuleNotFoundError: matplotlib is missing; the message says what to install.
        """
        png(self.drawing(cells), file)

    def html(self, *, cells: int = 128) -> str:
        """A page of its own: the token picture, the numbers and the block map."""
        return page(self.title, self._html(cells), self.blocks._repr_html_())

    def _repr_html_(self) -> str:
        return self._html(64)

    def dense(self) -> Tensor:
        """The mask itself, boolean ``(n, n_keys)``, True where the query sees the key.

        Raises:
            ValueError: more than ``MOST_DENSE`` token pairs.
        """
        return self.kinds() >= SEEN

    @property
    def blocks(self) -> BlockMap:
        """What a kernel computes with blocks of ``block_size``, block by block: not the mask.

        Kernels with a key mask or with measured block sizes list blocks in other ways.
        """
        return BlockMap(
            self.rule, self.n, self.n_keys, self.key_mask, self.block_size, self.batch, self.head
        )

    def describe(self) -> Description:
        """The mask in numbers; ``print`` it."""
        return described(self.title, self.words, self.seen, self.blocks, self.head_size)

    def query(self, i: int) -> QueryWords:
        """Which keys query ``i`` sees, in words: a ``str``.

        Raises:
            ValueError: there is no query ``i``.
            TypeError: ``i`` is no int.
        """
        return query_words(self.rule, i, self.n, self.n_keys, self.key_mask, self.batch, self.head)

    # What the pictures are drawn from.

    @property
    def seen(self) -> Intervals:
        """The keys that each query sees."""
        return Intervals(self.n, self.n_keys, self._bounds, self.key_mask)

    def kinds(self) -> Tensor:
        """``HIDDEN``, ``STRUCK``, ``SEEN`` or ``OWN`` for every token pair, ``(n, n_keys)``.

        Raises:
            ValueError: more than ``MOST_DENSE`` token pairs.
        """
        if self.n * self.n_keys > MOST_DENSE:
            raise ValueError(
                f"n times n_keys must be at most {MOST_DENSE} for a dense mask, got "
                f"{self.n} times {self.n_keys}; png, html, text and blocks take any length"
            )
        query = torch.arange(self.n, device="cpu")
        slot = torch.arange(self.n_keys, device="cpu")
        first, last = (end[:, None] for end in self._bounds(query))
        kinds = torch.where((first <= slot) & (slot <= last), SEEN, HIDDEN)
        entry = self.batch, self.head
        own = self.rule.query_position(*entry, query)[:, None]
        own = self.rule.seen_position(*entry, query[:, None], slot) == own
        kinds = kinds.masked_fill((kinds == SEEN) & own, OWN)
        if self.key_mask is not None:
            kinds = kinds.masked_fill((kinds >= SEEN) & ~self.key_mask, STRUCK)
        return kinds

    def drawing(self, cells: int) -> Drawing:
        """What every picture of the mask shows, in ``cells`` rows and columns at most.

        Cells of one token have the kinds of ``kinds``, larger ones a shade of their share.
        """
        step = self.step(cells)
        kinds: tuple[Kind, ...] = TOKENS if step == 1 else SHADES
        if step == 1:
            grid = self.kinds().tolist()
        else:
            grid = [[shade(share) for share in row] for row in self.shares(step).tolist()]
        return Drawing(
            title=self.words,
            subtitle=self.title,
            shape=(self.n, self.n_keys),
            grid=tuple(map(tuple, grid)),
            kinds=kinds,
            step=step,
            edge=self.rule.reach.align,
            axes=("query", "key"),
        )

    def step(self, cells: int) -> int:
        """Tokens on a side of a picture's cell: the least power of two that ``cells`` allow."""
        return step_of((self.n, self.n_keys), cells)

    def shares(self, step: int) -> Tensor:
        """Share of each cell's token pairs that see each other, fp64 ``(rows, columns)``."""
        rows, columns = (sides_of(length, step) for length in (self.n, self.n_keys))
        return self.seen.cells(step).double() / (rows[:, None] * columns)

    def _bounds(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return bounds_of(self.rule, query, self.batch, self.head)

    def _html(self, cells: int) -> str:
        """The picture with a tip on each row, and the numbers."""
        drawing = self.drawing(cells)
        tips = [self._tip(row, drawing.step) for row in range(len(drawing.grid))]
        return html(replace(drawing, tips=tuple(tips)), self.describe().rows_and_advice())

    def _tip(self, row: int, step: int) -> str:
        if step == 1:
            return self.query(row)
        return f"queries {row * step} to {min((row + 1) * step, self.n) - 1}"


def _placed(
    rule: Rule,
    n: int,
    n_keys: int,
    batch: int,
    documents: Tensor | None,
    q_offset: int | Tensor | None,
    kv_offset: int | Tensor | None,
) -> Rule:
    """``rule`` over the positions of one batch entry."""
    if not rule.is_window:
        raise ValueError(
            "documents, q_offset and kv_offset must be None but with a Window, got "
            f"{type(rule).__name__}"
        )
    if documents is not None:
        check_integers("documents", documents)
        rows = documents[None] if documents.dim() == 1 else documents
        if rows.dim() != 2 or rows.shape[1] != n_keys:
            raise ValueError(
                f"documents must have the shape (batch, {n_keys}) or ({n_keys},), "
                f"got {tuple(documents.shape)}"
            )
        documents = _entry("documents", rows, batch).cpu()[None, None]
    offsets = []
    for name, offset in (("q_offset", q_offset), ("kv_offset", kv_offset)):
        if isinstance(offset, Tensor):
            check_integers(name, offset)
            if offset.dim() != 1:
                raise ValueError(f"{name} must have the shape (batch,), got {tuple(offset.shape)}")
            offset = int(_entry(name, offset, batch))
        elif offset is not None and (isinstance(offset, bool) or not isinstance(offset, int)):
            raise TypeError(f"{name} must be an int or a tensor, got {kind_of(offset)}")
        offsets.append(offset or 0)
    return place(rule.window, n, n_keys, documents, *offsets)


def _entry(name: str, x: Tensor, batch: int) -> Tensor:
    """What ``x`` says of a batch entry."""
    if len(x) == 1:
        return x[0]
    if batch >= len(x):
        raise ValueError(f"batch must be below the {len(x)} entries of {name}, got {batch}")
    return x[batch]


def _checked_mask(key_mask: object, n_keys: int) -> Tensor | None:
    if key_mask is None:
        return None
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a tensor or None, got {kind_of(key_mask)}")
    if key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask must be boolean (True = keep), got {key_mask.dtype}")
    one = key_mask[0] if key_mask.dim() == 2 and len(key_mask) == 1 else key_mask
    if one.shape != (n_keys,):
        raise ValueError(
            f"key_mask must have the shape ({n_keys},), one entry of a batch's, "
            f"got {tuple(key_mask.shape)}"
        )
    return one.cpu()
