"""Shards of a sequence, rank by rank in one process, against the oracle."""

import placed
import pytest
import sharded
import simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES


def check(drawn, overlap):
    case, queries, keys = drawn

    def run(call):
        arguments = case.arguments(call, return_lse=True, backend="eager")
        return simulated.attention(
            call.q, call.k, call.v, case.window, queries, keys, overlap, **arguments
        )

    placed.check(case, run=run)


@settings(max_examples=EXAMPLES // 3)
@given(sharded.calls(5), st.booleans())
def test_shards_give_what_one_call_gives(drawn, overlap):
    check(drawn, overlap)


@pytest.mark.slow
@settings(max_examples=2 * EXAMPLES)
@given(sharded.calls(5), st.booleans())
def test_more_shards_give_what_one_call_gives(drawn, overlap):
    check(drawn, overlap)
