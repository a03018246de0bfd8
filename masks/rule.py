"""What every mask rule offers, and the mask_mod that follows from it.

A rule gives each query one interval of keys. Keys are counted in *slots*: places in the key
tensor that the kernel reads. For a plain window the slot is the key's position; a layout that
repeats keys (see ``segments``) has more slots than keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .window import Index, Window


@dataclass(frozen=True)
class Reach:
    """What is known of a rule without asking for single queries.

    Attributes:
        keys: most keys that a query sees.
        back, ahead: how far before and after itself a key may lie.
        label: the parameters as an identifier.
        align: tokens in a window; 1 where the rule knows none.
        step: tokens that share their bounds: a window's size where windows stand still, 1 where
            they slide, 0 for no promise.
    """

    keys: int
    back: int
    ahead: int
    label: str
    align: int = 1
    step: int = 0


MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Rule(Protocol):
    """Bounds of what sees what; both never decrease along the sequence. Hashable, by value."""

    def __hash__(self) -> int: ...

    def keys(self, batch: Index | int, head: Index | int, query: Index) -> tuple[Index, Index]:
        """First and last key slot that ``query`` sees; the last below the first for none."""
        raise NotImplementedError

    def queries(self, batch: Index | int, head: Index | int, key: Index) -> tuple[Index, Index]:
        """First and last query that sees the key slot; the last below the first for none."""
        raise NotImplementedError

    @property
    def reach(self) -> Reach:
        """How far the rule reaches, and its name."""
        raise NotImplementedError

    @property
    def words(self) -> str:
        """What the rule says, in countable words."""
        return self.reach.label

    @property
    def window(self) -> Window | None:
        """The window that the rule is made of."""
        return None

    def first_key(self, query: Index) -> Index:
        """First key slot that ``query`` sees."""
        return self.keys(0, 0, query)[0]

    def last_key(self, query: Index) -> Index:
        """Last key slot that ``query`` sees; below ``first_key`` when it sees none."""
        return self.keys(0, 0, query)[1]

    def first_query(self, key: Index) -> Index:
        """First query that sees the key slot."""
        return self.queries(0, 0, key)[0]

    def last_query(self, key: Index) -> Index:
        """Last query that sees the key slot; below ``first_query`` when none does."""
        return self.queries(0, 0, key)[1]

    def key_position(self, *place: Any) -> Tensor:
        """``(batch, query, slot)``: position of the key that ``query`` finds in ``slot``."""
        slot: Tensor = place[-1]
        return slot

    @property
    def asks_length(self) -> bool:
        """Whether the bounds of queries depend on how long the sequence is."""

    def of_length(self, length: Tensor) -> "Rule":
        """The rule with its length in a 0-d tensor, where a kernel looks it up."""

    def key_slots(self, n: int) -> int:
        """Slots of ``n`` keys."""
        return n

    def in_slots(self, keys: Tensor) -> Tensor:
        """``(..., n, d)`` by position as ``(..., slots, d)``, zeros in slots without a key."""
        return keys

    def most_keys(self, queries: int) -> int:
        """Upper bound of the slots between the first and last key that a block sees."""
        return queries + self.reach.back + self.reach.ahead

    def most_queries(self, keys: int) -> int:
        """Upper bound of the queries between the first and last one that see a block."""
        return keys + self.reach.back + self.reach.ahead

    def aligned_to(self, block: int) -> bool:
        """Whether windows begin and end with blocks, and bounds with them but for causality."""

    @property
    def size(self) -> int:
        """Tokens in a window; bounds move by multiples of it or with the query."""
        return self.reach.align

    @property
    def label(self) -> str:
        """The parameters as an identifier."""
        return self.reach.label


def sees(rule: Rule, query: Tensor, key: Tensor) -> Tensor:
    """Whether ``query`` sees the key slot: boolean, of the shape that both broadcast to."""
    return (rule.first_key(query) <= key) & (key <= rule.last_key(query))


def mask_mod(rule: Rule) -> MaskMod:
    """FlexAttention's mask_mod of ``rule``: ``(batch, head, query, key) -> bool``.

    Its ``__name__`` holds the rule's parameters.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(rule, query, key)

    visible.__name__ = rule.label
    return visible
