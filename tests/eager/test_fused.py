"""The output by torch's fused kernel for processors: the same numbers, in as little memory."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import placed
import pytest
import rules
import torch
from features import windows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, windows
from torch.fx.experimental.proxy_tensor import make_fx

from flexlocal import LocalAttention, Window, explain, local_attention
from flexlocal.eager import autograd, fused, fused_alike, fused_kernel, fused_tiles


@contextmanager
def taken(least=1, tile=64, most=128, vector=16):
    """The kernel for every call that it can compute, in tiles of so many queries; notes calls."""
    calls, as_it_is = [], fused.output
    numbers = {"_LEAST_TILE": tile, "_MOST_TILE": most, "_VECTOR": vector}
    with ExitStack() as stack:
        stack.enter_context(patch.object(fused, "_MOST_SCORES", 2**60))
        stack.enter_context(patch.object(fused, "_LEAST_PRODUCTS", least))
        for name, value in numbers.items():
            stack.enter_context(patch.object(fused_tiles, name, value))
        noted = lambda *call: calls.append(call) or as_it_is(*call)  # noqa: E731
        stack.enter_context(patch.object(fused, "output", noted))
        yield calls


@st.composite
def plain(draw):
    """Calls that the kernel can compute: any window, mask, documents, offsets and heads."""
    # With two channels a rotated view may have the two of a token apart, and is left to others.
    call = draw(placed.placed().filter(lambda call: not (call.case.rotary and call.case.d == 2)))
    case = replace(
        call.case, d_v=call.case.d, shared_qk=False, xpos=False, base=None, bias_heads=None
    )
    return replace(call, case=case, softcap=None, sink_heads=None)


def by_the_kernel(call, **tiles):
    """Runs ``call``: its output is the kernel's, its log-sum-exps are not."""

    def run(tensors):
        with taken(**tiles) as calls:
            out = call.run(tensors, return_lse=False, backend="eager")
        assert bool(calls) == (out.numel() > 0)
        return out, call.run(tensors, backend="eager")[1]

    return run


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


