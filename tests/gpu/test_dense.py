"""Short sequences on a GPU, by ``scaled_dot_product_attention``: against the oracle, and safe."""

import dataclasses
from functools import partial

import budget
import placed
import pytest
import torch
from budget import gradients
from features import PLAIN, windows_of

from flexlocal import LocalAttention, Window, explain, local_attention
from flexlocal.flex import dense_tables, kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="measured on Hopper alone",
    ),
]

CASES = {
    "sliding": {"window": windows_of(100, exact=True), "n": 333},
    "sliding both ways, wide heads": {
        "window": windows_of(64, causal=False, exact=True), "n": 517, "d": 128,
    },
    "standing": {"window": windows_of(33, causal=False), "n": 301},
    "far looks": {"window": windows_of(16, causal=False, look_backward=3, look_forward=2)},
    "of one window": {"window": windows_of(40, look_backward=0), "n": 411, "d": 80},
    "hides nothing": {"window": windows_of(400), "n": 389},
    "hides nothing both ways": {"window": windows_of(389, causal=False), "n": 389, "d": 256},
    "a token": {"n": 1},
    "grouped": {"lead": (2, 6), "kv_heads": 3, "n": 219},
    "grouped, hides nothing": {"lead": (2, 6), "kv_heads": 2, "n": 131, "window": windows_of(140)},
    "views": {"transposed": True, "n": 257, "window": windows_of(16)},
    "rows": {"lead": (5,), "n": 250, "window": windows_of(16)},
    "mask": {"mask_batch": 2, "n": 301, "window": windows_of(32, causal=False)},
    "mask, a row hidden": {"mask_batch": 2, "hide_a_row": True, "n": 259},
    "mask by head": {"mask_batch": 6, "hide_a_row": True, "n": 303, "window": windows_of(32)},
    "grouped, mask by head": {"lead": (2, 6), "kv_heads": 3, "mask_batch": 12, "n": 150},
    "rotary": {"rotary": True, "n": 277, "window": windows_of(32)},
    "rotary, mask": {"rotary": True, "n": 163, "mask_batch": 2, "window": windows_of(16)},
    "bias": {"lead": (2, 6), "bias_heads": 3, "n": 171, "window": windows_of(32, causal=False)},
    "bias, rotary, mask": {
        "bias_heads": 1, "rotary": True, "mask_batch": 2, "n": 331,
        "window": windows_of(64, exact=True),
    },
    "longest": {"lead": (1, 3), "n": 1024, "window": windows_of(128, exact=True)},
    "a scale": {"scale": 0.3, "n": 222},
}  # fmt: skip


def case_of(name):
    case = dataclasses.replace(PLAIN, **CASES[name])
    return dataclasses.replace(case, d_v=case.d)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, dtype):
    case = case_of(name)
    layer = LocalAttention(**case.arguments()).cuda()
    call = case.tensors(dtype).with_fixed_bias().cuda()
    given = {"mask": call.mask, "attn_bias": call.bias}
    assert layer.explain(call.q, call.k, call.v, **given).engine == "dense"
    budget.check(case, dtype, partial(case.run, layer), lambda call: call.with_fixed_bias().cuda())
    with torch.no_grad():
        found, fused = (
            case.run(LocalAttention(**case.arguments(), backend=name).cuda(), call)
            for name in ("auto", "flex")
        )
    torch.testing.assert_close(found, fused, rtol=2e-2, atol=2e-2)


