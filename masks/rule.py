"""What every mask rule offers, and the mask_mod that follows from it.

A rule gives each query one interval of keys. Keys are counted in *slots*: places in the key
tensor that the kernel reads. For a plain window the slot is the key's position; a layout that
repeats keys (see ``segments``) has more slots than keys.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .window import Index

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Rule(Protocol):
    """Bounds of what sees what; both never decrease along the sequence. Hashable, by value."""

    def __hash__(self) -> int: ...

    def first_key(self, query: Index) -> Index:
        """First key slot that ``query`` sees."""

    def last_key(self, query: Index) -> Index:
        """Last key slot that ``query`` sees; below ``first_key`` when it sees none."""

    def first_query(self, key: Index) -> Index:
        """First query that sees the key slot."""

    def last_query(self, key: Index) -> Index:
        """Last query that sees the key slot; below ``first_query`` when none does."""

    def key_position(self, query: Index, slot: Index) -> Index:
        """Position in the sequence of the key that ``query`` finds in ``slot``."""

    @property
    def asks_length(self) -> bool:
        """Whether the bounds of queries depend on how long the sequence is."""

    def of_length(self, length: Tensor) -> "Rule":
        """The rule with its length in a 0-d tensor, where a kernel looks it up."""

    def key_slots(self, n: int) -> int:
        """Slots of ``n`` keys."""

    def in_slots(self, keys: Tensor) -> Tensor:
        """``(..., n, d)`` by position as ``(..., slots, d)``, zeros in slots without a key."""

    def most_keys(self, queries: int) -> int:
        """Upper bound of the slots between the first and last key that a block sees."""

    def most_queries(self, keys: int) -> int:
        """Upper bound of the queries between the first and last one that see a block."""

    def aligned_to(self, block: int) -> bool:
        """Whether windows begin and end with blocks, and bounds with them but for causality."""

    @property
    def size(self) -> int:
        """Tokens in a window; bounds move by multiples of it or with the query."""

    @property
    def label(self) -> str:
        """The parameters as an identifier."""


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
