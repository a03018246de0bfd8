"""One test for each row of the specification's table "Where this differs from upstream"."""

import inspect

import oracle
import pytest
import torch

from flexlocal import LocalAttention

upstream = pytest.importorskip("local_attention")


def tokens(*shape, seed=0, dtype=torch.float32):
    """q, k and v, whose heads are one channel wider."""
    generator = torch.Generator().manual_seed(seed)
    *lead, d = shape
    return [torch.randn(*lead, size, generator=generator).to(dtype) for size in (d, d, d + 1)]


def weights(layer, n, d=6, **arguments):
    """(n, n) attention weights, read off values that are a unit per key."""
    q, k, _ = tokens(n, d)
    return layer(q, k, torch.eye(n), **arguments)


def pair(*positional, **named):
    """upstream's layer and ours, of the same arguments."""
    named = {"dropout": 0.0, **named}
    return (
        upstream.LocalAttention(*positional, **named),
        LocalAttention(*positional, **named, backend="eager"),
    )


def test_autopad_padding_is_never_seen():
    """Seven tokens in windows of five: upstream's last queries give weight to three zero keys."""
    n, W = 7, 5
    theirs, ours = pair(W, autopad=True)
    q, k, _ = tokens(n, 6)
    padded_q, padded_k = (torch.cat((x, torch.zeros(3, 6))) for x in (q, k))
    assert (weights(theirs, n).sum(-1) < 0.999).any()
    expected = oracle.weights(padded_q, padded_k, W)[:n, :n]  # the padding taken for tokens
    torch.testing.assert_close(weights(theirs, n).double(), expected, rtol=1e-5, atol=1e-6)

    torch.testing.assert_close(weights(ours, n).sum(-1), torch.ones(n))
    expected = oracle.weights(q, k, W)
    torch.testing.assert_close(weights(ours, n).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared_qk", [False, True])
def test_a_query_that_sees_nothing_is_zero(shared_qk):
    n, W = 12, 4
    mask = torch.ones(1, n, dtype=torch.bool)
    mask[0, :9] = False  # the first window sees two windows, both hidden
    theirs, ours = pair(W, shared_qk=shared_qk)
    q, k, v = (x.requires_grad_() for x in tokens(1, n, 6))

    # upstream: a plain mean over all 3 * W slots; the W before the start hold the padding -1
    average = (v[:, : 2 * W].sum(1) - W) / (3 * W)
    torch.testing.assert_close(theirs(q, k, v, mask)[:, 0], average)

    out = ours(q, k, v, mask)
    assert torch.equal(out[:, :W], torch.zeros(1, W, 7))
    found = torch.autograd.grad(out[:, :W].sum(), (q, k, v))
    for gradient in found:
        assert torch.equal(gradient, torch.zeros_like(gradient))
    # and they leave the gradients of the others alone
    for gradient in torch.autograd.grad(ours(q, k, v, mask).square().sum(), (q, k, v)):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0 or shared_qk


@pytest.mark.parametrize("causal", [False, True])
def test_an_override_counts_in_exact_windows(causal):
    n, W, wide = 24, 4, 6
    theirs, ours = pair(
        W, causal=causal, exact_windowsize=True, dim=10, use_xpos=True, xpos_scale_base=8
    )
    options = {"causal": causal, "exact": True}
    promised = oracle.dense_mask(n, wide, **options)
    assert torch.equal(weights(ours, n, d=10, window_size=wide) > 0, promised)

    seen = weights(theirs, n, d=10, window_size=wide) > 0
    assert not torch.equal(seen, promised)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    limit = (j >= i - W) & ((j <= i) if causal else (j <= i + W))  # the constructor's size
    windows = oracle.dense_mask(n, wide, causal=causal)
    assert torch.equal(seen, windows & limit)


def test_an_override_counts_in_autopad():
    """Ten tokens in windows of four are padded to 12, which windows of five do not divide."""
    n, W, wide = 11, 4, 5
    theirs, ours = pair(W, causal=True, autopad=True, dim=6, use_xpos=True)
    with pytest.raises(AssertionError, match="sequence length 12"):
        weights(theirs, n, window_size=wide)
    q, k, _ = tokens(n, 6)
    truth = oracle.weights(q, k, W, causal=True, rotary=True, xpos=True, override=wide)
    found = weights(ours, n, window_size=wide)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("cast_layer", [False, True])
def test_rotary_works_in_low_precision(dtype, cast_layer):
    theirs, ours = pair(5, dim=6)
    q, k, v = tokens(2, 35, 6, dtype=dtype)
    with pytest.raises(RuntimeError, match="dtype"):
        theirs(q, k, v)
    if cast_layer:
        ours = ours.to(dtype)
    out = ours(q, k, v)
    assert out.dtype == dtype
    truth = oracle.attend(q, k, v, 5, rotary=True)
    plain = oracle.attend(q, k, v, 5, rotary=True, dtype=dtype)
    allowed = 3 * (plain - truth).abs().max() + torch.finfo(dtype).eps
    assert (out.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rotation_is_rounded_once(dtype):
    """Turned in float32, then rounded: a rotation in the low dtype itself errs 2.5 times as much.

    Measured as the mean error over many outputs, against what rounding them costs anyway.
    """
    n, W = 130, 5
    _, ours = pair(W, dim=10)
    q, k, v = tokens(6, n, 10, dtype=dtype)
    position = torch.arange(n)
    turned_q = oracle.rotate(q.double(), position + W).to(dtype)
    turned_k = oracle.rotate(k.double(), position).to(dtype)
    truth = oracle.attend(turned_q, turned_k, v, W)
    rounding = (truth.to(dtype).double() - truth).norm()
    assert (ours(q, k, v).double() - truth).norm() < 1.5 * rounding


LONG = {"n": 2**14, "W": 32, "d": 10}  # 1024 default bases long: z ** 1024 is nothing in fp32


def long_xpos():
    theirs, ours = pair(LONG["W"], causal=True, dim=LONG["d"], use_xpos=True)
    return theirs, ours, tokens(LONG["n"], LONG["d"], seed=5)


def test_xpos_at_any_length():
    theirs, ours, (q, k, v) = long_xpos()
    with torch.no_grad():
        torch.testing.assert_close(ours(q, k, v), theirs(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_xpos_at_any_length_in_low_precision(dtype):
    theirs, ours, tensors = long_xpos()
    q, k, v = (x.to(dtype) for x in tensors)
    with torch.no_grad():
        out = ours(q, k, v).double()
        truth = theirs(q.float(), k.float(), v.float()).double()
    assert out.isfinite().all()
    # what the dtype costs, measured on eight windows; everywhere else must be as good
    W, cut = LONG["W"], slice(0, 8 * LONG["W"])
    options = {"causal": True, "rotary": True, "xpos": True}
    plain = oracle.attend(q[cut], k[cut], v[cut], W, **options, dtype=dtype)
    cost = (plain.double() - truth[cut]).norm() / truth[cut].norm()
    for start in range(0, LONG["n"], 8 * W):
        cut = slice(start, start + 8 * W)
        assert (out[cut] - truth[cut]).norm() / truth[cut].norm() <= 2 * cost


def test_dropout_is_on_unless_told_otherwise():
    default = inspect.signature(upstream.LocalAttention).parameters["dropout"].default
    assert default == 0.0
    assert inspect.signature(LocalAttention).parameters["dropout"].default == 0.1
    layer = LocalAttention(64, look_backward=0, look_forward=0, backend="eager")
    found = weights(layer, 64 * 4)
    seen = oracle.dense_mask(64 * 4, 64, b=0, f=0)
    assert abs((found[seen] == 0).double().mean().item() - 0.1) < 0.015
    assert (weights(layer.eval(), 64 * 4)[seen] > 0).all()


def test_wrong_arguments_say_why():
    """test_errors.py has the whole list."""
    theirs, ours = pair(4)
    with pytest.raises(AssertionError):
        weights(theirs, 10)
    with pytest.raises(ValueError, match="10"):
        weights(ours, 10)
    with pytest.raises(AssertionError):
        upstream.LocalAttention(4, causal=True, look_forward=1)
    with pytest.raises(ValueError, match="look_forward"):
        LocalAttention(4, causal=True, look_forward=1)