PACKED = {
    "sliding": {"window": windows_of(50, exact=True), "n": 333},
    "standing": {"window": windows_of(33, causal=False), "n": 301},
    "grouped": {"lead": (2, 6), "kv_heads": 3, "n": 219},
    "padding": {"padded": True, "n": 277, "window": windows_of(400)},
    "a mask": {"mask_batch": 2, "n": 150, "window": windows_of(16)},
    "bias, rotary": {"bias_heads": 3, "rotary": True, "n": 171, "window": windows_of(32)},
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PACKED)
def test_documents(name, dtype):
    call = placed.case_of(documents=2, d=64, d_v=64, **PACKED[name])
    tensors = call.tensors(dtype, "cuda")
    if tensors.bias is not None:
        tensors.bias.requires_grad_(False)
    arguments = call.arguments(tensors)
    qkv = tensors.q, tensors.k, tensors.v
    assert explain(*qkv, call.window, **arguments).engine == "dense"
    out = local_attention(*qkv, call.window, **arguments)
    exact = tensors.to(torch.float64)
    truth, _ = call.truth(exact)
    found = torch.autograd.grad((out * tensors.cotangent).sum(), qkv)
    right = torch.autograd.grad((truth * exact.cotangent).sum(), (exact.q, exact.k, exact.v))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, true in zip((out, *found), (truth, *right), strict=True):
        size = max(1.0, true.abs().max().item())
        assert (ours.cpu().double() - true).abs().max() <= tolerance * size


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_a_mask_hides_never_gets_out(poison):
    case = case_of("mask")
    keep = case.tensors(torch.bfloat16).mask.cuda()
    keep[1, 100:300] = False  # queries that see nothing
    layer = LocalAttention(**case.arguments()).cuda()
    found = []
    for hidden in (poison, 0.0):
        call = case.tensors(torch.bfloat16).cuda()
        for x in (call.q, call.k, call.v):
            x.data.masked_fill_(~keep[:, None, :, None], hidden)
        out = layer(call.q, call.k, call.v, mask=keep)
        found.append((out, *gradients(out, call).values()))
    for poisoned, clean in zip(*found, strict=True):
        assert poisoned.isfinite().all()
        torch.testing.assert_close(poisoned, clean, rtol=1e-2, atol=1e-2)
    for gradient in found[0][2:]:
        assert not gradient.transpose(1, 2)[~keep].any()
    assert not found[0][0][1, :, 164:236].any()  # all that these see is hidden


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_padding_is_hidden_however_low_other_scores_are(dtype):
    case = case_of("mask")
    call = case.tensors(dtype)
    call.q.data.mul_(60)
    call.k.data.copy_(-call.q.data / 30)
    found = case.run(LocalAttention(**case.arguments()).cuda(), call.cuda())
    truth = case.truth(call.to(torch.float64))
    torch.testing.assert_close(found.cpu().double(), truth, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_views_that_begin_anywhere(dtype):
    """Kernels read several numbers at a time."""
    drawn = torch.randn(3, 2, 3, 203, 67, device="cuda", dtype=dtype)
    for first in (0, 1, 3):
        for window in (Window(16, causal=True), Window(203, causal=True)):
            q, k, v = (x.detach().requires_grad_() for x in drawn[..., first : first + 64])
            out, right = (
                local_attention(q, k, v, window, backend=name) for name in ("auto", "flex")
            )
            torch.testing.assert_close(out, right, rtol=2e-2, atol=2e-2)
            for one, other in zip(
                torch.autograd.grad(out.sum(), (q, k, v)),
                torch.autograd.grad(right.sum(), (q, k, v)),
                strict=True,
            ):
                torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


def test_second_derivatives_are_refused():
    q = torch.randn(1, 2, 100, 64, device="cuda", requires_grad=True)
    layer = LocalAttention(16, causal=True, dim=64, autopad=True, dropout=0.0).cuda()
    (first,) = torch.autograd.grad(layer(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("n", [200, 203])
def test_a_key_mask_may_be_transposed(n):
    """Kernels want rows of what is added to scores in one piece."""
    q, k, v = torch.randn(3, 2, 3, n, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.rand(n, 2, device="cuda") < 0.7
    run = partial(local_attention, q, k, v, Window(16, causal=True))
    assert torch.equal(run(mask=mask.t()), run(mask=mask.t().contiguous()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one():
    case = case_of("rotary, mask")
    found = []
    for device in ("cuda:0", "cuda:1"):
        layer = LocalAttention(**case.arguments()).to(device)
        call = case.tensors(torch.bfloat16).cuda(device)
        out = case.run(layer, call)
        found.append([out.cpu(), *(x.cpu() for x in gradients(out, call).values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_a_captured_graph_keeps_its_table():
    """Tables of other calls go, and their memory with them; the graph goes on."""
    q, k, v = torch.randn(3, 2, 3, 200, 64, device="cuda", dtype=torch.bfloat16)
    run = partial(local_attention, q, k, v, Window(16, causal=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = run()
    kept._made.cache_clear()
    torch.cuda.empty_cache()
    junk = torch.full((2**24,), 1.0, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        torch.testing.assert_close(out, run(backend="flex"), rtol=2e-2, atol=2e-2)
    del junk


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("dim", [None, 64], ids=["plain", "rotary"])
def test_nothing_waits_for_the_gpu_and_no_length_compiles(dim):
    mask = torch.rand(2, 400, device="cuda") < 0.7
    drawn = torch.randn(3, 2, 3, 400, 64, device="cuda", dtype=torch.bfloat16)
    layer = LocalAttention(16, causal=True, autopad=True, dim=dim, dropout=0.0).cuda()
    torch._dynamo.utils.counters.clear()
    for n in (301, 117, 400, 7):
        q, k, v = (x[:, :, :n].detach().requires_grad_() for x in drawn)
        for given in ({}, {"mask": mask[:, :n]}):
            layer(q, k, v, **given).sum().backward()
            torch.cuda.set_sync_debug_mode("error")
            try:
                layer(q, k, v, **given).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("window", [Window(16, causal=True), Window(203, causal=True)], ids=str)
def test_no_size_has_a_plan(window):
    q, k, v = torch.randn(3, 2, 3, 203, 64, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        local_attention(q, k, v, window)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events()]
    assert kernels and not any("cudnn" in name for name in kernels)


def test_the_same_bits_again_where_they_are_asked_for():
    q, k, v = (torch.randn(2, 3, 400, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            learned = [x.detach().requires_grad_() for x in (q, k, v)]
            local_attention(*learned, 32).square().sum().backward()
            found.append([x.grad for x in learned])
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], again, strict=True))


def test_longer_ones_are_left_to_kernels_that_skip():
    window = Window(128, causal=True, exact=True)
    q = torch.randn(1, 2, dense_tables.LONGEST + 1, 64, device="cuda", dtype=torch.bfloat16)
    layer = LocalAttention(128, causal=True, exact_windowsize=True, autopad=True, dropout=0.0)
    assert layer.explain(q).engine != "dense"
    assert layer.explain(q[:, :, :-1]).engine == "dense"
    with torch.no_grad():
        whole = local_attention(q, q, q, window)
        part = local_attention(*3 * [q[:, :, :-1]], window)
    torch.testing.assert_close(whole[:, :, :-1], part, rtol=2e-2, atol=2e-2)
