"""Calls too large for one launch, computed in parts: on the CPU with limits that are small."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlocal import LocalAttention, Rotary, Window, explain, local_attention
from flexlocal.eager import attend as eager
from flexlocal.flex import split
from flexlocal.flex.split import Limits, in_parts, parts_of
from flexlocal.mods.dropout import key_draws, query_draws, seed_from_row
from flexlocal.shapes import shaped
from flexlocal.spec import Inputs, Spec, resolved


@pytest.fixture
def small(monkeypatch):
    """From a number of batch entries and of elements to limits of every device."""
    return lambda *most: monkeypatch.setattr(split, "limits", lambda device: Limits(*most))


def test_the_true_limits():
    assert split.limits(torch.device("cuda")) == (65535, 2**31 - 1)
    assert split.limits(torch.device("cpu")) is None


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_a_part_draws_what_its_rows_draw(seed, first):
    first, seed = first % 1000, torch.tensor(seed)
    part = seed_from_row(seed, first)
    for draws in (query_draws, key_draws):
        assert torch.equal(draws(part, 3, 7), draws(seed, first + 3, 7)[first:])


@st.composite
def calls(draw):
    b, group, kv = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    h, n, d, d_v = group * kv, 11, 4, 3
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    by_token = draw(st.booleans())

    def heads(count, size):
        return drawn(b, n, count, size).transpose(1, 2) if by_token else drawn(b, count, n, size)

    divisors = [x for x in range(1, b * h + 1) if b * h % x == 0]
    some = {
        "mask": torch.rand(draw(st.sampled_from(divisors)), n, generator=generator) < 0.7,
        "bias": drawn(draw(st.sampled_from(divisors)), 4, 8),
        "sinks": drawn(draw(st.sampled_from(divisors))),
        "documents": torch.randint(3, (draw(st.sampled_from([1, b])), n), generator=generator),
    }
    offset = torch.randint(5, (b,), generator=generator)
    if draw(st.booleans()):
        some |= {"q_offset": offset, "kv_offset": offset if draw(st.booleans()) else offset + 1}
    given = {name: x for name, x in some.items() if draw(st.booleans()) or "offset" in name}
    inputs = Inputs(heads(h, d), heads(kv, d), heads(kv, d_v), seed=torch.tensor(7), **given)
    return inputs, draw(st.integers(1, 3)), draw(st.integers(16 * n, 16 * n * (b * h + 1)))


@settings(max_examples=25)
@given(calls())
def test_parts_together_are_the_whole(call):
    inputs, grid, elements = call
    spec = resolved(Spec(Window(4, causal=True), dropout=0.3, return_lse=True), inputs)
    learned = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    whole = eager.attend(spec, shaped(inputs))
    sizes = []

    def run_of(part):
        sizes.append(part)
        return partial(eager.attend, spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "limits", lambda device: Limits(grid, elements))
        parts = parts_of(spec, shaped(inputs))
        if parts is None:
            assert inputs.q.shape[0] <= grid
            return
        found = in_parts(parts, shaped(inputs), run_of)
    group = inputs.q.shape[-3] // inputs.k.shape[-3]
    for part in sizes:
        b, h, n, _ = part.q.shape
        assert b <= grid and (h <= grid and b * h * n * 16 <= elements or h == group)
        assert h in (part.k.shape[1], part.k.shape[1] * group)
        assert all(split._extent(x) <= max(elements, x.numel()) for x in part[:3])
    grads = []
    for out, lse in (whole, found):
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0.0).square().sum()
        grads.append((out, lse, *torch.autograd.grad(loss, learned)))
    for ours, true in zip(*grads, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)


def test_no_gradient_is_as_large_as_the_whole_for_each_part(small):
    """Slices would make one; and the gradient that a part reads lies in memory of its own."""
    small(65535, 16 * 100)
    q = torch.randn(1, 100, 6, 16, requires_grad=True)
    spec, seen = Spec(Window(8, causal=True), scale=0.25), []

    def run(part):
        out = part.q * 2
        out.register_hook(lambda grad: seen.append((grad.shape, grad.stride())))
        return out

    inputs = Inputs(*[q.transpose(1, 2)] * 3)
    parts = parts_of(spec, inputs)
    assert parts == (1, 1)
    out = in_parts(parts, inputs, lambda part: run)
    (out.transpose(1, 2) * torch.randn(1, 100, 6, 16)).sum().backward()
    assert seen == [((1, 1, 100, 16), (1600, 1600, 16, 1))] * 6


def test_heads_of_one_entry_have_strides_that_a_kernel_can_count(small):
    """The stride of the entry is that of the whole, and kernels are given it."""
    small(65535, 3 * 16 * 100)
    q, sizes = torch.randn(1, 6, 100, 16), []

    def run(part):
        sizes.append((part.q.shape, part.q.stride(0) <= 3 * 16 * 100, part.q._base is not None))
        return part.q

    in_parts(parts_of(Spec(Window(8)), Inputs(q, q, q)), Inputs(q, q, q), lambda part: run)
    assert sizes == [((1, 3, 100, 16), True, True)] * 2  # views: no copy is needed


def test_what_cannot_be_split_is_refused_by_name(small):
    small(4, 1000)
    q = torch.randn(1, 2, 100, 16)
    assert "a head of this call has 1600" in split.refusal(Spec(Window(8)), Inputs(q, q, q))
    small(65535, 10_000)
    bias = torch.randn(2, 64, 128)
    said = split.refusal(Spec(Window(64, causal=True)), Inputs(q, q, q, bias=bias))
    assert "attn_bias has 16384" in said


@pytest.mark.slow
@pytest.mark.usefixtures("dense_on_the_cpu", "fresh_compiler")
def test_in_a_compiled_model(small):
    small(3, 2**31)
    layer = LocalAttention(8, causal=True, dropout=0.3, backend="flex")
    run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    q, k, v = (torch.randn(5, 2, 32, 16, requires_grad=True) for _ in range(3))
    mask = torch.arange(32) < torch.tensor([[20], [32], [9], [30], [1]])
    seed, runs = torch.tensor(3), []
    for attend in (run, layer):
        out = attend(q, k, v, mask=mask, dropout_seed=seed)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        layer.backend = "eager"
    for ours, true in zip(*runs, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)


# On a GPU, at the true limits.


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(70000, 2, 48, 16), (140000, 48, 16)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_many_batch_entries(shape, dropout):
    q, k, v = (torch.randn(shape, device="cuda", requires_grad=True) for _ in range(3))
    seed, window = torch.tensor(3, device="cuda"), Window(16, causal=True)
    assert explain(q, k, v, window).backend == "flex"
    runs = []
    for backend in ("flex", "eager"):
        out = local_attention(q, k, v, window, dropout=dropout, dropout_seed=seed, backend=backend)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, true in zip(*runs, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_many_heads():
    """Rows that share a mask are heads."""
    q, k, v = (torch.randn(70000, 48, 16, device="cuda", requires_grad=True) for _ in range(3))
    mask, window = torch.arange(48, device="cuda")[None] < 40, Window(16, causal=True)
    runs = []
    for backend in ("flex", "eager"):
        out = local_attention(q, k, v, window, mask=mask, backend=backend)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, true in zip(*runs, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("view", [True, False], ids=["view", "contiguous"])
def test_more_elements_than_32_bits_count(view):
    """600,064 tokens of 32 heads of 128: the last tokens against a call on these alone."""
    n, last = 600064, 4096
    shape = (1, n, 32, 128) if view else (1, 32, n, 128)
    window, rotary = Window.sliding(128), Rotary(128).cuda()
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    heads = (lambda x: x.transpose(1, 2)) if view else (lambda x: x)
    out = local_attention(heads(q), heads(k), heads(v), window, rotary=rotary, backend="flex")
    grads = torch.autograd.grad(out[:, :, -last:].float().square().sum(), (q, k, v))
    far = [heads(x)[:, :, -2 * last :].detach().clone().requires_grad_() for x in (q, k, v)]
    first = n - 2 * last
    alone = local_attention(
        *far, window, rotary=rotary, q_offset=first, kv_offset=first, backend="flex"
    )
    true = torch.autograd.grad(alone[:, :, -last:].float().square().sum(), far)
    torch.testing.assert_close(out[:, :, -last:], alone[:, :, -last:], rtol=0.02, atol=0.02)
    for ours, theirs in zip(grads, true, strict=True):
        found = heads(ours)
        torch.testing.assert_close(found[:, :, -2 * last :], theirs, rtol=0.02, atol=0.02)
        assert not found[:, :, : n - last - 128].any()
