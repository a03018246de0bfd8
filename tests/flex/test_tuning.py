"""The table of kernel options: what it holds fits the kernels, and who gets what."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from flexlocal import Window
from flexlocal.flex import compile, tuning
from flexlocal.flex.kernel import Blocks, Kernel
from flexlocal.flex.tuning import (
    STOCK_BLOCK,
    TABLE,
    Tuning,
    capped_tuning,
    nearest,
    without_bounds,
)
from flexlocal.spec import Inputs, Spec

H100 = (9, 0)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("entry", TABLE, ids=lambda e: f"{e.capability}-{e.head_size}-{e.reach}")
def test_tiles_divide_blocks(entry, capped):
    """FlexAttention's own condition on every tile, which it checks after minutes of compiling."""
    tuned = capped_tuning(entry) if capped else entry.tuning
    assert (tuned == entry.tuning) == (not capped or entry.head_size > 64)
    block, options = tuned.block, dict(tuned.options)
    assert STOCK_BLOCK % block == 0
    if not options:  # FlexAttention's own fit blocks of its own size
        assert block == STOCK_BLOCK
        return
    tiles = {name: size for name, size in options.items() if "BLOCK_" in name}
    assert len(tiles) == 6
    assert all(block % size == 0 for size in tiles.values())
    assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == 0
    assert options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: f"{e.capability}-{e.head_size}-{e.reach}")
def test_an_entry_serves_its_own_problem(entry):
    window = Window(entry.reach - 1, causal=True, exact=True)
    assert window.most_seen == entry.reach
    assert nearest(entry.capability, torch.bfloat16, entry.head_size, window) is entry


@given(st.integers(1, 300), st.integers(1, 10000))
def test_the_nearest_reach_among_heads_that_fit(head, reach):
    found = nearest(H100, torch.float16, head, Window(reach, look_backward=0, look_forward=0))
    heads = sorted({e.head_size for e in TABLE if e.head_size >= head})
    if not heads:
        assert found is None
        return
    fits = [e for e in TABLE if e.head_size == heads[0]]
    best = min(max(e.reach / reach, reach / e.reach) for e in fits)
    assert found in [e for e in fits if max(e.reach / reach, reach / e.reach) == best]


def test_what_the_table_does_not_know_stays_as_it_is():
    window = Window(256, causal=True)
    assert nearest((1, 0), torch.bfloat16, 64, window) is None
    assert nearest(H100, torch.float32, 64, window) is None


def on_gpu(b, h, n, m=None, **more):
    """The inputs of a call, which hold nothing."""
    with FakeTensorMode():
        q, k = (torch.empty(b, h, x, 8, device="cuda") for x in (n, n if m is None else m))
        return Inputs(q, k, k, **more)


SPEC = Spec(Window(64, causal=True), scale=1.0)


@pytest.mark.parametrize(
    ("inputs", "spec", "whole"),
    [
        (on_gpu(2, 8, 8192), SPEC, True),
        (on_gpu(2, 256, 128), SPEC, True),
        (on_gpu(2, 8, 8192, documents=torch.zeros(2, 1, 8192)), SPEC, True),
        (on_gpu(2, 8, 8191), SPEC, False),
        (on_gpu(2, 8, 8192, m=8193), SPEC, False),
        (on_gpu(2, 4, 4096), SPEC, False),  # too few for a graph of their own
        (on_gpu(2, 8, 8192, m=8320, q_offset=128, kv_offset=0), SPEC, True),
        (on_gpu(2, 8, 8192, m=32768, q_offset=128, kv_offset=0), SPEC, False),  # of few keys
        (on_gpu(2, 8, 8192), SPEC._replace(xpos_base=32.0), False),
        (Inputs(*[torch.empty(2, 8, 8192, 1)] * 3), SPEC, False),  # a processor has no such option
    ],
)
def test_kernels_check_no_bounds_in_whole_blocks(inputs, spec, whole):
    tuned = TABLE[0].tuning
    found = without_bounds(tuned, spec, inputs)
    assert dict(found.options) == dict(tuned.options) | ({"IS_DIVISIBLE": True} if whole else {})
    assert found == (dataclasses.replace(tuned, options=found.options) if whole else tuned)
    asked = Tuning(STOCK_BLOCK, (("IS_DIVISIBLE", False),))
    assert without_bounds(asked, spec, inputs) == asked


def test_graphs_of_our_own_are_told_so(monkeypatch):
    seen = []
    monkeypatch.setattr(
        compile, "_with_own_graph", lambda spec, inputs, tuning: seen.append(tuning)
    )
    monkeypatch.setattr(tuning, "capability", lambda device: H100)
    for n in (8192, 8191):
        compile.prepared(SPEC, on_gpu(2, 8, n), "flex")
    assert ["IS_DIVISIBLE" in dict(found.options) for found in seen] == [True, False]
    compile.prepared(SPEC, on_gpu(2, 8, 8192), "flash by flex")
    assert seen[-1] == tuning.FLASH


def kernel_of(blocks):
    """One for the GPU that adds nothing to the mask."""
    return Kernel(
        blocks,
        rule_tensors=0,
        heads=2,
        grouped=False,
        scale=1.0,
        softcap=None,
        fast_tanh=False,
        bias_heads=None,
        margin=None,
        on_gpu=True,
        ends_alone=None,
    )


@pytest.mark.parametrize(
    ("given", "backend", "steps_through"),
    [
        ({}, "TRITON", True),
        ({"BACKEND": "TRITON_DECODE"}, "TRITON_DECODE", False),
        ({"FORCE_USE_FLEX_ATTENTION": True}, None, True),  # which refuses a BACKEND beside it
    ],
)
def test_few_queries_take_a_decoding_kernel_only_by_name(given, backend, steps_through):
    window = Window(16, causal=True)
    tuning = Tuning(STOCK_BLOCK, tuple(given.items()), one_list=True)
    blocks = Blocks(window, 60, 60, (1, 2), masked=False, shared_qk=False, tuning=tuning)
    kernel = kernel_of(blocks)
    assert kernel.options.get("BACKEND") == backend
    assert kernel.options.get("BLOCKS_ARE_CONTIGUOUS", False) == steps_through


@pytest.mark.parametrize(
    ("window", "n", "masked", "one_list", "without_gaps"),
    [
        (Window(256, causal=True), 1024, False, False, True),
        (Window(256, causal=True), 1000, False, False, False),
        (Window(256, causal=True), 1024, True, False, False),
        (Window(256, causal=True), 1024, True, True, False),
        (Window(128, causal=True), 1024, True, True, True),
        (Window(256, causal=True, exact=True), 1024, False, False, False),
        (Window(256, causal=True, exact=True), 1024, False, True, True),
        (Window(256, causal=True, exact=True), 1024, True, False, False),
        (Window(256, causal=True, exact=True), 1024, True, True, True),
    ],
)
def test_kernels_step_through_lists_without_gaps_alone(window, n, masked, one_list, without_gaps):
    """Where a list has gaps they would read blocks that it does not name."""
    given = Tuning(STOCK_BLOCK, (), one_list)
    blocks = Blocks(window, n, n, (1, 2), masked=masked, shared_qk=False, tuning=given)
    kernel = kernel_of(blocks)
    assert ("BLOCKS_ARE_CONTIGUOUS" in kernel.options) == without_gaps
