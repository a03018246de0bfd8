"""The output by torch's fused kernel for processors: the same numbers, in as little memory."""

from dataclasses import replace
from unittest.mock import patch

import placed
import pytest
import rules
import torch
from features import windows_of
from fused_calls import by_the_kernel, taken
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, windows
from torch.fx.experimental.proxy_tensor import make_fx

from flexlocal import LocalAttention, Window, explain, local_attention
from flexlocal.eager import autograd, fused, fused_alike, fused_kernel


@st.composite
def plain(draw):
    """Calls that the kernel can compute: any window, mask, documents, offsets and heads."""
    # With two channels a rotated view may have the two of a token apart, and is left to others.
    call = draw(placed.placed().filter(lambda call: not (call.case.rotary and call.case.d == 2)))
    case = replace(
        call.case, d_v=call.case.d, shared_qk=False, xpos=False, base=None, bias_heads=None
    )
    return replace(call, case=case, softcap=None, sink_heads=None)


@settings(max_examples=EXAMPLES)
@given(call=plain(), tile=st.sampled_from([3, 8, 64]), scores=st.sampled_from([1, 200, 2**20]))
def test_outputs_and_gradients(call, tile, scores):
    run = by_the_kernel(call, tile=tile, most=2 * tile, vector=2)
    with patch.object(autograd, "_SCORES_ON_CPU", scores):
        placed.check(call, run=run)


