"""What a rule is: one interval of keys for each query, and what is known of it beforehand.

Everything else follows from the two bounds of the interval: the mask_mod, the block lists, the
tiles of the eager path, the pictures. A rule of your own is a subclass of ``Rule``; ``Window`` is
the one that the layer takes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..torch_limits.sizes import Index

if TYPE_CHECKING:
    from typing_extensions import Self

Entry = int | Tensor
"""A batch entry or a head, or several of them."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reach:
    """What is known of a rule without looking at its tensors; hashable.

    Kernels are compiled, and block lists sized, for a reach: numbers that are too small lose keys.

    Attributes:
        keys: most keys that a query sees.
        back: how far before a query its first key may lie.
        ahead: how far after a query its last key may lie.
        label: the rule's parameters as an identifier. Two rules of one class with equal reaches
            may differ in their tensors and in nothing else.
        align: what the bounds are multiples of. A query's first key lies a multiple of ``align``
            from token 0 or from the query. The key after its last lies a multiple of ``align`` from
            token 0 or from the query after this one. 1 promises nothing.
        step: above 0, queries come in steps of that many, the first from token 0, with three
            promises. A query sees its own key. The queries of a step see the same keys, where the
            rule is causal only up to themselves. The next step sees the same keys ``step`` further
            on. 1 is a window that slides with the query. 0 promises nothing.
    """

    keys: int
    back: int
    ahead: int
    label: str
    align: int = 1
    step: int = 0

    def longest(self, tokens: int) -> int:
        """Most tokens from the first to the last that a block sees, or that see a block.

        Args:
            tokens: tokens in the block, which begins at a multiple of that number.
        """
        before, after = self.around(tokens)
        return before + tokens + after

    def in_steps(self, tokens: int) -> int:
        """The fewest tokens in whole steps that are so many at least; these where none is known."""
        step = max(1, self.step)
        return -(-tokens // step) * step

    def around(self, tokens: int) -> tuple[int, int]:
        """How many keys before and after a block its queries may see; ``tokens`` as above."""
        grain = math.gcd(tokens, self.align)
        return self.back // grain * grain, self.ahead // grain * grain

    def longest_of_keys(self, keys: int) -> int:
        """As ``longest``, for the queries that see a block of keys."""
        return self.longest(keys)

    def sees_few(self, queries: int, keys: int) -> bool:
        """Whether so many consecutive queries see less than half of ``keys``, wherever they are."""
        return 2 * (queries + self.back + self.ahead) <= keys

    def ends_with(self, block: int) -> bool:
        """Whether all bounds lie at edges of blocks, save where causality ends an interval."""
        return self.step > 0 and self.step % block == 0


class Rule(ABC):
    """Which keys each query sees: one interval. Clipped to the keys, its ends never decrease.

    That holds for queries that see nothing as well, whose last key lies before the first. Queries
    and keys are counted from 0, and bounds need not be clipped to the sequence. Batch entry and
    head are ints or integer tensors that broadcast with the query, as in FlexAttention; bounds
    may have any shape that broadcasts with them.

    A subclass gives ``keys``, ``queries`` and ``reach``, and ``sees`` as well where its interval
    ``has_holes``. Numbers that vary from call to call, or
    from batch entry to batch entry, belong into ``tensors``: kernels look them up and are not
    compiled for them. A rule without tensors is the same for every batch entry.
    """

    @abstractmethod
    def keys(self, batch: Entry, head: Entry, query: Index) -> tuple[Index, Index]:
        """First and last key that ``query`` sees."""

    @abstractmethod
    def queries(self, batch: Entry, head: Entry, key: Index) -> tuple[Index, Index]:
        """First and last query that sees ``key``."""

    @property
    @abstractmethod
    def reach(self) -> Reach:
        """What is known of the rule beforehand."""

    def sees(self, batch: Entry, head: Entry, query: Tensor, key: Tensor) -> Tensor:
        """Whether ``query`` sees ``key``: boolean, of the shape that all of them broadcast to."""
        first, last = self.keys(batch, head, query)
        return (first <= key) & (key <= last)

    @property
    def has_holes(self) -> bool:
        """Whether a query may not see all keys of its interval; ``sees`` then says which.

        Pictures draw intervals, and refuse such a rule.
        """
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the bounds look up, on the device of the queries."""
        return ()

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Self":
        """The same rule over other tensors, in the order of ``tensors``."""
        if tensors:
            raise NotImplementedError(f"{type(self).__name__} has tensors, but no with_tensors")
        return self

    @property
    def window(self) -> Any:
        """The ``Window`` that a bias, xpos and rotary's shift are relative to; None without one."""
        return None

    @property
    def lead(self) -> int | Tensor:
        """Index of the key at the position of a query, less the index of the query."""
        return 0

    def for_scores(self) -> "Rule":
        """The rule with those tensors alone that ``keys`` and positions look up for a query."""
        return self

    @property
    def by_head(self) -> bool:
        """Whether the bounds may differ by head; else the eager path asks once for all heads."""
        return True

    @property
    def is_window(self) -> bool:
        """Whether the rule is a ``Window`` and no more."""
        return self.window is self

    @property
    def words(self) -> str:
        """What a query sees, in words."""
        return self.reach.label

    # Positions, which a bias, ``shared_qk`` and rotary go by; by default a token's own index.

    def query_position(self, batch: Entry, head: Entry, query: Index) -> Index:
        """Position of ``query``."""
        return query

    def key_position(self, batch: Entry, head: Entry, key: Index) -> Index:
        """Position of the key at the index ``key``."""
        return key

    def seen_position(self, batch: Entry, head: Entry, query: Index, key: Index) -> Index:
        """``key_position`` of a key that ``query`` sees, any number for other keys.

        Kernels ask for it score by score. What follows from the query alone they compute once for
        all its keys.
        """
        return self.key_position(batch, head, key)

    # Tensors are not compared, so that calls that differ in these alone share a kernel.

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.reach == self.reach

    def __hash__(self) -> int:
        return hash((type(self), self.reach))


def mask_mod(rule: Rule) -> MaskMod:
    """FlexAttention's mask_mod of ``rule``: ``(batch, head, query, key) -> bool``.

    Its ``__name__`` holds the rule's parameters.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule.sees(batch, head, query, key)

    visible.__name__ = rule.reach.label
    return visible
