"""Shards of a sequence, rank by rank in one process, against the oracle."""

import placed
import pytest
import sharded
import simulated
import torch
from features import windows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES

from flexlocal.flex import own_graph


def check(drawn, overlap, backend="eager", **more):
    case, queries, keys = drawn

    def run(call):
        arguments = case.arguments(call, return_lse=True, backend=backend)
        return simulated.attention(
            call.q, call.k, call.v, case.window, queries, keys, overlap, **arguments
        )

    placed.check(case, run=run, **more)


@settings(max_examples=EXAMPLES // 3)
@given(sharded.calls(5), st.booleans())
def test_shards_give_what_one_call_gives(drawn, overlap):
    check(drawn, overlap)


@pytest.mark.slow
@settings(max_examples=2 * EXAMPLES)
@given(sharded.calls(5), st.booleans())
def test_more_shards_give_what_one_call_gives(drawn, overlap):
    check(drawn, overlap)


SMALL = {"lead": (2, 3), "d": 6, "d_v": 5, "documents": 2, "n": 60, "seed": 3}


@pytest.mark.parametrize("keys", [[20, 20, 20], [7, 0, 1, 40, 12], [31, 29]])
@pytest.mark.parametrize(
    "more",
    [
        {"window": windows_of(9)},
        {"window": windows_of(9), "q_offset": 4, "kv_offset": 4, "seed": 8},
        {"window": windows_of(9), "q_offset": -4, "kv_offset": -4, "seed": 8},
        {"window": windows_of(11, causal=False), "rotary": True, "documents": 0},
        {"window": windows_of(7, look_backward=2), "bias_heads": 3},
        {"window": windows_of(7), "q_offset": 2, "kv_offset": 2, "offset_rows": 6,
         "same_offset": True},
    ],
)  # fmt: skip
def test_documents_that_cross_borders_count_from_their_first_token(more, keys):
    check((placed.case_of(**{**SMALL, **more}), keys, keys), True)


FUSED = {
    "rotary": {"window": windows_of(11, causal=False), "rotary": True, "documents": None},
    "documents": {"window": windows_of(9, exact=True), "sink_heads": 3},
}


@pytest.mark.slow
@pytest.mark.usefixtures("dense_on_the_cpu", "fresh_compiler")
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_path_lets_queries_wait_for_other_ranks_keys(name, monkeypatch):
    """In graphs of its own: on FlexAttention's dense operators, which have gradients."""
    monkeypatch.setattr(own_graph, "inductor", lambda graph, inputs: graph)
    monkeypatch.setattr(own_graph, "_detached", lambda x: x)
    case = placed.case_of(**{**SMALL, **FUSED[name]})
    check((case, [37, 23], [37, 23]), True, "flex", dtype=torch.float32, tolerance=2e-5)