@pytest.mark.parametrize(
    "rule", [rules.WiderByHead(3, 6), rules.WindowOfEachEntry(torch.tensor([4, 90]), 90)]
)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_rules_that_differ_by_head_or_entry(rule, kv_heads):
    q = torch.randn(2, 6, 205, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, 205, 8, dtype=torch.float64)
    right = local_attention(q, k, v, rule, softcap=1e9)  # which the kernel does not know
    with taken() as calls:
        torch.testing.assert_close(local_attention(q, k, v, rule), right, rtol=1e-9, atol=1e-9)
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [Window(48, causal=True), Window.sliding(200)])
def test_errors_are_those_of_products_in_fp32_times_a_little(dtype, window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 517, 32, generator=generator).to(dtype) for _ in range(3))
    truth = local_attention(q.double(), k.double(), v.double(), window)
    fused_error = (local_attention(q, k, v, window).double() - truth).norm()
    with patch.object(fused, "serves", lambda *_: False):
        error = (local_attention(q, k, v, window).double() - truth).norm()
    assert fused_error <= 1.5 * error
    assert fused_error != error


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("size", "more"),
    [
        (32, {}),
        (301, {}),  # which hides nothing
        (32, {"mask": torch.arange(300)[None] < 200}),
        (32, {"documents": torch.arange(300) // 90}),
    ],
)
def test_fp16_is_multiplied_in_fp32_where_a_processor_does_not_multiply_it(native, size, more):
    q, k, v = torch.randn(3, 2, 3, 300, 16).half()
    kernel = patch.object(fused_kernel, "flash_on_cpu", wraps=fused_kernel.flash_on_cpu)
    window = Window(size, causal=True)
    with patch.object(fused_kernel, "multiplies_float16", lambda: native), taken(), kernel as given:
        found = local_attention(q, k, v, window, **more)
        wide = local_attention(q.float(), k.float(), v.float(), window, **more)
    first, *_, last = (call.args[0].dtype for call in given.call_args_list)
    assert (first, last) == (torch.float16 if native else torch.float32, torch.float32)
    assert found.dtype == torch.float16
    assert torch.equal(found, wide.half()) != native


def test_a_mask_is_as_small_as_a_portion():
    masks, as_it_is = [], fused_alike.hiding_of

    def hiding(*call):
        found = as_it_is(*call)
        masks.append(found.numel())
        return found

    q, k = torch.randn(2, 4, 600, 8), torch.randn(2, 2, 600, 8)
    with taken(), patch.object(fused_alike, "hiding_of", hiding):
        local_attention(q, k, k, Window(200, causal=True))
        assert max(masks) > 100 * 300
        masks.clear()
        with patch.object(autograd, "_SCORES_ON_CPU", 2**15):
            local_attention(q, k, k, Window(200, causal=True))
        assert 2**14 < max(masks) <= 2**15


@given(windows(), st.integers(1, 60))
def test_what_hides_nothing(window, n):
    rule = Window(window.size, window.causal, window.look_backward, window.ahead, window.exact)
    everything = torch.ones(n, n, dtype=torch.bool)
    wanted = everything.tril() if window.causal else everything
    assert fused_alike.hides_nothing(rule, n) == torch.equal(window.mask(n), wanted)


def test_what_hides_nothing_has_no_mask():
    q, k = torch.randn(2, 6, 97, 8), torch.randn(2, 2, 97, 8)
    for window in (Window(50, causal=True), Window(97), Window.sliding(97), Window.around(96)):
        with taken() as calls, patch.object(fused_alike, "hiding_of", side_effect=AssertionError):
            found = local_attention(q, k, k, window)
        assert calls
        right = local_attention(q, k, k, window, softcap=1e9)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize(
    "window", [windows_of(50), windows_of(52, exact=True), windows_of(53, causal=False)]
)
def test_what_hides_nothing_is_right_with_any_scale(window, scale):
    call = placed.case_of(window=window, n=53, d=8, d_v=8, scale=scale)

    placed.check(call, run=by_the_kernel(call))


@pytest.mark.slow
def test_a_compiled_model_and_second_derivatives_agree():
    layer = LocalAttention(24, causal=True, autopad=True, dropout=0.0, dim=8)
    x = torch.randn(2, 3, 101, 8, dtype=torch.float64, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with taken() as calls:
        out = layer(x, x, x)
        assert torch.equal(compiled(x, x, x), out)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        assert len(calls) == 2
        (inside,) = torch.autograd.grad(compiled(x, x, x).square().sum(), x)
        (outside,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        assert torch.equal(inside, outside)
        assert torch.autograd.gradcheck(lambda x: layer(x, x, x), x[:1, :1, :30], fast_mode=True)
    out = layer(x, x, x)
    (true,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    torch.testing.assert_close(grad, true)
    (second,), (true,) = (torch.autograd.grad(y.square().sum(), x) for y in (grad, true))
    torch.testing.assert_close(second, true)


@pytest.mark.parametrize("documents", [None, torch.arange(150) // 4])
def test_it_runs_in_modes_that_know_no_numbers(documents):
    q = torch.randn(1, 2, 150, 8)

    def attend(q, documents):
        return local_attention(q, q, q, Window(7), documents=documents)

    with taken() as calls:
        right = attend(q, documents)
        with torch.device("meta"):
            torch.testing.assert_close(attend(q, documents), right)
        assert len(calls) == 2
        graph = make_fx(attend, tracing_mode="fake")(q, documents)
        torch.testing.assert_close(graph(q, documents), right)


def test_numbers_that_are_not_side_by_side_are_left_to_others():
    q = torch.randn(1, 2, 8, 90).transpose(2, 3)
    with taken() as calls:
        found = local_attention(q, q, q, Window(7, causal=True))
        assert not calls
        torch.testing.assert_close(
            found, local_attention(*[q.contiguous()] * 3, Window(7, causal=True))
        )
        assert calls


SAYS = "scaled_dot_product_attention computes its tiles"


@pytest.mark.parametrize(
    ("n", "heads", "more", "expected"),
    [
        (512, 2, {}, True),
        (70, 2, {}, True),  # the window hides nothing
        (70, 2, {"mask": torch.arange(70)[None] < 60}, True),
        (70, 2, {"mask": torch.arange(70).expand(2, -1) < 60}, False),  # by head
        (260, 1, {}, True),
        (260, 1, {"documents": torch.arange(260) // 90}, True),
        (260, 1, {"documents": torch.arange(260) // 3}, False),
        (512, 2, {"softcap": 3.0}, False),
        (512, 8, {"mask": torch.arange(512)[None] < 400}, True),
        (512, 8, {"documents": torch.arange(512) // 200}, True),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_explain_says_so(n, heads, more, expected, backend):
    q = torch.randn(1, heads, n, 64)
    with taken(least=fused._LEAST_PRODUCTS) as calls:
        local_attention(q, q, q, Window(128, causal=True), backend=backend, **more)
    assert bool(calls) == expected
    choice = explain(q, q, q, Window(128, causal=True), backend=backend, **more)
    assert choice.backend == "eager"
    assert (SAYS in choice.reason) == expected
