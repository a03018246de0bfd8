"""A mask made visible: which keys every query sees, as text, PNG, HTML and numbers.

Everything follows from the rule's bounds, never from queries and keys, and takes time linear in
the sequence at most: a long mask is described at once, and pictured in cells of many tokens.
"""

from dataclasses import dataclass
from os import PathLike
from typing import IO

import torch
from torch import Tensor

from .arguments import check_block_size, check_count, kind_of
from .block_map import BlockMap
from .description import Description, described
from .html import page, token_html
from .intervals import Intervals, sides_of, step_of
from .png import token_png
from .query import query_words
from .rule import Rule, sees
from .symbols import HIDDEN, OWN, SEEN, SHADES, STRUCK, TOKENS, Kind, shade
from .text import token_text
from .window import Window, as_window

MOST_DENSE = 2**24
"""Token pairs that ``dense`` makes at most: a square mask of 4096 tokens."""


def inspect(
    rule: Rule | int,
    n: int,
    *,
    n_keys: int | None = None,
    key_mask: Tensor | None = None,
    block_size: int | tuple[int, int] = 128,
    head_size: int = 64,
) -> "MaskPicture":
    """A picture of which keys the queries of ``rule`` see.

    Args:
        rule: a ``Window`` or another rule; an int is the size of a window that looks one back
            and one forward.
        n: queries, at least 1.
        n_keys: key slots, ``n`` by default.
        key_mask: boolean ``(n_keys,)`` or ``(1, n_keys)``, True = keep; by key position, where
            a rule's slots are no positions.
        block_size: tokens in a block of the block map, or ``(queries, keys)`` in one.
        head_size: channels of a head, for the floating-point operations.

    Raises:
        ValueError: a number out of range, or a key mask of another shape or dtype.
        TypeError: an argument is of the wrong kind.

    >>> from flexlocal.masks import Window, inspect
    >>> print(inspect(Window(2, causal=True, exact=True), 5).query(3))
    query 3 sees 3 keys: 1 to 3, the query's own included
    """
    if isinstance(rule, int) or not hasattr(rule, "first_key"):
        rule = as_window(rule, "rule")
    check_count("n", n)
    keys = n if n_keys is None else n_keys
    check_count("n_keys", keys)
    check_count("head_size", head_size)
    sizes = check_block_size(block_size)
    return MaskPicture(rule, n, keys, _kept_slots(rule, key_mask, keys), sizes, head_size)


@dataclass(frozen=True, eq=False)
class MaskPicture:
    """A rule on ``n`` queries and ``n_keys`` key slots, and the ways to look at it.

    ``print`` it for the token picture; a notebook shows its HTML. Made by ``inspect`` and by
    ``LocalAttention.mask``.
    """

    rule: Rule
    n: int
    n_keys: int
    key_mask: Tensor | None
    block_size: tuple[int, int]
    head_size: int

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title})"

    @property
    def title(self) -> str:
        """The rule's parameters and the numbers of queries and keys."""
        hidden = "" if self.key_mask is None else ", key mask"
        return f"{self.rule.label}, {self.n} queries, {self.n_keys} keys{hidden}"

    @property
    def words(self) -> str:
        """What the rule says, in countable words."""
        return self.rule.words if isinstance(self.rule, Window) else self.rule.label

    def text(self, *, color: bool | None = None, plain: bool | None = None, cells: int = 64) -> str:
        """The token picture for a terminal.

        Args:
            color: with ANSI colours; ``None`` asks whether standard output is a terminal, and
                honours ``NO_COLOR``.
            plain: ASCII only; ``None`` asks whether standard output can write more.
            cells: rows and columns at most, at least 1; a longer mask is drawn in cells of
                several tokens, shaded by the share of their pairs that see each other.
        """
        return token_text(self, color, plain, cells)

    def png(self, file: str | PathLike[str] | IO[bytes], *, cells: int = 512) -> None:
        """Writes the token picture as a PNG; ``file`` is a path or a binary file.

        Raises:
            ModuleNotFoundError: matplotlib is missing; the message says what to install.
        """
        token_png(self, file, cells)

    def html(self, *, cells: int = 128) -> str:
        """A page of its own: the token picture, the numbers and the block map."""
        return page(self, cells)

    def _repr_html_(self) -> str:
        return token_html(self, 64)

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
        return BlockMap(self.rule, self.n, self.n_keys, self.key_mask, self.block_size)

    def describe(self) -> Description:
        """The mask in numbers; ``print`` it."""
        return described(self)

    def query(self, i: int) -> str:
        """Which keys query ``i`` sees, in words.

        Raises:
            ValueError: there is no query ``i``.
        """
        return query_words(self, i)

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
        query, key = (
            torch.arange(self.n, device="cpu")[:, None],
            torch.arange(self.n_keys, device="cpu"),
        )
        kinds = torch.where(sees(self.rule, query, key), SEEN, HIDDEN)
        own = (kinds == SEEN) & (self.rule.key_position(query, key) == query)
        kinds = kinds.masked_fill(own, OWN)
        if self.key_mask is not None:
            kinds = kinds.masked_fill((kinds >= SEEN) & ~self.key_mask, STRUCK)
        return kinds

    def grid(self, step: int) -> tuple[list[list[int]], tuple[Kind, ...]]:
        """Each cell of ``step`` tokens on a side as a place in kinds, and these."""
        if step == 1:
            return self.kinds().tolist(), TOKENS
        return [[shade(share) for share in row] for row in self.shares(step).tolist()], SHADES

    def step(self, cells: int) -> int:
        """Tokens on a side of a picture's cell: the least power of two that ``cells`` allow."""
        return step_of((self.n, self.n_keys), cells)

    def shares(self, step: int) -> Tensor:
        """Share of each cell's token pairs that see each other, fp64 ``(rows, columns)``."""
        rows, columns = (sides_of(length, step) for length in (self.n, self.n_keys))
        return self.seen.cells(step).double() / (rows[:, None] * columns)

    def _bounds(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return self.rule.first_key(query), self.rule.last_key(query)


def _kept_slots(rule: Rule, key_mask: object, n_keys: int) -> Tensor | None:
    if key_mask is None:
        return None
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a tensor or None, got {kind_of(key_mask)}")
    if key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask must be boolean (True = keep), got {key_mask.dtype}")
    one = key_mask[0] if key_mask.dim() == 2 and len(key_mask) == 1 else key_mask
    slots = rule.in_slots(one.cpu()[:, None])[:, 0] if one.dim() == 1 else one
    if slots.shape != (n_keys,):
        raise ValueError(
            f"key_mask must have the shape ({n_keys},), one entry of a batch's, "
            f"got {tuple(key_mask.shape)}"
        )
    return slots
