"""How often kernels are compiled, and that what runs is the kernel.

torch gives a piece of code eight graphs. Past them it raises or, without an error, runs
FlexAttention as dense arithmetic in n * n memory. Counts are printed: `pytest -rP` shows them.
"""

import dataclasses

import oracle
import pytest
import torch
from budget import gradients
from compilers import (
    MOST_GRAPHS,
    called,
    check_fused,
    graphs,
    needs_compiled_kernels_on_the_cpu,
    never_dense,
    report,
)
from features import PLAIN, windows_of

from flexlocal import LocalAttention

pytestmark = pytest.mark.usefixtures("fresh_compiler", "no_limit_is_hit")


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
def test_shapes_share_graphs_inside_a_compiled_model():
    """Batch size and length change at once: one that first changes later costs a graph more."""
    layer = LocalAttention(40, causal=True, dropout=0.0, autopad=True, backend="flex")
    run = called(layer, inside=True)
    for batch, n in ((3, 256), (4, 300), (5, 513), (3, 384), (3, 1000), (6, 130)):
        q, k, v = (torch.randn(batch, 2, n, size) for size in (16, 16, 24))
        with torch.no_grad():
            out = run(q, k, v).double()
            with never_dense(n):
                run(q, k, v)
        truth = oracle.attend(q, k, v, 40, causal=True)
        torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    report("one layer, 6 shapes, inside a compiled model", graphs())
    assert graphs() <= MOST_GRAPHS


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_twelve_layers_in_one_process(inside):
    """Four over torch's limit, each called by itself or all in one graph."""
    windows = [windows_of(size) for size in range(20, 32)]
    cases = [dataclasses.replace(PLAIN, window=window, lead=(1, 2), d=32) for window in windows]
    layers = [LocalAttention(**case.arguments(), backend="flex").cuda() for case in cases]

    def all_of_them(q, k, v):
        return [layer(q, k, v) for layer in layers]

    run = called(all_of_them, inside)
    for n in (200, 333):
        cases = [dataclasses.replace(case, n=n) for case in cases]
        call = cases[0].tensors(torch.float32)
        ours = call.cuda()
        outs, truths = run(ours.q, ours.k, ours.v), [case.truth(call) for case in cases]
        for out, truth in zip(outs, truths, strict=True):
            torch.testing.assert_close(out.cpu().double(), truth, rtol=1e-4, atol=1e-4)
        # Of all of them at once: they may be one graph, which goes backward once.
        found, true = gradients(sum(outs), ours), gradients(sum(truths), call)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient.cpu(), true[name], rtol=1e-4, atol=1e-4)
        with never_dense(n):
            run(ours.q, ours.k, ours.v)
    report("12 layers, 2 lengths", graphs())
    assert graphs() <= (2 if inside else 2 * len(layers))


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_layer_over_twenty_lengths(dtype, inside):
    case = dataclasses.replace(PLAIN, window=windows_of(56), lead=(1, 2), rotary=True)
    run = called(LocalAttention(**case.arguments(), backend="flex").cuda(), inside)
    lengths = (130, 200, 128, 257, 300, 411, 512, 640, 777, 900)
    lengths += (131, 256, 384, 399, 450, 513, 600, 701, 768, 1024)
    for n in lengths:
        check_fused(dataclasses.replace(case, n=n), dtype, run)
    report(f"one layer, {len(lengths)} lengths, {dtype}", graphs())
    assert graphs() <= MOST_GRAPHS
