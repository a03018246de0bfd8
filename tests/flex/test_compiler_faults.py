"""Faults of torch's compiler on the CPU, made again without what goes around them.

As ``tests/eager/test_torch_faults.py``: a test that fails says that this torch has mended the
fault, and docstrings name tests that fail when the workaround is taken away.
"""

import threading
from functools import partial

import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu
from faults import TORCH, assert_refused, dense_attention, is_close, mended
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch.nn.attention.flex_attention import flex_attention

from flexlocal import LocalAttention, Window
from flexlocal.flex import compile as compiling
from flexlocal.flex.kernel import Blocks, Kernel
from flexlocal.flex.tuning import STOCK
from flexlocal.torch_limits.compiling import inductor, mark_length_dynamic
from flexlocal.torch_limits.sizes import plain_float
from flexlocal.torch_limits.tracing import is_exporting

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def eagerly(function, **options):
    """``function`` as Dynamo traces it."""
    return torch.compile(function, fullgraph=True, backend="eager", **options)


def test_what_is_traced_is_taken_for_an_export():
    """``seen_as_constant`` of ``is_exporting``, torch 2.11: the end of this test."""
    found = eagerly(lambda x: x + torch.compiler.is_exporting())(torch.zeros(()))
    assert found == (TORCH == (2, 11)), mended("seen_as_constant")
    torch.compiler.reset()
    assert eagerly(lambda x: x + is_exporting())(torch.zeros(())) == 0


def test_a_thread_that_runs_meets_another_that_traces():
    """``flex/threads.py``: test_threads, where threads compile."""
    tracing, go_on = threading.Event(), threading.Event()

    class Slow(torch.nn.Module):
        def forward(self, x):
            tracing.set()
            go_on.wait(60)
            return x + 1

    run = eagerly(lambda x: 2 * x)
    run(torch.zeros(3))
    thread = threading.Thread(target=torch.fx.symbolic_trace, args=(Slow(),))
    thread.start()
    tracing.wait(60)
    try:
        if TORCH >= (2, 14):
            run(torch.zeros(3))
        else:
            assert_refused(lambda: run(torch.zeros(3)), "using FX to symbolically", "Gate")
    finally:
        go_on.set()
        thread.join()


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
def test_a_kernel_of_the_cpu_takes_one_size_for_another():
    """Which ``sizes_told_apart`` goes around."""
    q, k, v = torch.randn(3, 2, 4, 96, 64)
    of_keys = torch.randn(2, 96)

    def added(score, batch, head, query, key):
        return score + of_keys[batch, key]

    def check(backend):
        torch.compiler.reset()
        attend = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)
        with torch.no_grad():
            assert is_close(attend(q, k, v, added), dense_attention(q, k, v, score_mod=added))

    with inductor_config.patch(fx_graph_cache=False):  # it may hold a kernel of either
        assert_refused(
            lambda: check("inductor"), "SplitSize.* was not declared", "sizes_told_apart"
        )
        check(inductor)


def test_callables_of_the_same_code_share_a_limit():
    """A code object for each callable in ``flex/own_graph.py``: test_changing_shapes."""

    def make(name):
        return eagerly(lambda x: x + len(name))

    def call_nine():
        for count in range(9):
            make("a" * count)(torch.zeros(3))

    assert_refused(call_nine, "fullgraph", "code objects of their own")


def test_the_backward_pass_is_compiled_at_its_first_call(monkeypatch):
    """``force_non_lazy_backward_lowering`` in ``inductor``, which the end of this test needs."""
    compiled = []

    def uncompiled(graph, inputs, is_backward=False, **options):
        compiled.append("backward" if is_backward else "forward")
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx_inner", uncompiled)
    x = torch.zeros(3, requires_grad=True)
    for backend in (partial(compile_fx.compile_fx, inner_compile=uncompiled), inductor):
        torch.compiler.reset()
        torch.compile(lambda x: x.sin(), backend=backend)(x)
    assert compiled[:2] == ["forward", "forward"], mended("force_non_lazy_backward_lowering")
    assert compiled == ["forward", "forward", "backward"]


def test_a_graph_is_not_retained():
    """``donated_buffer=False`` in ``inductor``: ``test_a_graph_that_is_retained``."""
    x, y = (torch.randn(5, 5, requires_grad=True) for _ in range(2))
    run = torch.compile(lambda x, y: (x @ y).sin().sum(), fullgraph=True, backend="aot_eager")
    torch.autograd.grad(run(x, y), (x, y))
    out = run(x, y)
    assert_refused(
        lambda: torch.autograd.grad(out, (x, y), retain_graph=True), "donated", "donated_buffer"
    )


def test_no_branch_on_a_tensor_is_traced():
    """``stop_unless``, by ``_assert_async``: test_compiled of decoding, where a ring is full."""

    def check(x):
        if not x.all():
            raise ValueError("some are 0")
        return x

    assert_refused(lambda: eagerly(check)(torch.ones(3)), "data-dependent", "stop_unless")


