"""A rule of which only the first and the last key of each query are known."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..masks.rule import Entry, Reach, Rule
from ..torch_limits.sizes import Index


@dataclass(frozen=True, eq=False)
class Bounds(Rule):
    """A rule whose bounds are written out.

    Args:
        first, last: int32 ``(b or 1, h or 1, n)``.
        known: the reach of the rule whose bounds they are.
        lead: see ``Rule``.
    """

    first: Tensor
    last: Tensor
    known: Reach
    lead: int = 0

    def keys(self, batch: Entry, head: Entry, query: Index) -> tuple[Index, Index]:
        """First and last key that ``query`` sees."""
        entries, heads, _ = self.first.shape
        place: Any = batch if entries > 1 else 0, head if heads > 1 else 0, query
        first: Any = self.first[place]
        last: Any = self.last[place]
        return first, last

    def queries(self, batch: Entry, head: Entry, key: Index) -> tuple[Index, Index]:
        """Nobody asks: gradients go the way of the tiles."""
        raise NotImplementedError

    @property
    def reach(self) -> Reach:
        """That of the rule whose bounds these are."""
        return self.known

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The bounds."""
        return self.first, self.last

    @property
    def by_head(self) -> bool:
        """Whether the bounds differ by head."""
        return self.first.shape[1] > 1
