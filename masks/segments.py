"""Keys laid out segment by segment, each segment with the keys around it.

xpos scales a key by its distance from an origin; far from the origin the factor overflows. So
the sequence is cut into segments of some windows, each with an origin of its own, and every
segment gets its own copy of the keys that its queries look at: the segment's own keys with a
halo of ``look_backward`` windows before and ``look_forward`` windows after. The rule stays one
interval per query, counted in slots of that layout.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .buffer import written_out
from .clip import at_least, at_most
from .rule import Reach
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
    def queries_each(self) -> int:
        """Queries in a segment."""
        return self.windows * self.window.size

    @property
    def slots(self) -> int:
        """Key slots in a segment: its own keys and the halo."""
        return self.queries_each + self._halo

    @property
    def count(self) -> int:
        """Segments in the sequence."""
        return _ceil(self.length, self.queries_each)

    @property
    def asks_length(self) -> bool:
        """Unless windows are causal, which end before the sequence does."""
        return not self.window.causal

    def of_length(self, length: Tensor) -> "Segments":
        """For the bounds of queries alone: all else counts in ints."""
        return replace(self, length=length)  # type: ignore[arg-type]

    def key_slots(self, n: int) -> int:
        """Those of all segments, for the ``n`` tokens of the layout."""
        return self.count * self.slots

    def in_slots(self, keys: Tensor) -> Tensor:
        """``(..., length, d)`` as ``(..., count * slots, d)``, zeros where there is no key."""
        laid_out: Tensor = _InSlots.apply(keys, self)  # type: ignore[no-untyped-call]
        return laid_out

    def slot_positions(self, device: torch.device | str) -> Tensor:
        """Position that each slot stands for, ``(count * slots,)``, in the sequence or beyond."""
        slot = torch.arange(self.key_slots(self.length), device=device)
        return slot - self._shift(slot // self.slots)

    def from_slots(self, copies: Tensor) -> Tensor:
        """``(..., count * slots, d)`` summed over the slots of each key, ``(..., length, d)``."""
        before, after = self.window.before, self.window.after
        parts = copies.unflatten(-2, (self.count, self.slots))
        found = []
        # Slots that hold keys of the segment itself, of those before it and of those after it.
        for step in range(-_ceil(after, self.queries_each), _ceil(before, self.queries_each) + 1):
            start = before - step * self.queries_each
            first, end = max(start, 0), min(start + self.queries_each, self.slots)
            inside = parts[..., first:end, :]
            behind, past = max(-step, 0), max(step, 0)
            missing = (0, 0, first - start, start + self.queries_each - end, behind, past)
            found.append(self._joined(F.pad(inside, missing).narrow(-3, past, self.count)))
        return sum(found[1:], found[0])

    def _joined(self, segments: Tensor) -> Tensor:
        """``(..., count, queries, d)`` as ``(..., length, d)``."""
        joined: Tensor = segments.flatten(-3, -2)
        return joined[..., : self.length, :]

    def first_key(self, query: Index) -> Index:
        """First slot that ``query`` sees."""
        return at_least(self.window.first_key(query), 0) + self._shift(query // self.queries_each)

    def last_key(self, query: Index) -> Index:
        """Last slot that ``query`` sees."""
        last = self.window.last_key(query)
        if self.asks_length:
            last = at_most(last, self.length - 1)
        return last + self._shift(query // self.queries_each)

    def first_query(self, key: Index) -> Index:
        """First query that sees the slot; the segment's end for a slot past the last key."""
        segment = key // self.slots
        position = key - self._shift(segment)
        start, end = segment * self.queries_each, (segment + 1) * self.queries_each
        first = at_most(at_least(self.window.first_query(position), start), end)
        return first + _where_above(position, self.length - 1, end - first)

    def last_query(self, key: Index) -> Index:
        """Last query that sees the slot; before the segment for a slot before the first key."""
        segment = key // self.slots
        position = key - self._shift(segment)
        start, end = segment * self.queries_each, (segment + 1) * self.queries_each
        last = at_least(at_most(self.window.last_query(position), end - 1), start - 1)
        return last - _where_above(-position, 0, last - (start - 1))

    def keys(self, batch: Index | int, head: Index | int, query: Index) -> tuple[Index, Index]:
        """First and last slot that ``query`` sees."""
        return self.first_key(query), self.last_key(query)

    def queries(self, batch: Index | int, head: Index | int, key: Index) -> tuple[Index, Index]:
        """First and last query that sees the slot."""
        return self.first_query(key), self.last_query(key)

    @property
    def reach(self) -> Reach:
        """The window's, under the layout's name."""
        return replace(self.window.reach, label=self.label)

    @property
    def words(self) -> str:
        """The label."""
        return self.label

    def key_position(self, *place: Any) -> Any:
        """``(batch, query, slot)``: position of the key that ``query`` finds in ``slot``."""
        query, slot = place[-2:]
        return slot - self._shift(query // self.queries_each)

    def most_keys(self, queries: int) -> int:
        """Upper bound of the slots between the first and last key that a block sees."""
        crossed = _ceil(queries - 1, self.queries_each)
        return self.window.most_keys(queries) + crossed * self._halo

    def most_queries(self, keys: int) -> int:
        """Upper bound of the queries between the first and last one that see a block."""
        return self.window.most_queries(keys)

    def aligned_to(self, block: int) -> bool:
        """As for the window: segments, and slots in one, are multiples of its size."""
        return self.window.aligned_to(block)

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
        return self.window.before + self.window.after

    def _shift(self, segment: Index) -> Index:
        return segment * self._halo + self.window.before


def _where_above(value: Index, limit: int, then: Index) -> Index:
    """``then`` where ``value > limit``, else 0."""
    return then * (value > limit)


class _InSlots(torch.autograd.Function):
    """Copies keys to the slots that hold them; the gradient of a key is the sum of its slots'.

    Forward by look-up and backward by slices, so that a compiler makes one pass of each: to join
    slices takes it several, and the gradient of a look-up is atomic additions.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(keys: Tensor, layout: Segments) -> Tensor:
        position = layout.slot_positions(keys.device)
        inside = (position >= 0) & (position < layout.length)
        place = written_out(torch.where(inside, position, -1))
        return keys.index_select(-2, at_least(place, 0)).masked_fill((place < 0)[:, None], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Segments], output: Tensor) -> None:
        ctx.layout = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.from_slots(grad), None


def _ceil(count: int, by: int) -> int:
    return -(-count // by)
