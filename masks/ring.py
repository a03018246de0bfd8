"""A causal window over keys in a ring: a bounded memory in which new keys take the oldest's place.

A slot says nothing of its key's age, so that each key's position is written down beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..torch_limits.sizes import Index
from .rule import Entry, Reach, Rule
from .window import Window

NEVER_FILLED = -(2**30)
"""Position of a slot that holds no key: before all windows."""


@dataclass(frozen=True, eq=False)
class Ring(Rule):
    """``held`` over the slots of a ring.

    Args:
        held: the window, which is causal.
        slots: keys that the ring has room for, at least as many as a query sees.
        first: position of the first query, int32 ``(batch,)``.
        positions: of the key in each slot, int32 ``(batch, slots)``; ``NEVER_FILLED`` for none.
    """

    held: Window
    slots: int
    first: Tensor
    positions: Tensor

    def keys(self, batch: Entry, head: Entry, query: Index) -> tuple[Index, Index]:
        """All slots, among which ``sees`` chooses."""
        return query * 0, query * 0 + (self.slots - 1)

    def queries(self, batch: Entry, head: Entry, key: Index) -> tuple[Index, Index]:
        """All queries, of which there are no more than slots."""
        return key * 0, key * 0 + (self.slots - 1)

    def sees(self, batch: Entry, head: Entry, query: Tensor, key: Tensor) -> Tensor:
        """Whether the key in a slot is in the query's window."""
        position = self.query_position(batch, head, query)
        held = self.key_position(batch, head, key)
        return (held >= self.held.first_key(position)) & (held <= position)

    @property
    def has_holes(self) -> bool:
        """Yes: the window's keys lie on both sides of the slot at which the ring closes."""
        return True

    @property
    def reach(self) -> Reach:
        """A query may see any slot."""
        label = f"{self.held.label}_ring_{self.slots}"
        return Reach(self.slots, self.slots, self.slots, label)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The positions of queries and keys."""
        return self.first, self.positions

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Ring":
        """The same ring with other positions."""
        return Ring(self.held, self.slots, *tensors)

    @property
    def window(self) -> Window:
        """The window whose keys these are."""
        return self.held

    @property
    def by_head(self) -> bool:
        """No."""
        return False

    @property
    def words(self) -> str:
        """The window's."""
        return f"{self.held.words}; keys lie in a ring of {self.slots}"

    def query_position(self, batch: Entry, head: Entry, query: Index) -> Index:
        """Position of ``query``."""
        first: Any = self.first[batch]
        position: Index = query + first
        return position

    def key_position(self, batch: Entry, head: Entry, key: Index) -> Index:
        """Position of the key in the slot ``key``."""
        positions: Any = self.positions
        position: Index = positions[batch, key]
        return position
