"""A window over positions: documents packed into a row, and queries or keys at an offset.

A token's position is its index less its document's origin, the index of position 0. Where there are
no documents, a row is one document, and its origin the offset of its keys, negated. All is counted
in indices of keys: a query stands at the index of the key at its position, which is its own index
plus ``lead``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_limits.sizes import Index, at_least, at_most
from .documents import run_ends
from .rule import Entry, Reach, Rule
from .window import Window

Offset = int | Tensor
"""A number for all rows, or integer ``(b or 1, h or 1, 1)``."""


class Origins(NamedTuple):
    """Where the documents of queries, or of keys, begin and end: indices of keys.

    Attributes:
        starts: index of position 0, a number or integer ``(b or 1, h or 1, n or 1)``. It may lie
            outside the keys, and past the token itself for a token that sees nothing.
        ends: index of the last key, of the same shape; None without documents.
    """

    starts: Offset
    ends: Tensor | None = None

    def plus(self, shift: Offset) -> "Origins":
        """The same documents, where the index of each key is higher by ``shift``."""
        return Origins(self.starts + shift, None if self.ends is None else self.ends + shift)

    def at(self, batch: Entry, head: Entry, token: Index) -> tuple[Any, Any]:
        """Start and end of the document of ``token``; end None without documents."""
        start = _looked_up(self.starts, batch, head, token)
        return start, None if self.ends is None else _looked_up(self.ends, batch, head, token)


@dataclass(frozen=True, eq=False)
class Placed(Rule):
    """``placed`` over positions; made by ``place``.

    A query sees the keys of its own document that the window lets it see, none at a position below
    0. A query at such a position sees nothing, nor one outside ``seeing``.

    Args:
        placed: the window.
        of_queries: the documents of the queries.
        of_keys: the documents of the keys; None where they are those of the queries.
        lead: index of the key at the position of a query, less the index of the query.
        seeing: the first query that sees keys, and the first one after that which sees none.
    """

    placed: Window
    of_queries: Origins
    of_keys: Origins | None = None
    lead: Offset = 0
    seeing: tuple[Offset, Offset] | None = None

    def keys(self, batch: Entry, head: Entry, query: Index) -> tuple[Index, Index]:
        """First and last key that ``query`` sees."""
        start, end = self.of_queries.at(batch, head, query)
        position = query + self._lead(batch, head) - start
        first = at_least(self.placed.first_key(position), 0) + start
        last = self.placed.last_key(position) + start
        # A last key that is the query's own lies in its document, and below `first` for a query at
        # a position below 0.
        last = last if self.placed.causal else _bounded(last, position, start, end)
        if self.seeing is None:
            return first, last
        begin, stop = (_looked_up(x, batch, head, 0) for x in self.seeing)
        # Nothing, and in a way that no bound decreases.
        found = _where(query < stop, first, at_least(last + 1, first))
        return found, _where(query < begin, at_most(last, first - 1), last)

    def queries(self, batch: Entry, head: Entry, key: Index) -> tuple[Index, Index]:
        """First and last query that sees ``key``."""
        start, end = self._of_keys.at(batch, head, key)
        position, lead = key - start, self._lead(batch, head)
        first = at_least(self.placed.first_query(position), 0) + start
        last = _bounded(self.placed.last_query(position) + start, position, start, end)
        first, last = first - lead, last - lead
        if self.seeing is None:
            return first, last
        begin, stop = (_looked_up(x, batch, head, 0) for x in self.seeing)
        return at_least(first, begin), at_most(last, stop - 1)

    @property
    def reach(self) -> Reach:
        """The window's, which may begin anywhere."""
        window = self.placed.reach
        counted = "offset" if self.of_queries.ends is None else "documents"
        return Reach(window.keys, window.back, window.ahead, f"{window.label}_{counted}")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What of the documents and of ``lead`` is held in tensors."""
        return tuple(x for x in self._numbers() if isinstance(x, Tensor))

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Placed":
        """The same window over other documents and offsets, of the same kinds."""
        rest = iter(tensors)
        numbers = [next(rest) if isinstance(x, Tensor) else x for x in self._numbers()]
        of_queries, of_keys = Origins(*numbers[0:2]), Origins(*numbers[2:4])
        return Placed(
            self.placed,
            of_queries,
            None if self.of_keys is None else of_keys,
            numbers[4],
            None if self.seeing is None else (numbers[5], numbers[6]),
        )

    @property
    def window(self) -> Window:
        """The window whose positions these are."""
        return self.placed

    @property
    def by_head(self) -> bool:
        """Whether documents or offsets differ by head."""
        return any(x.shape[1] > 1 for x in self.tensors)

    @property
    def words(self) -> str:
        """The window's, and what it counts from."""
        counted = "its document's first token" if self.of_queries.ends is not None else "an offset"
        return f"{self.placed.words}; positions count from {counted}"

    def query_position(self, batch: Entry, head: Entry, query: Index) -> Index:
        """Position of ``query`` in its document."""
        start, _ = self.of_queries.at(batch, head, query)
        position: Index = query + self._lead(batch, head) - start
        return position

    def key_position(self, batch: Entry, head: Entry, key: Index) -> Index:
        """Position of ``key`` in its document."""
        start, _ = self._of_keys.at(batch, head, key)
        position: Index = key - start
        return position

    def seen_position(self, batch: Entry, head: Entry, query: Index, key: Index) -> Index:
        """Position of ``key`` in the document of ``query``."""
        start, _ = self.of_queries.at(batch, head, query)
        position: Index = key - start
        return position

    def for_scores(self) -> "Placed":
        """Without the documents of keys, nor their ends where causality ends all intervals."""
        starts, ends = self.of_queries
        of_queries = Origins(starts, None if self.placed.causal else ends)
        return replace(self, of_queries=of_queries, of_keys=None)

    def beside(self, queries: int, keys: int) -> tuple["Placed", "Nearby"]:
        """The rule over those keys alone that some query may see, and over one at least.

        Args:
            queries, keys: how many there are, at least 1.

        Returns:
            The rule, whose ``lead`` is a number, and which keys these are.
        """
        back, ahead = self.reach.back, self.reach.ahead
        if isinstance(self.lead, int):
            start = min(max(0, self.lead - back), keys - 1)
            stop = min(max(start + 1, self.lead + queries + ahead), keys)
            return self._from(start, Nearby(start, stop)), Nearby(start, stop)
        index = torch.arange(queries + back + ahead, device=self.lead.device) - back + self.lead
        exists = (index >= 0) & (index < keys)
        near = Nearby(0, queries + back + ahead, at_most(at_least(index, 0), keys - 1), exists)
        return self._from(self.lead - back, near), near

    def for_every_key(self, queries: int) -> "Placed":
        """The rule for a query at each key, of which ``queries`` are this rule's from ``lead`` on.

        The others stand at their keys, and what they see is nobody's business.
        """
        assert isinstance(self.lead, int)
        first, end = self.lead, self.lead + queries

        def padded(query: Any, key: Any) -> Any:
            if not isinstance(key, Tensor) or query.shape[-1] == 1:
                return query
            lead = torch.broadcast_shapes(query.shape[:2], key.shape[:2])
            query, key = query.expand(*lead, -1), key.expand(*lead, -1)
            return torch.cat((key[..., :first], query, key[..., end:]), dim=-1)

        pairs = zip(self.of_queries, self._of_keys, strict=True)
        of_queries = Origins(*(padded(query, key) for query, key in pairs))
        seeing = None if self.seeing is None else (self.seeing[0] + first, self.seeing[1] + first)
        return Placed(self.placed, of_queries, self._of_keys, 0, seeing)

    def _from(self, start: Offset, near: "Nearby") -> "Placed":
        """The rule over the keys ``near``, the first of which has had the index ``start``."""
        lead = self.reach.back if isinstance(start, Tensor) else self.lead - start
        starts, ends = self._of_keys
        of_keys = Origins(near.of_table(starts), None if ends is None else near.of_table(ends))
        of_queries = self.of_queries.plus(-start)
        return Placed(self.placed, of_queries, of_keys.plus(-start), lead, self.seeing)

    # Equal where a kernel of one serves the other: numbers count, tensors only by their shapes.

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placed) and other._kind() == self._kind()

    def __hash__(self) -> int:
        return hash(self._kind())

    def _kind(self) -> object:
        return self.placed, tuple(map(_kind_of, self._numbers()))

    @property
    def _of_keys(self) -> Origins:
        return self.of_queries if self.of_keys is None else self.of_keys

    def _lead(self, batch: Entry, head: Entry) -> Any:
        return _looked_up(self.lead, batch, head, 0)

    def _numbers(self) -> tuple[Any, ...]:
        of_keys = (None, None) if self.of_keys is None else self.of_keys
        seeing = (None, None) if self.seeing is None else self.seeing
        return *self.of_queries, *of_keys, self.lead, *seeing


