"""The eager path against the brute-force oracle: outputs, gradients and precision."""

from dataclasses import asdict, replace

import budget
import oracle
import pytest
import torch
from budget import assert_within_budget, gradients
from eager_cases import CAUSAL, SMALL, WIDE, check_case, dropped, layer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, cases
from strategies import Window as Rule

from flexlocal import LocalAttention, Window, local_attention


@settings(max_examples=3 * EXAMPLES)
@given(cases())
def test_outputs_and_gradients_in_float32(case):
    check_case(case, torch.float32)


@settings(max_examples=EXAMPLES)
@given(cases(long=True))
def test_outputs_and_gradients_of_hundreds_of_tokens(case):
    check_case(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@given(case=cases())
def test_outputs_and_gradients_in_low_precision(case, dtype):
    check_case(case, dtype)


@given(cases())
def test_float64_is_float64_throughout(case):
    """The buffers are float32 always: their values are what a checkpoint means by them."""
    call = case.tensors(torch.float64)
    layer = layer_of(case).double()
    out = case.run(layer, call)
    buffers = {}
    if case.rotary:
        buffers = {"frequencies": layer.rel_pos.inv_freq, "decay": layer.rel_pos.scale}
    truth = case.truth(call, **buffers)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, truth, rtol=1e-9, atol=1e-9)
    ours, exact = gradients(out, call), gradients(truth, call)
    for name in ours:
        size = max(1.0, exact[name].abs().max().item())
        torch.testing.assert_close(ours[name], exact[name], rtol=0, atol=1e-9 * size)


@given(cases(), st.integers(1, 50))
def test_the_function_takes_ragged_lengths(case, n):
    """`local_attention` needs no autopad and no padding: its answer is that of n tokens."""
    case = replace(case, n=n, override=None)

    def attend(call):
        return local_attention(
            call.q,
            call.k,
            call.v,
            Window(**asdict(case.window)),
            mask=call.mask,
            attn_bias=call.bias,
            scale=case.scale,
            shared_qk=case.shared_qk,
            rotary=layer_of(case).rel_pos,
            backend="eager",
        )

    budget.check(case, torch.float32, attend)


