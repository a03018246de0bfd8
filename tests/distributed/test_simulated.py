"""Shards of a sequence, rank by rank in one process, against the oracle."""

import placed
import simulated
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES


def cuts(tokens, ranks):
    """How many of so many tokens lie on each rank: uneven, some none."""
    edges = st.lists(st.integers(0, tokens), min_size=ranks - 1, max_size=ranks - 1).map(sorted)
    return edges.map(lambda at: [b - a for a, b in zip([0, *at], [*at, tokens], strict=True)])


@st.composite
def sharded(draw):
    """A call, and how many of its queries and keys lie on each rank."""
    case = draw(placed.placed())
    assume(case.offset_rows is None or case.same_offset)
    ranks = draw(st.integers(1, 5))
    queries = draw(cuts(case.case.n, ranks))
    keys = queries if case.q_offset is None else draw(cuts(case.m, ranks))
    return case, queries, keys


def run_of(case, queries, keys, overlap):
    def run(call):
        arguments = case.arguments(call, return_lse=True, backend="eager")
        return simulated.attention(
            call.q, call.k, call.v, case.window, queries, keys, overlap, **arguments
        )

    return run


@settings(max_examples=2 * EXAMPLES)
@given(sharded(), st.booleans())
def test_shards_give_what_one_call_gives(drawn, overlap):
    case, queries, keys = drawn
    placed.check(case, run=run_of(case, queries, keys, overlap))
