"""Which keys travel from which rank to which, in plain ints.

A sequence lies on the ranks of a group in runs, in rank order. Each rank needs the keys that its
queries see; those that lie elsewhere are its halo. Everything here is counted in indices of the
whole sequence, and follows from the window's bounds and from the lengths of the shards, so that
every rank makes the same plan without asking.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from ..masks.window import Window


class Run(NamedTuple):
    """Consecutive indices from ``start`` to ``stop - 1``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many they are."""
        return max(0, self.stop - self.start)

    def within(self, other: "Run") -> "Run":
        """Those that are of ``other`` as well."""
        start = max(self.start, other.start)
        return Run(start, max(start, min(self.stop, other.stop)))

    def less(self, by: int) -> "Run":
        """The same, counted from ``by``."""
        return Run(self.start - by, self.stop - by)


@dataclass(frozen=True)
class Sight:
    """Which keys a query may see, and which queries a key.

    Args:
        window: the rule.
        q_offset, kv_offset: position of the first query and of the first key.
        known: windows begin where these positions say. Else, with documents or an offset for each
            row, they begin anywhere, and the window's reach bounds what is seen.
    """

    window: Window
    q_offset: int = 0
    kv_offset: int = 0
    known: bool = True

    def first_key(self, query: int) -> int:
        """First key that ``query`` may see."""
        position = query + self.q_offset
        if self.known:  # and no key below position 0
            return max(0, self.window.first_key(position)) - self.kv_offset
        return position - self.window.reach.back - self.kv_offset

    def last_key(self, query: int) -> int:
        """Last key that ``query`` may see."""
        position = query + self.q_offset
        last = self.window.last_key(position) if self.known else position + self.window.reach.ahead
        return last - self.kv_offset

    def first_query(self, key: int) -> int:
        """First query that may see ``key``."""
        position = key + self.kv_offset
        if self.known:
            return self.window.first_query(position) - self.q_offset
        return position - self.window.reach.ahead - self.q_offset

    def last_query(self, key: int) -> int:
        """Last query that may see ``key``."""
        position = key + self.kv_offset
        last = self.window.last_query(position) if self.known else position + self.window.reach.back
        return last - self.q_offset

    def seen_by(self, queries: Run, keys: int) -> Run:
        """The keys of ``keys`` that ``queries`` may see."""
        if not queries.size:
            return Run(0, 0)
        first, last = self.first_key(queries.start), self.last_key(queries.stop - 1)
        return Run(first, last + 1).within(Run(0, keys))


class Portion(NamedTuple):
    """Queries of a rank that one call computes, and the keys that it is given."""

    queries: Run
    keys: Run


@dataclass(frozen=True)
class Plan:
    """What one rank sends, receives and computes.

    Attributes:
        rank: whose plan it is.
        queries, own: the queries and the keys that lie on it.
        receives: for each rank, the keys that come from there.
        sends: for each rank, the own keys that go there.
        portions: the calls of this rank, in the order of their queries, which they cover.
        travels: whether any rank of the group receives a key.
    """

    rank: int
    queries: Run
    own: Run
    receives: tuple[Run, ...]
    sends: tuple[Run, ...]
    portions: tuple[Portion, ...]
    travels: bool

    @property
    def halo(self) -> int:
        """Keys that this rank receives."""
        return sum(run.size for run in self.receives)

    def needs_halo(self, portion: Portion) -> bool:
        """Whether ``portion`` has to wait for keys of other ranks."""
        return portion.keys != self.own


def plan(
    sight: Sight,
    rank: int,
    queries: Sequence[int],
    keys: Sequence[int] | None = None,
    overlap: bool = True,
) -> Plan:
    """The plan of one rank.

    Args:
        sight: which keys a query may see.
        rank: whose plan to make.
        queries: how many lie on each rank.
        keys: likewise; as many as queries by default.
        overlap: compute queries that need no other rank's keys in a call of their own.
    """
    of_queries = runs(queries)
    of_keys = of_queries if keys is None else runs(keys)
    total = of_keys[-1].stop
    needed = [sight.seen_by(run, total) for run in of_queries]
    nothing, own = Run(0, 0), of_keys[rank]
    others = [other != rank for other in range(len(of_keys))]
    return Plan(
        rank=rank,
        queries=of_queries[rank],
        own=own,
        receives=tuple(
            needed[rank].within(run) if other else nothing
            for run, other in zip(of_keys, others, strict=True)
        ),
        sends=tuple(
            run.within(own) if other else nothing for run, other in zip(needed, others, strict=True)
        ),
        portions=_portions(sight, of_queries[rank], own, needed[rank], overlap),
        travels=any(
            run.within(keys).size < run.size for run, keys in zip(needed, of_keys, strict=True)
        ),
    )


def runs(lengths: Sequence[int]) -> list[Run]:
    """The run of each rank, where so many lie on each."""
    ends = list(accumulate(lengths))
    return [Run(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _portions(
    sight: Sight, queries: Run, own: Run, needed: Run, overlap: bool
) -> tuple[Portion, ...]:
    """Queries that see keys before ``own``, those that see own keys alone, and the rest."""
    if needed.within(own) == needed or not needed.size:
        return (Portion(queries, own),)
    first, stop = queries
    if needed.start < own.start:
        first = sight.last_query(own.start - 1) + 1
    if needed.stop > own.stop:
        stop = sight.first_query(own.stop)
    if not overlap or not own.size or not queries.start <= first < stop <= queries.stop:
        return (Portion(queries, needed),)
    found = [Portion(Run(first, stop), own)]
    if queries.start < first:
        last = sight.last_key(first - 1)
        found.insert(0, Portion(Run(queries.start, first), needed.within(Run(0, last + 1))))
    if stop < queries.stop:
        begin = sight.first_key(stop)
        found.append(Portion(Run(stop, queries.stop), Run(max(begin, needed.start), needed.stop)))
    return tuple(found)