PADDED = {
    "a row": {"lead": (1, 6), "n": 205},
    "rows, grouped": {"lead": (3, 6), "kv_heads": 2, "n": 205},
    "rows, views": {"lead": (3, 6), "n": 205, "transposed": True},
    "longer than all": {"lead": (3, 6), "n": 53, "window": windows_of(64, causal=False)},
    "both ways": {"lead": (2, 6), "n": 130, "window": windows_of(9, causal=False)},
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_hidden_beside_what_the_window_hides(name):
    """Queries that see nothing but padding among them, as all of a row do."""
    more = PADDED[name]
    more = {"d": 8, "d_v": 8, "mask_batch": more["lead"][0], **more}
    call = placed.case_of("mask, a row hidden", **more)
    gradients, as_it_is = [], fused_alike.gradients

    noted = lambda *given: gradients.append(given) or as_it_is(*given)  # noqa: E731
    with patch.object(fused_alike, "gradients", noted):
        placed.check(call, run=by_the_kernel(call))
    assert gradients


def test_masks_of_padding_are_as_small_as_the_numbers_of_a_call():
    """Some tiles at a time, though all of them see alike."""
    hidden, as_it_is = [], fused_alike._hidden

    def noted(*given):
        found = as_it_is(*given)
        hidden.append(found[0].numel())
        return found

    q, mask = torch.randn(1, 1, 4096, 8), torch.arange(4096)[None] % 3 > 0
    with (
        taken(),
        patch.object(fused_alike, "_hidden", noted),
        patch.object(fused_tiles, "_MOST_NUMBERS", 2**17),
    ):
        local_attention(q, q, q, Window(64, causal=True), mask=mask)
    assert len(hidden) > 3 and max(hidden) <= 2**17


@pytest.mark.parametrize(
    ("n", "window", "calls"),
    [(128, Window.around(64), 1), (129, Window.around(64), 3), (128, Window.sliding(65), 2)],
)
def test_tiles_that_would_all_have_all_keys_are_one(n, window, calls):
    q, made = torch.randn(3, 2, n, 8), []
    noted = lambda *given: made.append(given) or attention(*given)  # noqa: E731
    attention = fused_alike.attention
    with taken(), patch.object(fused_alike, "attention", noted):
        found = local_attention(q, q, q, window)
    assert len(made) == calls
    torch.testing.assert_close(found, local_attention(q, q, q, window, softcap=1e9))


def test_windows_share_masks():
    masks, as_it_is = [], fused_alike.hiding_of
    q = torch.randn(1, 2, 5 * 192, 8)
    hiding = lambda *call: masks.append(1) or as_it_is(*call)  # noqa: E731
    fused_alike._shared_mask.cache_clear()
    with taken(), patch.object(fused_alike, "hiding_of", hiding):
        local_attention(q, q, q, Window(192, causal=True))
        # Two tiles in a window, of which the first of all windows has no other before it.
        assert len(masks) == 4
        local_attention(q, q, q, Window(192, causal=True))  # they are kept
        assert len(masks) == 4


def test_large_masks_are_not_kept():
    q = torch.randn(1, 2, 7 * 64, 8)
    for most, kept in ((64 * 128 - 1, 1), (64 * 128, 2)):  # 64 keys are seen from the first tile
        fused_alike._shared_mask.cache_clear()
        with patch.object(fused_alike, "_MOST_KEPT", most):
            local_attention(q, q, q, Window(64, causal=True))
        assert fused_alike._shared_mask.cache_info().currsize == kept


@pytest.mark.parametrize(
    ("entries", "transposed", "few", "held", "calls"),
    [
        (1, False, True, 6, 3),
        (1, True, True, 6, 3),
        (2, False, True, 6, 3),
        (2, False, True, 4, 4),
        (2, False, False, 6, 4),  # of many numbers: a call for each entry
        (9, False, False, 6, 11),
        (2, True, True, 6, 4),  # no view joins entries with heads: a call for each entry
        (9, True, False, 6, 8),  # of which there are more than tiles
    ],
)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_tiles_that_see_alike_share_calls(entries, transposed, few, held, calls, kv_heads):
    """The first tile, six that see alike, and the last one, which is short."""
    sizes = [(entries, heads, 7 * 64 + 5, 8) for heads in (6, kv_heads, kv_heads)]
    q, k, v = (torch.randn(size) for size in sizes)
    if transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    window = Window(64, causal=True)
    right = local_attention(q, k, v, window, softcap=1e9)
    made, as_it_is = [], fused_alike.attention
    attention = lambda *call: made.append(call) or as_it_is(*call)  # noqa: E731
    tile = 6 * 64 * 8
    with (
        patch.object(fused_alike, "attention", attention),
        patch.object(fused_tiles, "_LEAST_NUMBERS", 6 * tile + few),
        patch.object(fused_tiles, "_MOST_NUMBERS", held * entries * tile),
    ):
        found = local_attention(q, k, v, window)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert len(made) == calls
    assert found.stride() == q.stride()


@settings(max_examples=EXAMPLES)
@given(
    window=windows(),
    n=st.integers(1, 150),
    sizes=st.sampled_from([(1, 2, 2), (3, 6, 2), (2, 3, 1)]),
    transposed=st.booleans(),
    tile=st.sampled_from([3, 8, 64]),
    repays=st.sampled_from([1, 2**60]),
    held=st.sampled_from([1, 1000, 2**21]),
    scores=st.sampled_from([200, 2**20]),
)
def test_gradients_by_the_kernel(window, n, sizes, transposed, tile, repays, held, scores):
    entries, heads, kv_heads = sizes
    rule = Window(window.size, window.causal, window.look_backward, window.ahead, window.exact)
    generator = torch.Generator().manual_seed(n)
    q, k, v, grad = (
        torch.randn(entries, h, n, 8, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    if transposed:
        q, k, v, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    found, calls, as_it_is = [], [], fused_alike.gradients
    gradients = lambda *call: calls.append(call) or as_it_is(*call)  # noqa: E731
    for served in (True, False):
        with ExitStack() as stack:
            stack.enter_context(taken(tile=tile, most=2 * tile, vector=2))
            stack.enter_context(patch.object(fused_alike, "gradients", gradients))
            stack.enter_context(patch.object(fused_tiles, "_LEAST_NUMBERS", repays))
            stack.enter_context(patch.object(fused_tiles, "_MOST_NUMBERS", held))
            stack.enter_context(patch.object(autograd, "_SCORES_ON_CPU", scores))
            if not served:
                stack.enter_context(patch.object(fused, "serves_backward", lambda *_: False))
            out = local_attention(q, k, v, rule, backend="eager")
            found.append(torch.autograd.grad(out, (q, k, v), grad))
        assert len(calls) == 1
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)
        assert ours.stride() == right.stride()


@pytest.mark.parametrize(
    ("dtype", "more", "expected"),
    [
        (torch.float32, {}, True),
        (torch.float32, {"n": 1024, "size": 96}, True),
        (torch.float32, {"n": 1100}, False),
        (torch.float32, {"n": 1100, "size": 128}, True),
        (torch.float32, {"n": 1100, "size": 1200}, True),
        (torch.float32, {"n": 1100, "size": 128, "exact": True}, False),
        (torch.float32, {"n": 1100, "size": 1100, "exact": True}, True),  # it hides nothing
        (torch.float16, {}, False),
        (torch.bfloat16, {}, False),
        (torch.float32, {"softcap": 9.0}, False),
        (torch.float32, {"mask": torch.arange(300)[None] < 200}, True),
        (torch.float32, {"mask": torch.arange(300).expand(8, -1) < 200}, False),  # by head
        (torch.float32, {"documents": torch.arange(300) // 90}, True),  # calls of their own
        (torch.float32, {"documents": torch.arange(300) // 2}, False),
    ],
)
def test_which_gradients_are_the_kernels(dtype, more, expected):
    more = dict(more)
    n, size, exact = (more.pop(x, y) for x, y in (("n", 300), ("size", 64), ("exact", False)))
    window = Window(size, causal=True, exact=exact)
    q = torch.randn(1, 8, n, 64, dtype=dtype, requires_grad=True)
    calls, as_it_is = [], fused_alike.gradients
    gradients = lambda *call: calls.append(call) or as_it_is(*call)  # noqa: E731
    with patch.object(fused_alike, "gradients", gradients):
        local_attention(q, q, q, window, **more).sum().backward()
    assert bool(calls) == expected


def test_tiles_at_offsets_have_masks_of_their_own():
    """Such windows promise no steps, though two tiles may see as many keys before and after."""
    q = torch.randn(1, 2, 101, 8, dtype=torch.float64)
    for size in range(3, 12):
        call = {"window": Window(size, causal=True), "q_offset": 1, "kv_offset": 1}
        right = local_attention(q, q, q, **call, softcap=1e9)
        with taken(tile=7, most=8) as calls:
            found = local_attention(q, q, q, **call)
        assert calls
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


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
