"""Forty layers of three lengths, on a GPU: all right, and none compiles again and again.

Nothing is forgotten between the tests here. In one process they are forty layers in a row; what
the ones before compiled counts against torch's limit for those after, where anything is shared.
"""

import dataclasses
import random

import pytest
import torch
from compilers import MOST_GRAPHS, called, check_fused, graphs, report
from features import PLAIN, windows_of

from flexlocal import LocalAttention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_limit_is_hit")]


def drawn(which):
    """A layer of its own and a dtype: windows, looks, flags and head sizes, drawn by number."""
    draw = random.Random(which)
    causal, rotary = draw.random() < 0.5, draw.random() < 0.5
    xpos = rotary and draw.random() < 0.5
    rule = windows_of(
        draw.choice([16, 33, 64, 100, 128]) + which,
        causal=causal,
        exact=draw.random() < 0.5,
        look_backward=draw.choice([0, 1, 2]),
        look_forward=None if causal else draw.choice([0, 1, 2]),
    )
    d = draw.choice([16, 32] if xpos else [16, 32, 64, 80, 128])
    heads = draw.choice([2, 4])
    case = dataclasses.replace(
        PLAIN,
        window=rule,
        lead=(3, heads),
        kv_heads=draw.choice([None, heads // 2]),
        d=d,
        d_v=draw.choice([24, 48]),
        rotary=rotary,
        xpos=xpos,
        shared_qk=draw.random() < 0.3,
        mask_batch=draw.choice([None, None, 3]),
        bias_heads=draw.choice([None, None, heads]),
        seed=which,
    )
    return case, draw.choice([torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("which", range(40))
def test_forty_layers_of_three_lengths(which, inside):
    if inside:  # each in a graph of its own, as in a model of its own
        torch.compiler.reset()
    case, dtype = drawn(which)
    run = called(LocalAttention(**case.arguments(), backend="flex").cuda(), inside)
    before = graphs()
    for n in (150 + which, 333, 256):
        check_fused(dataclasses.replace(case, n=n), dtype, run)
    report(f"layer {which}, {dtype}, 3 lengths", graphs() - before)
    assert graphs() - before <= MOST_GRAPHS
