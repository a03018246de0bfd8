"""One compiled model, called with other shapes: batch sizes, lengths, heads and head sizes.

torch compiles again for sizes that it is to leave open. Masks and functions of a score may capture
them, as they are or in sums, which kernels and gradients take in few forms.
"""

import dataclasses
import math
from functools import partial

import budget
import oracle
import pytest
import torch
from budget import gradients
from compilers import needs_compiled_kernels_on_the_cpu
from features import PLAIN, windows_of
from sympy import sympify

from flexlocal import LocalAttention, Window, local_attention

pytestmark = pytest.mark.usefixtures("fresh_compiler", "no_limit_is_hit")

FAR = {"rotary": True, "xpos": True, "base": 2.0}  # so many windows that keys lie in segments
ALONE = windows_of(16, causal=False, exact=True, look_backward=0)  # a last token sees only itself
KINDS = {
    "plain": {},
    "mask": {"mask_batch": 2},
    "bias": {"bias_heads": 2},
    "rows, bias": {"lead": (4,), "bias_heads": 2},
    "rows, mask": {"lead": (4,), "mask_batch": 4},
    "shared": {"shared_qk": True, "window": ALONE},
    "xpos": {**FAR, "window": windows_of(4, causal=False)},
    "xpos, causal": {**FAR, "window": windows_of(4)},
    "xpos, mask, bias, shared": {
        **FAR,
        "window": windows_of(4, causal=False),
        "mask_batch": 2,
        "bias_heads": 2,
        "shared_qk": True,
    },
}


def calls(name):
    """Two of another batch size and length, and one of other heads and another head size."""
    small = {"window": windows_of(18), "lead": (2, 3), "n": 100, "d": 16, "d_v": 24}
    case = dataclasses.replace(PLAIN, **{**small, **KINDS[name]})
    more = dataclasses.replace(case, n=158, lead=(3 * case.lead[0], *case.lead[1:]))
    wider = dataclasses.replace(more, n=130, lead=(*more.lead[:1], *[5] * len(more.lead[1:])))
    # A layer with a rotation is made for one head size.
    return case, more, wider if case.rotary else dataclasses.replace(wider, d=32)


class OfPairs(torch.nn.Module):
    """A layer over tokens that come in pairs, so that no size is the length by itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, q, k, v, **named):
        return self.layer(*(x.flatten(-3, -2) for x in (q, k, v)), **named)


def in_pairs(model):
    def layer(q, k, v, **named):
        return model(*(x.unflatten(-2, (-1, 2)) for x in (q, k, v)), **named)

    return layer


def compiled(case, dropout, **options):
    """A layer, and a model around it."""
    arguments = {**case.arguments(), "dropout": dropout}
    layer = LocalAttention(**arguments, backend="flex")
    return layer, in_pairs(torch.compile(OfPairs(layer), fullgraph=True, **options))


def on_gpu(x):
    return x.cuda()


def check_cases(cases):
    layer, run = compiled(cases[0], 0.0)
    layer.cuda()
    for case in cases:
        budget.check(case, torch.float32, partial(case.run, run), on_gpu)


def check_dropout(name, moved=lambda x: x, **options):
    """The same weights are dropped as on the eager path."""
    cases = calls(name)[:2]
    layer, run = compiled(cases[0], 0.3, **options)
    eager = LocalAttention(**{**cases[0].arguments(), "dropout": 0.3}, backend="eager")
    moved(layer)
    moved(eager)
    for case in cases:
        found = []
        for attend in (run, eager):
            call = moved(case.tensors(torch.float32))
            seeded = partial(attend, dropout_seed=moved(torch.tensor(5)))
            out = case.run(seeded, call)
            found.append((out, *gradients(out, call).values()))
        for ours, eagers in zip(*found, strict=True):
            torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-4)


def check_inference(cases, **options):
    """On the CPU, in its kernels unless ``backend`` says otherwise."""
    _, run = compiled(cases[0], 0.0, **options)
    for case in cases:
        call = case.tensors(torch.float32)
        truth, rough = case.truth(call.to(torch.float64)), case.truth(call, torch.float32)
        with torch.no_grad():
            out = case.run(run, call)
        budget.assert_within_budget(out, rough, truth, torch.float32, "the output")


@pytest.mark.usefixtures("dense_on_the_cpu")
@pytest.mark.slow
def test_dropout():
    check_dropout("xpos", backend="aot_eager")


def of_other_windows():
    """Two layers' calls: torch takes the sizes of the second one's bias for open."""
    case, *_ = calls("bias")
    return case, dataclasses.replace(case, window=windows_of(20))


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
def test_layers_of_other_windows():
    for case in of_other_windows():
        check_inference([case], backend=as_kernels_take)


def of_masks_by_head():
    case, *_ = calls("plain")
    return [dataclasses.replace(case, lead=(b, 2), mask_batch=2 * b) for b in (3, 4)]


def steps_of(shape):
    """The strides of a contiguous tensor."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def as_kernels_take(graph, inputs):
    """A backend for torch.compile that runs the graph, whose kernels meet sizes that they take.

    They capture no sum of sizes, nor what lies otherwise than its sizes say, and heads are numbers.
    """
    for node in graph.graph.nodes:
        if node.target is torch.ops.higher_order.flex_attention:
            captured = [x.meta["example_value"] for x in (*node.args[-2], *node.args[-1])]
            sizes = [x.node.expr for x in captured if isinstance(x, torch.SymInt)]
            assert all(size.is_Symbol for size in sizes), sizes
            for x in (x for x in captured if isinstance(x, torch.Tensor)):
                shape, strides = map(sympify, x.shape), map(sympify, x.stride())
                assert [*strides] == steps_of([*shape])
            heads = [x.meta["example_value"].shape[1] for x in node.args[:3]]
            assert all(sympify(size).is_Integer for size in heads), heads
    return graph.forward