@dataclass(frozen=True)
class Nearby:
    """Which keys some query may see: ``start`` to ``stop``, or those at ``index``.

    Attributes:
        index: integer ``(b or 1, h or 1, stop)``, where it differs by row.
        exists: boolean, of the shape of ``index``: False in place of a key that there is not.
    """

    start: int
    stop: int
    index: Tensor | None = None
    exists: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """``x`` ``(b, h', n, d)`` at these keys."""
        if self.index is None:
            return x[:, :, self.start : self.stop]
        index = self.index[..., None].expand(*x.shape[:2], -1, x.shape[-1])
        return x.gather(2, index)

    def kept(self, mask: Tensor | None) -> Tensor | None:
        """Which of these keys exist and are kept by ``mask`` ``(b, h or 1, n)``; None for all."""
        if mask is None:
            return self.exists
        if self.exists is None:
            return mask[..., self.start : self.stop]
        kept: Tensor = self.of_table(mask) & self.exists
        return kept

    def of_table(self, x: Any) -> Any:
        """``x``, a number for each key, at these keys: ``(b or 1, h or 1, n or 1)``."""
        if not isinstance(x, Tensor) or x.shape[-1] == 1:  # a symbolic number is no int
            return x
        if self.index is None:
            return x[..., self.start : self.stop]
        lead = torch.broadcast_shapes(x.shape[:2], self.index.shape[:2])
        return x.expand(*lead, -1).gather(2, self.index.expand(*lead, -1))


