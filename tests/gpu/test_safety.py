"""What users rely on without asking: nothing leaks, repeats differ in nothing, memory stays.

On a GPU, where compute-sanitizer looks at every address that these calls read and write;
CONTRIBUTING.md has the command.
"""

import threading
from functools import partial

import budget
import pytest
import torch
from budget import gradients
from compilers import noting_dtypes
from features import feature
from strategies import Call
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flexlocal import LocalAttention, Window, explain, local_attention
from flexlocal.flex import kept

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]


def tensors(n=512, d=32, d_v=48, heads=3, dtype=torch.bfloat16, grad=False, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    drawn = [torch.randn(2, heads, n, x, device="cuda", generator=generator) for x in (d, d, d_v)]
    return [x.to(dtype).requires_grad_(grad) for x in drawn]


@pytest.mark.parametrize("compiled", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_a_mask_hides_never_gets_out(poison, compiled):
    """Neither forward nor backward, and what no query sees has no gradient."""
    layer = LocalAttention(64, causal=True, dropout=0.0, dim=32, backend="flex").cuda()
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    keep = torch.rand(2, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) > 0.4
    keep[1, 100:300] = False  # whole blocks, and queries that see nothing
    found = []
    for hidden in (poison, 0.0):
        q, k, v = tensors(grad=True)
        with torch.no_grad():
            for x in (q, k, v):
                x.masked_fill_(~keep[:, None, :, None], hidden)
        out = run(q, k, v, mask=keep)
        found.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for poisoned, clean in zip(*found, strict=True):
        assert poisoned.isfinite().all()
        assert torch.equal(poisoned, clean)
    for gradient in found[0][2:]:
        assert not gradient.transpose(1, 2)[~keep].any()
    blind = torch.arange(512, device="cuda")
    blind = (blind >= 192) & (blind < 300)  # the window before these is hidden too
    assert not found[0][0][1, :, blind].any()


@pytest.mark.parametrize("name", ["plain", "rotary, exact both ways", "mask", "shared", "dropout"])
def test_the_same_bits_again(name):
    dropout = 0.2 if name == "dropout" else 0.0
    case = feature(name, n=777)
    call = case.tensors(torch.bfloat16).cuda()
    layer = LocalAttention(**{**case.arguments(), "dropout": dropout}, backend="flex").cuda()
    seed = torch.tensor(3, device="cuda")
    runs = []
    for _ in range(4):
        out = layer(call.q, call.k, call.v, mask=call.mask, dropout_seed=seed)
        runs.append((out, *gradients(out, call).values()))
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


def test_auto_is_fused_in_a_compiled_model():
    kernels = []
    q, k, v = tensors()
    layer = LocalAttention(64, causal=True, dropout=0.0)
    torch.compile(layer, fullgraph=True, backend=noting_dtypes(kernels))(q, k, v)
    assert kernels == [{torch.bfloat16}]


def test_a_captured_graph_keeps_what_it_reads():
    """The block lists of other calls go, and their memory with them; the graph goes on."""
    layer = LocalAttention(64, causal=True, dropout=0.0, backend="flex")
    q, k, v = tensors()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            layer(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = layer(q, k, v)
    kept._made.cache_clear()
    torch.cuda.empty_cache()
    # Where lists that nobody keeps lay, other numbers lie now.
    junk = [torch.full((2**20,), 7, device="cuda", dtype=torch.int32) for _ in range(8)]
    for seed in (1, 2):
        for x, new in zip((q, k, v), tensors(seed=seed), strict=True):
            x.copy_(new)
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(out, layer(q, k, v), rtol=0, atol=0)
    del junk
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    assert kernels and all("flex_attention" in name for name in kernels)  # none makes lists


def test_threads_and_streams():
    """Each thread on a stream of its own; block lists are made where they are read."""
    layers = [LocalAttention(size, causal=True, dropout=0.0, backend="flex") for size in (16, 64)]
    q, k, v = tensors(dtype=torch.float32)
    expected = [layer(q, k, v) for layer in layers]
    torch.cuda.synchronize()
    wrong = []

    def work(stream):
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(20):
                for layer, right in zip(layers, expected, strict=True):
                    if not torch.equal(layer(q, k, v), right):
                        wrong.append(layer)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(torch.cuda.Stream(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_after_inference_mode():
    """Block lists that were made in inference mode serve the backward pass."""
    q, k, v = tensors(grad=True, dtype=torch.float32)
    found = []
    for backend in ("flex", "eager"):
        layer = LocalAttention(64, causal=True, dropout=0.0, backend=backend)
        kept._made.cache_clear()
        with torch.inference_mode():
            layer(q, k, v)
        found.append(torch.autograd.grad(layer(q, k, v).square().sum(), (q, k, v)))
    for fused, eager in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # flash-attn-4 compiles with deprecated names of CUTLASS
def test_a_million_tokens_in_eight_gigabytes():
    q, k, v = (
        torch.randn(1, 8, 2**20, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    layer = LocalAttention(256, causal=True, dropout=0.0, dim=64, exact_windowsize=True).cuda()
    # FlashAttention 4's backward pass sums the gradients of queries up in fp32: 2.1 GB.
    most = 8e9 if layer.explain(q, k, v).engine == "flex" else 8e9 + 4 * q.numel()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # 3.2 GB of q, k and v
    out = layer(q, k, v)
    out.backward(q.detach())
    assert torch.cuda.max_memory_allocated() - before < most
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.filterwarnings("ignore")  # flash-attn-4 compiles with deprecated names of CUTLASS
@pytest.mark.parametrize(("n", "exact"), [(2048, True), (4001, True), (4096, False)])
def test_flash_attention_4_gives_the_same(n, exact):
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    window = Window(1024, causal=True, exact=exact)
    q, k, v = tensors(n=n, d=128, d_v=128, heads=4, grad=True)  # as that kernel needs them
    assert explain(q, k, v, window).engine == ("flash" if exact else "flash by flex")
    found = []
    for more in ({}, {"kernel_options": {"BACKEND": "TRITON"}}, {"backend": "eager"}):
        out = local_attention(q, k, v, window, **more)
        found.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for flash, triton, eager in zip(*found, strict=True):
        size = eager.float().norm()
        assert (flash - eager).float().norm() < 1.5e-2 * size
        assert (triton - eager).float().norm() < 1.5e-2 * size


@pytest.mark.parametrize("name", ["bias", "bias over rows", "xpos, mask, bias, shared", "mask"])
def test_whole_blocks_are_scored_within_bounds(name):
    """For memcheck: biases and masks at every edge, lengths on and off the blocks."""
    for n in (128, 256, 301):
        case = feature(name, n=n)
        layer = LocalAttention(**case.arguments(), backend="flex").cuda()
        run = partial(case.run, layer)
        budget.check(case, torch.bfloat16, run, Call.cuda)
