"""Keys laid out segment by segment, each segment with the keys around it.

xpos scales a key by its distance from an origin; far from the origin the factor overflows. So
the sequence is cut into segments of some windows, each with an origin of its own, and every
segment gets its own copy of the keys that its queries look at: the segment's own keys with a
halo of ``look_backward`` windows before and ``look_forward`` windows after. The rule stays one
interval per query, counted in slots of that layout.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip import at_least, at_most
from .window import Index, Window


@dataclass(frozen=True)
class Segments:
    """``window`` over keys laid out in segments of ``windows`` windows.

    Args:
        window: the rule to lay out.
        windows: windows in a segment, at least 1.
        length: tokens in the sequence.
    """

    window: Window
    windows: int
    length: int

    @property
    def queries(self) -> int:
        """Queries in a segment."""
        return self.windows * self.window.size

    @property
    def slots(self) -> int:
        """Key slots in a segment: its own keys and the halo."""
        return self.queries + self._halo

    @property
    def count(self) -> int:
        """Segments in the sequence."""
        return -(-self.length // self.queries)

    def lay_out(self, keys: Tensor) -> Tensor:
        """Copies ``(..., length, d)`` to ``(..., count, slots, d)``, zero where there is no key."""
        # Joined from slices, whose gradients are slices too; unfold's would be scattered sums.
        rest = self.count * self.queries - self.length
        own = F.pad(keys, (0, 0, 0, rest)).unflatten(-2, (self.count, self.queries))
        before = self.window.look_backward * self.window.size
        after = self.window.ahead * self.window.size
        parts = [own]
        for step in range(1, -(-before // self.queries) + 1):
            tail = own[..., max(0, step * self.queries - before) :, :]
            parts.insert(0, F.pad(tail, (0, 0, 0, 0, step, 0)).narrow(-3, 0, self.count))
        for step in range(1, -(-after // self.queries) + 1):
            head = own[..., : after - (step - 1) * self.queries, :]
            parts.append(F.pad(head, (0, 0, 0, 0, 0, step)).narrow(-3, step, self.count))
        return torch.cat(parts, dim=-2)

    def in_slots(self, keys: Tensor) -> Tensor:
        """``(..., length, d)`` as ``(..., count * slots, d)``."""
        return self.lay_out(keys).flatten(-3, -2)

    def first_key(self, query: Index) -> Index:
        """First slot that ``query`` sees."""
        return at_least(self.window.first_key(query), 0) + self._shift(query // self.queries)

    def last_key(self, query: Index) -> Index:
        """Last slot that ``query`` sees."""
        last = at_most(self.window.last_key(query), self.length - 1)
        return last + self._shift(query // self.queries)

    def first_query(self, key: Index) -> Index:
        """First query that sees the slot; the segment's end for a slot past the last key."""
        segment = key // self.slots
        position = key - self._shift(segment)
        start, end = segment * self.queries, (segment + 1) * self.queries
        first = at_most(at_least(self.window.first_query(position), start), end)
        return first + _where_above(position, self.length - 1, end - first)

    def last_query(self, key: Index) -> Index:
        """Last query that sees the slot; before the segment for a slot before the first key."""
        segment = key // self.slots
        position = key - self._shift(segment)
        start, end = segment * self.queries, (segment + 1) * self.queries
        last = at_least(at_most(self.window.last_query(position), end - 1), start - 1)
        return last - _where_above(-position, 0, last - (start - 1))

    def key_position(self, query: Index, slot: Index) -> Index:
        """Position of the key that ``query`` finds in ``slot``."""
        return slot - self._shift(query // self.queries)

    def most_keys(self, queries: int) -> int:
        """Upper bound of the slots between the first and last key that a block sees."""
        crossed = -(-(queries - 1) // self.queries)
        return self.window.most_keys(queries) + crossed * self._halo

    def most_queries(self, keys: int) -> int:
        """Upper bound of the queries between the first and last one that see a block."""
        return self.window.most_queries(keys)

    @property
    def size(self) -> int:
        """Tokens in a window."""
        return self.window.size

    @property
    def label(self) -> str:
        """The parameters as an identifier."""
        return f"{self.window.label}_segments_of_{self.windows}"

    @property
    def _halo(self) -> int:
        return (self.window.look_backward + self.window.ahead) * self.window.size

    def _shift(self, segment: Index) -> Index:
        return segment * self._halo + self.window.look_backward * self.window.size


def _where_above(value: Index, limit: int, then: Index) -> Index:
    """``then`` where ``value > limit``, else 0."""
    return then * (value > limit)