def place(
    window: Window,
    queries: int,
    keys: int,
    documents: Tensor | None = None,
    q_offset: Offset = 0,
    kv_offset: Offset = 0,
    *,
    begin: Tensor | None = None,
    seeing: tuple[Offset, Offset] | None = None,
) -> Placed:
    """``window`` over the positions that documents and offsets give.

    Args:
        queries, keys: how many there are.
        documents: integer ``(b or 1, h or 1, keys)``; negative for padding. The first document of a
            row counts from position 0, wherever its first key stands.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        begin: position at which the first document of a row begins, 0 by default, integer ``(b or
            1, h or 1, 1)``.
        seeing: see ``Placed``.
    """
    # The same tensor for both says, without a look at its numbers, that queries stand at the keys.
    lead = 0 if q_offset is kv_offset else q_offset - kv_offset
    origin = -kv_offset
    if documents is None:
        return Placed(window, Origins(origin), None, lead, seeing)
    of_keys = _origins(documents, origin, begin)
    if isinstance(lead, int) and lead == 0 and queries == keys:
        return Placed(window, of_keys, None, 0, seeing)
    return Placed(window, _of_queries(of_keys, queries, keys, lead), of_keys, lead, seeing)


_FAR = 2**30
"""Past every key."""


def _origins(documents: Tensor, origin: Offset, begin: Tensor | None) -> Origins:
    """The documents of keys; position 0 of the row is at the index ``origin``."""
    first, last = run_ends(documents)
    # Documents that begin before position 0 begin there; the first one does in any case.
    start = first
    if begin is not None or not isinstance(origin, int) or origin != 0:
        of_first = origin if begin is None else origin + begin
        start = torch.where(first == 0, of_first, at_least(first, origin)).to(torch.int32)
    # Padding has a position of -1 or less, where it sees nothing.
    count = documents.shape[-1]
    index = torch.arange(1, count + 1, dtype=torch.int32, device=first.device)
    start = torch.where(documents < 0, at_least(start, index), start)
    # The last document does not end with its last key: queries after it are of it as well.
    return Origins(start, torch.where(last == count - 1, _FAR, last))


def _of_queries(of_keys: Origins, queries: int, keys: int, lead: Offset) -> Origins:
    """The documents of queries, each that of the key at its position, or of the nearest key."""
    device = None if of_keys.ends is None else of_keys.ends.device
    own = torch.arange(queries, device=device) + lead
    own = own.expand(1, 1, -1) if own.dim() == 1 else own
    near = Nearby(0, queries, at_most(at_least(own, 0), keys - 1))
    return Origins(near.of_table(of_keys.starts), near.of_table(of_keys.ends))


def _bounded(last: Any, position: Any, start: Any, end: Any) -> Any:
    """``last``, but not past ``end``, and below ``start`` at a position below 0."""
    if end is not None:
        last = at_most(last, end)
    if isinstance(position, Tensor):
        return torch.where(position < 0, start - 1, last)
    return start - 1 if position < 0 else last


def _where(condition: Any, true: Any, false: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, true, false)
    return true if condition else false


def _looked_up(x: Offset, batch: Entry, head: Entry, token: Index) -> Any:
    """The element of ``x`` ``(b or 1, h or 1, n or 1)`` for these."""
    if not isinstance(x, Tensor):
        return x
    entry, heads, tokens = (size != 1 for size in x.shape)
    return x[batch if entry else 0, head if heads else 0, token if tokens else 0]


def _kind_of(x: Any) -> object:
    """A number itself; of a tensor, along which dimensions it varies."""
    return tuple(size != 1 for size in x.shape) if isinstance(x, Tensor) else x
