"""Keys copied segment by segment, for xpos: the one layout in which slots are not keys' indices.

xpos scales a key by its distance from an origin, and far from the origin the factor overflows. So
the sequence is cut into segments of some windows, each with an origin of its own. A segment gets
its own copy of every key that its queries may see: the keys of the segment, those of
``look_backward`` windows before it and those of ``look_forward`` windows after it. A query still
sees one interval, counted in slots of that layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_limits.memory import written_out
from ..torch_limits.sizes import Index, at_least, at_most
from .rule import Entry, Reach, Rule
from .window import Window


@dataclass(frozen=True)
class LayoutReach(Reach):
    """A reach over slots. Where a block of queries enters a segment, its slots include a halo."""

    segment: int = 1
    """Queries in a segment."""
    halo: int = 0
    """Slots of a segment for keys of the segments around it."""

    def longest(self, tokens: int) -> int:
        """Most slots from the first to the last that a block of queries sees."""
        return super().longest(tokens) + _ceil(tokens - 1, self.segment) * self.halo

    def longest_of_keys(self, keys: int) -> int:
        """Most queries from the first to the last that see a block of slots."""
        return super().longest(keys)


@dataclass(frozen=True)
class KeyLayout(Rule):
    """The rule ``layout_of`` over key slots, in segments of ``windows`` windows.

    Args:
        layout_of: a window, or one over positions whose queries have the indices of their keys.
        windows: windows in a segment, at least 1.
        length: tokens in the sequence.
        length_tensor: ``length`` in a 0-d tensor, where kernels are to look it up.
    """

    layout_of: Rule
    windows: int
    length: int
    length_tensor: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def segment(self) -> int:
        """Queries in a segment."""
        return self.windows * self.window.size

    @property
    def before(self) -> int:
        """Keys before a segment that its queries may see."""
        return self.layout_of.reach.around(self.segment)[0]

    @property
    def after(self) -> int:
        """Keys after a segment that its queries may see."""
        return self.layout_of.reach.around(self.segment)[1]

    @property
    def slots(self) -> int:
        """Key slots in a segment: its own keys and the halo."""
        return self.segment + self._halo

    @property
    def count(self) -> int:
        """Segments in the sequence."""
        return _ceil(self.length, self.segment)

    @property
    def all_slots(self) -> int:
        """Key slots of all segments."""
        return self.count * self.slots

    def in_slots(self, keys: Tensor) -> Tensor:
        """``(..., length, d)`` as ``(..., count * slots, d)``, zeros where there is no key."""
        laid_out: Tensor = _InSlots.apply(keys, self)  # type: ignore[no-untyped-call]
        return laid_out

    def slot_keys(self, device: torch.device | str) -> Tensor:
        """Index of each slot's key, ``(count * slots,)``; outside the sequence without a key."""
        slot = torch.arange(self.all_slots, device=device)
        return slot - self._shift(slot // self.slots)

    def from_slots(self, copies: Tensor) -> Tensor:
        """``(..., count * slots, d)`` summed over the slots of each key, ``(..., length, d)``."""
        before, after = self.before, self.after
        parts = copies.view(*copies.shape[:-2], self.count, self.slots, copies.shape[-1])
        found = []
        # A segment's slots hold keys of the segments `step` before it, for these values of `step`.
        for step in range(-_ceil(after, self.segment), _ceil(before, self.segment) + 1):
            start = before - step * self.segment
            first, end = max(start, 0), min(start + self.segment, self.slots)
            inside = parts[..., first:end, :]
            behind, past = max(-step, 0), max(step, 0)
            missing = (0, 0, first - start, start + self.segment - end, behind, past)
            found.append(self._joined(F.pad(inside, missing).narrow(-3, past, self.count)))
        return sum(found[1:], found[0])

    def _joined(self, segments: Tensor) -> Tensor:
        """``(..., count, queries, d)`` as ``(..., length, d)``."""
        joined: Tensor = segments.flatten(-3, -2)
        return joined[..., : self.length, :]

    # The rule, over slots.

    def keys(self, batch: Entry, head: Entry, query: Index) -> tuple[Index, Index]:
        """First and last slot that ``query`` sees."""
        first, last = self.layout_of.keys(batch, head, query)
        if self.looks_up_length:
            length: Any = self.length if self.length_tensor is None else self.length_tensor
            last = at_most(last, length - 1)
        shift = self._shift(query // self.segment)
        return at_least(first, 0) + shift, last + shift

    def queries(self, batch: Entry, head: Entry, slot: Index) -> tuple[Index, Index]:
        """First and last query of the slot's segment that sees the slot.

        No query sees a slot without a key. For slots past the last key, the first query is the
        segment's end; for slots before the first key, the last query lies before the segment.
        """
        number = slot // self.slots
        key = slot - self._shift(number)
        start, end = number * self.segment, (number + 1) * self.segment
        first, last = self.layout_of.queries(batch, head, self._existing(key))
        first = at_most(at_least(first, start), end)
        last = at_least(at_most(last, end - 1), start - 1)
        first = first + _where_above(key, self.length - 1, end - first)
        return first, last - _where_above(-key, 0, last - (start - 1))

    @property
    def reach(self) -> LayoutReach:
        """The laid out rule's, over slots."""
        reach = self.layout_of.reach
        return LayoutReach(
            **{name: getattr(reach, name) for name in ("keys", "back", "ahead", "align", "step")},
            label=f"{reach.label}_segments_of_{self.windows}",
            segment=self.segment,
            halo=self._halo,
        )

    @property
    def looks_up_length(self) -> bool:
        """Whether the bounds need the length: those of causal windows never lie beyond it."""
        return not self.window.causal

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the laid out rule, and the length, where it is given as a tensor."""
        length = () if self.length_tensor is None else (self.length_tensor,)
        return (*self.layout_of.tensors, *length)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "KeyLayout":
        """Over other tensors; with the length in the last one, if there is one more."""
        laid_out = len(self.layout_of.tensors)
        layout_of = self.layout_of.with_tensors(tensors[:laid_out])
        length = tensors[laid_out] if len(tensors) > laid_out else None
        return replace(self, layout_of=layout_of, length_tensor=length)

    def for_scores(self) -> "KeyLayout":
        """Over the laid out rule for scores."""
        return replace(self, layout_of=self.layout_of.for_scores())

    @property
    def window(self) -> Window:
        """The window that is laid out."""
        window: Window = self.layout_of.window
        return window

    def query_position(self, batch: Entry, head: Entry, query: Index) -> Index:
        """Position of ``query``."""
        return self.layout_of.query_position(batch, head, query)

    def key_position(self, batch: Entry, head: Entry, slot: Index) -> Index:
        """Position of the key in ``slot``, any number for a slot without a key."""
        key = slot - self._shift(slot // self.slots)
        return self.layout_of.key_position(batch, head, self._existing(key))

    def seen_position(self, batch: Entry, head: Entry, query: Index, slot: Index) -> Index:
        """Position of the key that ``query`` finds in ``slot``."""
        key = slot - self._shift(query // self.segment)
        return self.layout_of.seen_position(batch, head, query, key)

    @property
    def _halo(self) -> int:
        return self.before + self.after

    def _shift(self, number: Index) -> Index:
        """Slot less index of a key in segment ``number``."""
        return number * self._halo + self.before

    def _existing(self, key: Index) -> Index:
        """``key``, where a rule looks up its tensors the nearest one that exists."""
        if not self.layout_of.tensors:
            return key
        return at_most(at_least(key, 0), self.length - 1)


def _where_above(value: Index, limit: int, then: Index) -> Index:
    """``then`` where ``value > limit``, else 0."""
    return then * (value > limit)


class _InSlots(torch.autograd.Function):
    """Copies keys to the slots that hold them; the gradient of a key is the sum of its slots'.

    Forward looks up and backward adds slices, so that Inductor makes one pass of each. To join
    slices would take it several, and autograd's gradient of a look-up would be atomic additions.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(keys: Tensor, layout: KeyLayout) -> Tensor:
        key = layout.slot_keys(keys.device)
        inside = (key >= 0) & (key < layout.length)
        source = written_out(torch.where(inside, key, -1))
        return keys.index_select(-2, at_least(source, 0)).masked_fill((source < 0)[:, None], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, KeyLayout], output: Tensor) -> None:
        ctx.layout = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.from_slots(grad), None


def _ceil(count: int, by: int) -> int:
    return -(-count // by)