def test_the_function_takes_an_int_for_a_window():
    """An int is the window of that size with every other setting at its default."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 23, size, generator=generator) for size in (6, 6, 7))
    ours = local_attention(q, k, v, 5, backend="eager")
    torch.testing.assert_close(ours.double(), oracle.attend(q, k, v, 5), rtol=1e-5, atol=1e-5)


def test_hidden_keys_may_hold_anything():
    """Padding is often uninitialised: a weight of 0 times NaN must not be NaN."""
    case = replace(SMALL, mask_batch=2)
    call = case.tensors(torch.float64)
    hidden = ~call.mask[..., None]
    garbage = replace(
        call,
        k=call.k.detach().masked_fill(hidden, torch.nan).requires_grad_(),
        v=call.v.detach().masked_fill(hidden, torch.inf).requires_grad_(),
    )
    clean, found = (case.run(layer_of(case).double(), x) for x in (call, garbage))
    assert hidden.any()
    torch.testing.assert_close(found, clean)
    expected, found = gradients(clean, call), gradients(found, garbage)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", [9, 2])
def test_a_bias_may_hold_anything_where_the_window_hides_a_key(junk, n):
    """A bias by distance is easily NaN for the keys after a query."""
    case = replace(SMALL, n=n, lead=(6,), autopad=True, window=CAUSAL, bias_heads=2)
    call = case.tensors(torch.float64)
    place, key = torch.arange(3)[:, None], torch.arange(9)
    unseen = (key > place + 6) | (key < place)
    junked = replace(call, bias=call.bias.detach().masked_fill(unseen, junk).requires_grad_())
    layer = layer_of(case).double()
    clean, found = (case.run(layer, x) for x in (call, junked))
    torch.testing.assert_close(found, clean)
    assert torch.equal(
        layer.attention_map(junked.q, junked.k, attn_bias=junked.bias),
        layer.attention_map(call.q, call.k, attn_bias=call.bias),
    )
    expected, found = gradients(clean, call), gradients(found, junked)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    assert not found["bias"][:, unseen].any()


def test_keys_that_one_head_of_a_group_hides_may_hold_anything_for_it():
    """For the heads that keep them they are what they are."""
    case = replace(SMALL, lead=(1, 2), kv_heads=1, mask_batch=2)
    call = case.tensors(torch.float64)
    hides = ~call.mask[0] & call.mask[1]
    assert hides.any()
    k, v = (x.detach().masked_fill(hides[:, None], torch.nan) for x in (call.k, call.v))
    garbage = replace(call, k=k, v=v)
    layer = layer_of(case).double()
    clean, found = (case.run(layer, x)[:, 0] for x in (call, garbage))
    torch.testing.assert_close(found, clean)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotary": True},
        {"rotary": True, "xpos": True},
        {"shared_qk": True, "mask_batch": 2},
        {"window": Rule(2**40, causal=False, look_backward=2, look_forward=1, exact=True)},
    ],
    ids=str,
)
def test_windows_far_longer_than_the_sequence_cost_nothing(changes):
    window = Rule(2**40, causal=True, look_backward=1, look_forward=None, exact=False)
    case = replace(SMALL, **{"window": window, "autopad": True, **changes})
    call = case.tensors(torch.float64)
    layer = layer_of(case).double()
    out = case.run(layer, call)
    frequencies, decay = {}, {}
    if case.rotary:
        frequencies, decay = layer.rel_pos.inv_freq, layer.rel_pos.scale
    # The same keys are seen with a window as long as the sequence.
    near = replace(case, window=replace(case.window, size=64, look_backward=1), base=2.0**39)
    more = {"frequencies": frequencies, "decay": decay} if case.rotary else {}
    torch.testing.assert_close(out, near.truth(call, **more), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "window",
    [
        Rule(8, causal=True, look_backward=80, look_forward=None, exact=False),
        Rule(8, causal=True, look_backward=150, look_forward=None, exact=True),
        Rule(256, causal=True, look_backward=0, look_forward=None, exact=False),  # later keys
    ],
    ids=str,
)
def test_xpos_of_windows_that_reach_beyond_float32(window):
    """Its factors overflow there, and their products do not."""
    case = replace(
        SMALL,
        window=window,
        n=1000,
        lead=(2,),
        d=6,
        autopad=True,
        rotary=True,
        xpos=True,
        base=4 if window.size == 8 else 3.62,
        scale=4.0,
    )
    check_case(case, torch.float32)


def test_xpos_of_windows_that_reach_beyond_float64():
    layer = LocalAttention(8, True, 2000, dim=8, use_xpos=True, dropout=0.0)
    q = torch.zeros(1, 8, 8)
    with pytest.raises(
        ValueError, match="xpos_scale_base of a layer.*must be larger.*16008 tokens.*got 4"
    ):
        layer(q, q, q)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_one_gradient_alone(name):
    """A frozen encoder wants the gradient of its queries, or of its bias, and nothing else."""
    case = replace(SMALL, bias_heads=2)
    call = case.tensors(torch.float64)
    everything = gradients(case.truth(call), call)
    for other, tensor in call.learned().items():
        tensor.requires_grad_(other == name)
    wanted = call.learned()[name]
    out = case.run(layer_of(case).double(), call)
    (found,) = torch.autograd.grad((out * call.cotangent).sum(), [wanted])
    torch.testing.assert_close(found, everything[name])


def test_broadcast_tensors():
    """Views that repeat one head in memory are as good as copies of it."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(15, size, generator=generator, dtype=torch.float64).expand(2, 3, 15, size)
        for size in (4, 4, 7)
    )
    out = local_attention(q, k, v, 5, attn_bias=None, backend="eager")
    torch.testing.assert_close(out, oracle.attend(q, k, v, 5), rtol=1e-9, atol=1e-9)


WIDE_CAUSAL = Rule(size=150, causal=True, look_backward=4, look_forward=None, exact=True)
PORTIONS = {
    "rotary": replace(WIDE, rotary=True),
    "xpos": replace(WIDE, rotary=True, xpos=True, kv_heads=None),
    "bias, two entries": replace(WIDE, lead=(2, 3), kv_heads=1, bias_heads=6),
    "mask, shared_qk, causal": replace(
        WIDE, mask_batch=4, hide_a_row=True, shared_qk=True, window=WIDE_CAUSAL
    ),
    "autopad, exact": replace(
        WIDE, n=1013, autopad=True, window=replace(WIDE.window, exact=True), transposed=True
    ),
}


@pytest.mark.parametrize("name", PORTIONS)
def test_outputs_and_gradients_of_wide_windows(name):
    check_case(PORTIONS[name], torch.float32)


DERIVED = {
    "plain": SMALL,
    "causal exact": replace(SMALL, window=CAUSAL),
    "rotary": replace(SMALL, rotary=True),
    "xpos, autopad": replace(SMALL, rotary=True, xpos=True, base=3, autopad=True, n=7),
    "shared_qk": replace(SMALL, shared_qk=True),
    "bias": replace(SMALL, bias_heads=2),
    "bias, shared_qk, causal": replace(SMALL, bias_heads=1, shared_qk=True, window=CAUSAL),
    "shared_qk, mask": replace(SMALL, shared_qk=True, mask_batch=2),
    "mask with empty queries": replace(SMALL, mask_batch=2, hide_a_row=True),
    "dropout": SMALL,
}


