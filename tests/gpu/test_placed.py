"""Positions, documents, softcap, sinks and log-sum-exps in kernels, against the oracle."""

import placed
import pytest
import torch
from compilers import graphs
from hypothesis import HealthCheck, Phase, given, seed, settings

from flexlocal import Rotary, Window, local_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]

TOLERANCE = 2e-5  # of fp32


@pytest.mark.parametrize("name", placed.CASES)
def test_results_and_gradients(name):
    placed.check(placed.CASES[name], torch.float32, "cuda", TOLERANCE, backend="flex")


@pytest.mark.parametrize("start", range(8))
def test_the_whole_argument_space(start):
    @seed(start)
    @settings(
        max_examples=3,
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(placed.placed())
    def check(case):
        placed.check(case, torch.float32, "cuda", 1e-4)

    check()


DROPPED = ["softcap, bias, shared", "sinks", "sinks, bias, mask", "documents, bias"]
DROPPED += ["documents, xpos", "a part by row, xpos", "few queries by row"]


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_drops_what_the_eager_path_drops(name):
    case = placed.CASES[name]
    call = case.tensors(torch.float32, "cuda")
    found = []
    for backend in ("flex", "eager"):
        drop = {"dropout": 0.3, "dropout_seed": torch.tensor(5, device="cuda")}
        results = case.run(call, **drop, backend=backend)
        found.append([*results, *placed.gradients(results, call).values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def packings(count, batch, n):
    """Documents of all lengths, some of one token."""
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        begins = torch.rand(batch, n, generator=generator) < 1 / (2 + 3 * number)
        yield begins.cumsum(1).to(torch.int32)


def step(attend, documents, tensors, grad):
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    return torch.autograd.grad(attend(q, k, v, documents), (q, k, v), grad)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_packings_share_a_kernel_and_wait_for_nothing(compiled):
    window = Window(100, causal=True, exact=True)

    def attend(q, k, v, documents):
        return local_attention(q, k, v, window, documents=documents, rotary=rotary)

    rotary = Rotary(64).cuda()
    attend = torch.compile(attend, fullgraph=True) if compiled else attend
    n = 1100  # shorter ones have no graph
    *tensors, grad = (torch.randn(2, 3, n, 64, device="cuda") for _ in range(4))
    packed = [documents.cuda() for documents in packings(100, 2, n)]
    step(attend, packed[0], tensors, grad)
    once = graphs(), torch._inductor.metrics.generated_kernel_count
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = [step(attend, documents, tensors, grad) for documents in packed]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (graphs(), torch._inductor.metrics.generated_kernel_count) == once
    assert once[0] == 1
    for number in (3, 99):
        q, k, v = (x.detach().requires_grad_() for x in tensors)
        documents = packed[number]
        true = local_attention(q, k, v, window, documents=documents, rotary=rotary, backend="eager")
        true = torch.autograd.grad(true, (q, k, v), grad)
        for ours, theirs in zip(found[number], true, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [Window(128, causal=True), Window(64, exact=True)], ids=str)
@pytest.mark.parametrize("more", ["plain", "xpos", "bias"])
def test_documents_at_the_edges_of_blocks_have_the_bits_of_calls_of_their_own(window, more):
    """Where windows slide. Kernels of standing windows round a few numbers the other way."""
    lengths = [256, 384, 128, 512]
    q, k, v, grad = (
        torch.randn(1, 2, sum(lengths), 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    arguments = {"backend": "flex"}  # by itself a short document goes to kernels of all pairs
    if more == "bias":
        arguments["attn_bias"] = torch.randn(2, window.size, window.span, device="cuda")
    elif more == "xpos":
        arguments["rotary"] = Rotary(64, True, 512.0).cuda()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    numbers = torch.arange(4, device="cuda")
    documents = numbers.repeat_interleave(torch.tensor(lengths, device="cuda"))
    packed = local_attention(q, k, v, window, documents=documents, **arguments)
    parts = [x.split(lengths, dim=2) for x in (q, k, v)]
    alone = [local_attention(*part, window, **arguments) for part in zip(*parts, strict=True)]
    ours, theirs = (
        [out, *torch.autograd.grad(out, (q, k, v), grad)]
        for out in (packed, torch.cat(alone, dim=2))
    )
    if more == "xpos":  # whose origins lie elsewhere
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
        return
    if not window.exact:  # some of the output is off by a rounding of a weight or of itself
        assert (ours[0] != theirs[0]).double().mean() < 1e-3
        torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=2**-8)
    for one, other in zip(ours, theirs, strict=True):
        if window.exact:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_a_log_sum_exp_may_be_used_alone_in_a_compiled_model():
    q, k, v = (torch.randn(1, 2, 300, 64, device="cuda", requires_grad=True) for _ in range(3))
    found = []
    for backend in ("flex", "eager"):

        def loss(q, k, v, backend=backend):
            _, lse = local_attention(q, k, v, 64, return_lse=True, backend=backend)
            return lse.square().sum()

        compiled = torch.compile(loss, fullgraph=True)
        found.append(torch.autograd.grad(compiled(q, k, v), (q, k)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_capped_scores_of_16_bits(dtype):
    """Capped by an instruction of the GPU, they are as exact as what they are made of."""
    window, grad = Window.sliding(257), torch.randn(2, 3, 700, 64, device="cuda", dtype=dtype)
    q, k, v = (3 * torch.randn(2, 3, 700, 64, device="cuda", dtype=dtype) for _ in range(3))
    found = []
    for as_dtype, backend in ((dtype, "flex"), (dtype, "eager"), (torch.float64, "eager")):
        made = [x.to(as_dtype).requires_grad_() for x in (q, k, v)]
        out = local_attention(*made, window, softcap=20.0, backend=backend)
        found.append([out, *torch.autograd.grad(out, made, grad.to(as_dtype))])
    for ours, plain, true in zip(*found, strict=True):
        error, usual = ((x.double() - true).norm() / true.norm() for x in (ours, plain))
        assert error < 3 * usual