OF_KERNELS = ["rows, bias", "rows, mask", "shared", "xpos, mask, bias, shared", "mask by head"]
"""What other kinds do is done by these."""


@needs_compiled_kernels_on_the_cpu
@pytest.mark.slow
@pytest.mark.parametrize("name", OF_KERNELS)
def test_kernels_meet_sizes_that_they_take(name):
    """On the GPU they refuse others."""
    cases = calls(name) if name in KINDS else of_masks_by_head()
    check_inference(cases, backend=as_kernels_take)


@pytest.mark.gpu
def test_masks_by_head_on_a_gpu():
    check_cases(of_masks_by_head())


def check_windows(path, given, moved=lambda x: x, **options):
    """The window as an argument of what is compiled, which takes its numbers for open."""

    @partial(torch.compile, fullgraph=True, **options)
    def attend(q, k, v, window):
        return local_attention(q, k, v, window, backend=path)

    for window in given:
        rule = Window(window) if isinstance(window, int) else window
        q, k, v = (torch.randn(2, 3, 96, size) for size in (20, 20, 24))
        with torch.no_grad():
            out = attend(moved(q), moved(k), moved(v), window)
        look = {"causal": rule.causal, "look_backward": rule.look_backward}
        truth = oracle.attend(q, k, v, rule.size, **look)
        torch.testing.assert_close(out.cpu().double(), truth, rtol=1e-5, atol=1e-5)


WINDOWS = {
    "sizes": (8, 16, 12),
    "windows": (Window(8, causal=True), Window(16, causal=True), Window(12, True, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("given", WINDOWS.values(), ids=WINDOWS)
def test_windows_of_the_eager_path(given):
    check_windows("eager", given)


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
def test_windows_of_kernels():
    check_windows("flex", WINDOWS["sizes"][:2], backend=as_kernels_take)


@pytest.mark.gpu
@pytest.mark.parametrize("given", WINDOWS.values(), ids=WINDOWS)
def test_windows_on_a_gpu(given):
    check_windows("flex", given, on_gpu)


@pytest.mark.gpu
def test_layers_of_other_windows_on_a_gpu():
    for case in of_other_windows():
        check_cases([case])


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_training_on_a_gpu(name):
    check_cases(calls(name))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_dropout_on_a_gpu(name):
    check_dropout(name, on_gpu)