def test_sizes_that_stay_at_first_make_a_graph_more():
    """``mark_length_dynamic`` of block lists, whose lengths are counted in blocks."""
    made = []
    for mark in (lambda x, dim: None, mark_length_dynamic):
        torch.compiler.reset()
        counters.clear()
        run = eagerly(lambda x, blocks: (x + 1, blocks + 1))
        for n in (300, 380, 500):
            blocks = torch.zeros(1, 1, -(-n // 128))
            mark(blocks, 2)
            run(torch.zeros(n), blocks)
        made.append(counters["stats"]["unique_graphs"])
    assert made[1] == 2
    assert made[0] > 2, mended("mark_length_dynamic")
    blocks = Blocks(Window(8), 300, 300, (1, 1), False, False, STOCK)
    lists = compiling._lists(blocks, torch.device("cpu"))
    assert all(2 in x._dynamo_weak_dynamic_indices for x in lists)


@needs_compiled_kernels_on_the_cpu
def test_a_kernel_of_the_cpu_takes_nothing_that_requires_a_gradient():
    """Not even under ``no_grad``, where ``_detached`` goes around it: test_flex_on_cpu."""
    q, k, v = (torch.randn(1, 1, 128, 32, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        assert_refused(
            lambda: torch.compile(flex_attention, fullgraph=True)(q, k, v),
            "not supported on CPU|NotImplementedError",
            "_detached",
        )


@pytest.mark.slow
def test_a_kernel_captures_no_symbolic_float():
    """``plain_float``: the test after this one."""

    def attend(q, k, v, bound, number):
        factor = 1 / number(bound)
        return flex_attention(q, k, v, score_mod=lambda score, *place: score * factor)

    q, k, v = (torch.randn(1, 1, 128, 32) for _ in range(3))
    run = eagerly(attend, dynamic=True)
    run(q, k, v, 0.3, plain_float)
    torch.compiler.reset()
    assert_refused(lambda: run(q, k, v, 0.3, lambda x: x), "SymFloat", "plain_float")


@pytest.mark.slow
@pytest.mark.usefixtures("dense_on_the_cpu")
def test_settings_of_a_dynamic_layer_are_plain():
    layer = LocalAttention(16, dropout=0.3, softcap=0.3, backend="flex")
    q, k, v = (torch.randn(2, 3, 32, 16) for _ in range(3))
    assert eagerly(layer, dynamic=True)(q, k, v).shape == q.shape


@pytest.mark.slow
@pytest.mark.usefixtures("dense_on_the_cpu")
def test_dropouts_backward_pass_captures_no_symbolic_length(monkeypatch):
    """``number_in_memory`` for ``Kernel.last_alone``."""
    looks = {"look_backward": 0, "look_forward": 0}
    layer = LocalAttention(3, shared_qk=True, dropout=0.3, autopad=True, backend="flex", **looks)
    x = [torch.randn(2, 3, 130, 16, requires_grad=True) for _ in range(3)]  # the last token alone
    for each in x:
        torch._dynamo.mark_dynamic(each, 2)

    monkeypatch.setattr(Kernel, "last_alone", False)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_refused(lambda: run(*x), "SymInt|symbolic|proxy|tracing", "number_in_memory")


@needs_compiled_kernels_on_the_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        lambda n: torch.full((), n, dtype=torch.int32),
        lambda n: torch.arange(n, n + 1, dtype=torch.int32).view(()),
    ],
    ids=["constant", "computed"],
)
def test_a_kernel_of_the_cpu_looks_nothing_up_that_is_no_buffer(number):
    """``number_in_memory``, and ``written_out`` in it."""

    def attend(q, k, v, number):
        n = number(q.shape[2])

        def mod(score, batch, head, query, key):
            return torch.where(query == n - 1, score + 1.0 * key, score)

        return flex_attention(q, k, v, score_mod=mod)

    run = torch.compile(attend, fullgraph=True, dynamic=True)
    q, k, v = (torch.randn(1, 2, 130, 32) for _ in range(3))
    with torch.no_grad():
        assert_refused(lambda: run(q, k, v, number), "choices|compile error", "number_in_memory")


@needs_compiled_kernels_on_the_cpu
@pytest.mark.slow
def test_a_kernel_of_the_cpu_reads_keys_past_the_last_of_narrow_heads():
    """``LEAST_HEAD_ON_CPU``: test_flex_on_cpu's ``test_nothing_behind_the_last_key_is_read``."""
    n, d = 40, 8
    k = torch.full((2, 3, n + 8, d), torch.nan)[:, :, :n].normal_()
    q, v = torch.randn(2, 3, n, d), torch.randn(2, 3, n, 24)
    vectors = torch._inductor.config.patch({"cpp.simdlen": 256})  # with AVX-512 it is right
    with torch.no_grad(), vectors:
        found = torch.compile(flex_attention, fullgraph=True)(q, k, v)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    right = is_close(found, truth)
    assert not right, mended("LEAST_HEAD_ON_CPU")
