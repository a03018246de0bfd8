"""The flex path on a GPU: against the oracle over the argument space, and in compiled models.

Every case compiles a kernel or two, so these run best in parallel: `pytest -m gpu -n 8`.
"""

import dataclasses
from functools import partial

import budget
import oracle
import pytest
import torch
from budget import gradients
from features import FEATURES, PLAIN, feature, windows_of
from hypothesis import HealthCheck, Phase, given, seed, settings
from strategies import Call, cases
from torch.nn.attention.flex_attention import flex_attention

from flexlocal import LocalAttention, Rotary, Window, dispatch, local_attention
from flexlocal.masks import block_mask

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]

FEW = settings(
    deadline=None,
    derandomize=False,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
"""Random calls by a seed of their own, none of them tried a second time: each one compiles."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_case(case, dtype):
    layer = LocalAttention(**case.arguments(), backend="flex").cuda()
    budget.check(case, dtype, partial(case.run, layer), Call.cuda)


# Every head size, length and window of the list at least once with every dtype.
HEADS = [8, 16, 32, 64, 80, 96, 128, 192, 256]
VALUES = [24, 8, 16, 32, 48, 80, 96, 128, 192]
LENGTHS = [1, 127, 129, 333, 512, 641, 1000, 1025, 77]
WINDOWS = [5, 16, 33, 64, 100, 128, 256, 257, 512]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("which", range(len(HEADS)))
def test_heads_lengths_and_windows(which, dtype):
    turn = DTYPES.index(dtype)
    n = LENGTHS[(which + turn) % len(LENGTHS)]
    size = WINDOWS[(which + 4 * turn + 2) % len(WINDOWS)]
    causal = (which + turn) % 2 == 0
    rule = windows_of(size, causal=causal, exact=which % 3 == 0)
    case = dataclasses.replace(PLAIN, window=rule, n=n, d=HEADS[which], d_v=VALUES[which])
    check_case(dataclasses.replace(case, rotary=which % 2 == 0), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FEATURES)
def test_arguments(name, dtype):
    check_case(feature(name), dtype)


@pytest.mark.parametrize("start", range(8))
def test_the_whole_argument_space(start):
    @seed(start)
    @settings(FEW, max_examples=4)
    @given(cases())
    def check(case):
        check_case(case, torch.float32)

    check()


@pytest.mark.parametrize("start", range(4))
def test_random_calls_against_upstream(start):
    upstream = pytest.importorskip("local_attention", reason="local-attention is not installed")

    @seed(start)
    @settings(FEW, max_examples=3)
    @given(cases(upstream=True))
    def check(case):
        call = case.tensors(torch.float32).cuda()
        found = []
        for make in (upstream.LocalAttention, LocalAttention):
            out = case.run(make(**case.arguments()).cuda(), call)
            found.append((out, gradients(out, call)))
        (theirs, their_gradients), (ours, our_gradients) = found
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        for name, gradient in our_gradients.items():
            torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-4)

    check()


@pytest.mark.parametrize("name", ["few queries, views", "few queries, mask by head"])
def test_a_decoding_kernel_by_name(name):
    case, options = feature(name), {"BACKEND": "TRITON_DECODE"}
    layer = LocalAttention(**case.arguments(), backend="flex", kernel_options=options).cuda()
    budget.check(case, torch.bfloat16, partial(case.run, layer), Call.cuda)


SOME = ["plain", "mask, a row hidden", "mask, blocks full and empty", "bias and shared"]
SOME += ["shared, mask", "xpos"]
LONG = 349  # with 3 heads more than 1024 numbers, past which inductor may part rows of a table
SHORT = "shared, odd windows both ways"  # which a kernel got wrong
DROPPED = {**{name: feature(name, n=LONG, d_v=40) for name in SOME}, SHORT: feature(SHORT)}


@pytest.mark.parametrize("case", DROPPED.values(), ids=DROPPED)
def test_dropout_drops_what_the_eager_path_drops(case):
    found = []
    for backend in ("flex", "eager"):
        call = case.tensors(torch.float32).cuda()
        layer = LocalAttention(**{**case.arguments(), "dropout": 0.3}, backend=backend).cuda()
        named = {"mask": call.mask, "attn_bias": call.bias}
        drop = torch.tensor(5, device="cuda")
        out = layer(call.q, call.k, call.v, **named, dropout_seed=drop)
        found.append((out, *gradients(out, call).values()))
    for fused, eager in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)


def test_dropout_follows_the_generator():
    q, v = (torch.randn(1, 2, 256, size, device="cuda") for size in (32, 48))
    layer = LocalAttention(64, dropout=0.5, backend="flex")
    outs = []
    for start in (0, 0, 1):
        torch.manual_seed(start)
        outs.append(layer(q, q, v))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(layer.eval()(q, q, v), layer(q, q, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_xpos_over_a_long_sequence(dtype):
    """Finite, and what the eager path computes with an origin for each window."""
    q, k, v = (torch.randn(1, 2, 131072, size, device="cuda", dtype=dtype) for size in (32, 32, 48))
    layer = LocalAttention(
        64, causal=True, dropout=0.0, dim=32, use_xpos=True, backend="flex"
    ).cuda()
    with torch.no_grad():
        fused = layer(q, k, v)
        layer.backend = "eager"
        by_window = layer(q, k, v)
    assert fused.isfinite().all()
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    off = (fused.double() - by_window.double()).norm() / by_window.double().norm()
    assert off < bound


def test_rotary_at_a_million_tokens():
    """A window far out sees the same as the same window at the start."""
    n, size = 2**20, 256
    q, k, v = (torch.randn(1, 2, 2 * size, d, device="cuda") for d in (64, 64, 48))
    far = [torch.zeros(1, 2, n, d, device="cuda") for d in (64, 64, 48)]
    for x, y in zip((q, k, v), far, strict=True):
        y[:, :, -2 * size :] = x
    layer = LocalAttention(size, causal=True, dropout=0.0, dim=64, backend="flex").cuda()
    with torch.no_grad():
        near, distant = layer(q, k, v)[:, :, size:], layer(*far)[:, :, -size:]
    torch.testing.assert_close(near, distant, rtol=1e-5, atol=1e-5)


def test_what_comes_of_transposed_views_lies_as_they_do():
    case = feature("views")
    call = case.tensors(torch.bfloat16).cuda()
    assert not call.q.is_contiguous()
    out = case.run(LocalAttention(**case.arguments(), backend="flex").cuda(), call)
    found = torch.autograd.grad(out, (call.q, call.k, call.v), torch.ones_like(out))
    assert all(x.transpose(1, 2).is_contiguous() for x in (call.q, call.v, out, *found))


@pytest.mark.parametrize("name", ["rotary, exact both ways", "xpos", "mask", "bias", "shared"])
def test_inside_a_compiled_model(name):
    case = feature(name)
    layer = LocalAttention(**case.arguments()).cuda()
    named = {}
    found = []
    for run in (torch.compile(layer, fullgraph=True), layer):
        call = case.tensors(torch.float32).cuda()
        named = {"mask": call.mask, "attn_bias": call.bias}
        out = run(call.q, call.k, call.v, **named)
        found.append((out, *gradients(out, call).values()))
    assert str(layer.explain(call.q)).startswith("flex")
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


def test_a_block_mask_made_inside_a_compiled_function():
    """With a key mask, whose lists the compiler must write out as they are."""
    window, n = Window(64, causal=True, look_backward=3), 1000

    def attend(q, k, v, kept):
        blocks = block_mask(window, n, n, device=q.device, key_mask=kept)
        return flex_attention(q, k, v, block_mask=blocks)

    kept = torch.rand(2, n, device="cuda") > 0.3
    kept[0, 400:] = False  # blocks that are empty
    kept[1, :600] = True  # and full ones
    learned = [torch.randn(2, 3, n, d, device="cuda", requires_grad=True) for d in (32, 32, 48)]
    grad = torch.randn_like(learned[2])
    found = []
    for out in (
        torch.compile(attend, fullgraph=True)(*learned, kept),
        local_attention(*learned, window, mask=kept, backend="eager"),
    ):
        found.append((out, *torch.autograd.grad(out, learned, grad)))
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_autocast_gives_its_dtype():
    q, k, v = (torch.randn(2, 4, 512, size, device="cuda") for size in (64, 64, 48))
    layer = LocalAttention(128, causal=True, dropout=0.0, dim=64).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = layer(q, k, v)
    assert out.dtype == torch.bfloat16
    truth = oracle.attend(q.cpu(), k.cpu(), v.cpu(), 128, causal=True, rotary=True)
    torch.testing.assert_close(out.cpu().double(), truth, rtol=0, atol=3e-2)


def test_a_bias_in_float64():
    case = feature("bias")
    call = case.tensors(torch.float32).cuda()
    layer = LocalAttention(**case.arguments(), backend="flex").cuda()
    found = []
    for bias in (call.bias.detach().double(), call.bias.detach().clone()):
        out = layer(call.q, call.k, call.v, attn_bias=bias.requires_grad_())
        wanted = call.q, call.k, call.v, bias
        found.append([out, *torch.autograd.grad((out * call.cotangent).sum(), wanted)])
    *double, bias_double = found[0]
    *single, bias_single = found[1]
    assert all(torch.equal(x, y) for x, y in zip(double, single, strict=True))
    assert bias_double.dtype == torch.float64
    torch.testing.assert_close(bias_double.float(), bias_single, rtol=1e-4, atol=1e-4)  # atomics


def test_xpos_that_would_overflow_goes_to_the_eager_path(monkeypatch):
    monkeypatch.setattr(dispatch, "_SAID", set())
    layer = LocalAttention(16, True, 8, dim=16, use_xpos=True, dropout=0.0).cuda()
    q, k, v = torch.randn(3, 1, 2, 256, 16, device="cuda", dtype=torch.float16)
    with pytest.warns(UserWarning, match="eager path.*xpos.*overflow torch.float16"):
        out = layer(q, k, v)
    assert out.isfinite().all()
    assert layer.explain(q.bfloat16()).backend == "flex"


def test_float64_goes_to_the_eager_path(monkeypatch):
    monkeypatch.setattr(dispatch, "_SAID", set())
    q, k, v = (
        torch.randn(1, 2, 100, size, device="cuda", dtype=torch.float64) for size in (32, 32, 48)
    )
    layer = LocalAttention(20, dropout=0.0)
    choice = layer.explain(q)
    assert choice.backend == "eager"
    assert "float64" in choice.reason
    with pytest.warns(UserWarning, match="eager path.*float64"):
        found = layer(q, k, v)
    torch.testing.assert_close(found.cpu(), oracle.attend(q.cpu(), k.cpu(), v.cpu(), 20))
    layer(q + 1, k, v)  # said once: a second warning would be an error


@pytest.mark.parametrize("width", [264, 320])
def test_wide_heads_go_to_the_eager_path(width, monkeypatch):
    monkeypatch.setattr(dispatch, "_SAID", set())
    q, k, v = (torch.randn(1, 2, 100, size, device="cuda") for size in (width, width, 48))
    layer = LocalAttention(20, dropout=0.0, autopad=True)
    assert layer.explain(q).reason == "kernels take heads up to 256 wide"
    with pytest.warns(UserWarning, match="eager path.*256 wide"):
        found = layer(q, k, v)
    truth = oracle.attend(q.cpu(), k.cpu(), v.cpu(), 20)
    torch.testing.assert_close(found.cpu().double(), truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("argument", ["none", "rotary", "mask", "attn_bias", "dropout"])
def test_two_backward_passes(argument):
    """The first one writes over nothing that the second one reads, at any length."""
    for n in (384, 500, 640):
        given = {
            "rotary": Rotary(32).cuda(),
            "mask": torch.rand(2, n, device="cuda") > 0.3,
            "attn_bias": torch.randn(3, 64, 128, device="cuda", requires_grad=True),
            "dropout": 0.2,
        }
        more = {name: value for name, value in given.items() if name == argument}
        learned = [torch.randn(2, 3, n, d, device="cuda", requires_grad=True) for d in (32, 32, 48)]
        out = local_attention(*learned, Window(64, causal=True), **more, backend="flex")
        learned += [x for x in more.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        grad = torch.randn_like(out)
        first = torch.autograd.grad(out, learned, grad, retain_graph=True)
        for one, other in zip(first, torch.autograd.grad(out, learned, grad), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # a bias's by atomics


def test_gradients_of_gradients_are_refused():
    layer = LocalAttention(64, True, dropout=0.0, backend="flex").cuda()
    q, k, v = (torch.randn(1, 2, 256, 32, device="cuda", requires_grad=True) for _ in range(3))
    with pytest.raises(RuntimeError, match="no second derivative: create_graph must be False"):
        torch.autograd.grad(layer(q, k, v).sum(), q, create_graph=True)