@pytest.mark.parametrize("name", DERIVED)
def test_gradients_of_gradients(name):
    case = DERIVED[name]
    call = case.tensors(torch.float64)
    arguments = {**case.arguments(), "dropout": 0.3 if name == "dropout" else 0.0}
    layer = LocalAttention(**arguments, backend="eager").double()
    seed = torch.tensor(5) if name == "dropout" else None

    def run(q, k, v, bias=None):
        return layer(q, k, v, call.mask, attn_bias=bias, dropout_seed=seed)

    inputs = tuple(call.learned().values())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)

    # The checks above would not see a second order that is consistent with a wrong first one.
    more = {"keep": dropped(case, 0.3, seed) != 0, "dropout": 0.3} if seed is not None else {}
    if case.rotary:
        more = {"frequencies": layer.rel_pos.inv_freq, "decay": layer.rel_pos.scale}
    for ours, exact in zip(
        twice(run(*inputs), call), twice(case.truth(call, **more), call), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-8)


def twice(out, call):
    """Gradients, and the gradients of their squares."""
    named = list(call.learned().values())
    first = torch.autograd.grad((out * call.cotangent).sum(), named, create_graph=True)
    return (*first, *torch.autograd.grad(sum(x.square().sum() for x in first), named))


@pytest.mark.parametrize(
    "name", ["xpos, autopad", "bias, shared_qk, causal", "mask with empty queries"]
)
def test_low_precision_inside_a_compiler(name):
    """Traced whole, the path may run other code than it does alone: dtypes are easily lost."""

    def traced(layer):
        torch.compiler.reset()
        return torch.compile(layer, backend="aot_eager", fullgraph=True)

    check_case(DERIVED[name], torch.bfloat16, traced)


@pytest.mark.parametrize("use_xpos", [False, True], ids=["rotary", "xpos"])
def test_positions_stay_exact_in_a_million_tokens(use_xpos):
    """Only distances count, so the end of a long sequence equals the same tokens on their own."""
    n, W, d, tail = 10**6, 8, 6, 64
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, size, generator=generator) for size in (d, d, 5))
    layer = LocalAttention(W, causal=True, dropout=0.0, dim=d, use_xpos=use_xpos, backend="eager")
    with torch.no_grad():
        out = layer(q, k, v)[-tail + W :]
    cut = (q[-tail:], k[-tail:], v[-tail:])
    options = {"causal": True, "rotary": True, "xpos": use_xpos}
    truth = oracle.attend(*cut, W, **options)[W:]
    plain = oracle.attend(*cut, W, **options, dtype=torch.float32)[W:]
    assert_within_budget(out, plain, truth, torch.float32, "the output")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_decides_the_dtype(dtype):
    case = replace(SMALL, rotary=True)
    call = case.tensors(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = case.run(layer_of(case), call)
    assert out.dtype == dtype
    rough, truth = case.truth(call.to(dtype), dtype), case.truth(call.to(torch.float64))
    assert_within_budget(out, rough, truth, dtype, "the output")


def test_autocast_leaves_float64_alone():
    case = replace(SMALL, rotary=True)
    call = case.tensors(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.run(layer_of(case), call)
    torch.testing.assert_close(out, case.truth(call))


@given(cases())
def test_gradients_that_keep_a_graph_are_the_same_gradients(case):
    """They take another route, all tiles at once."""
    call = case.tensors(torch.float64)
    loss = (case.run(layer_of(case), call) * call.cotangent).sum()
    learned = list(call.learned().values())
    plain = torch.autograd.grad(loss, learned, retain_graph=True)
    graphed = torch.autograd.grad(loss, learned, create_graph=True)
    for one, other in zip(graphed, plain, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("shared_qk", [False, True], ids=["apart", "shared"])
def test_gradients_of_tensors_made_of_each_other(rotary, shared_qk):
    """With a graph of their own they have to stop where the call begins."""
    layer = LocalAttention(
        3, causal=True, dropout=0.0, autopad=True, shared_qk=shared_qk, dim=4 if rotary else None
    )
    x = torch.randn(1, 2, 7, 4, dtype=torch.float64, requires_grad=True)
    for tensors in (lambda x: (x, x, x), lambda x: (x, 2 * x, x.sin()), lambda x: (x, x, 3 * x)):

        def loss(x, tensors=tensors):
            return layer(*tensors(x)).sin().sum()

        (plain,) = torch.autograd.grad(loss(x), x)
        (graphed,) = torch.autograd.grad(loss(x), x, create_graph=True)
        torch.testing.assert_close(graphed, plain)
        torch.testing.assert_close(torch.func.grad(loss)(x), plain)
        assert torch.autograd.gradcheck(loss, x)


def test_gradients_of_sharp_weights():
    """Rounding of the output must not come back multiplied by xpos's factors."""
    options = {"causal": False, "rotary": True, "xpos": True, "base": 2}
    layer = LocalAttention(32, dropout=0.0, dim=8, use_xpos=True, xpos_scale_base=2)
    tensors = [torch.randn(1, 2, 128, size, requires_grad=True) for size in (8, 8, 6)]
    cotangent = torch.randn(1, 2, 128, 6)
    found = torch.autograd.grad(layer(*tensors), tensors, cotangent)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    truth = torch.autograd.grad(oracle.attend(*exact, 32, **options), exact, cotangent.double())
    for one, other in zip(found, truth, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()
