"""Calls that go to FlashAttention 4 directly: what it is told, and what becomes of its answers."""

import sys
import types

import pytest
import torch
from compilers import quick
from features import windows_of
from placed import case_of, check

from flexlocal import Window, explain, local_attention
from flexlocal.flex import flash_attention, tuning
from flexlocal.spec import Inputs, Spec, resolved, shaped


def weights(q, k, lse, scale, softcap, before, after):
    """Scores before the window hides any, and the weights, both ``(b, h, n, n)``."""
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    query, key = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    hidden = (key < query - before) | (key > query + after)
    return scores, (scores - lse[..., None]).exp().masked_fill(hidden, 0.0)


def for_each_head(q, *tensors):
    return [x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in tensors]


def _flash_attn_fwd(
    q, k, v, *, softmax_scale, softcap, window_size_left, window_size_right, learnable_sink,
    return_lse, out,
):  # fmt: skip
    assert return_lse
    k, v = for_each_head(q, k, v)
    numbers = softmax_scale, softcap, window_size_left, window_size_right
    zeros = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    _, unscaled = weights(q, k, zeros, *numbers)
    total = unscaled.sum(-1)
    if learnable_sink is not None:
        total = total + learnable_sink.exp()[:, None]
    out.copy_(torch.einsum("bhij,bjhd->bihd", unscaled / total[..., None], v))
    return out, total.log(), None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, *, softmax_scale, softcap, window_size_left, window_size_right,
    learnable_sink, deterministic, dq, dk, dv, dlse,
):  # fmt: skip
    numbers = softmax_scale, softcap, window_size_left, window_size_right
    keys, values = for_each_head(q, k, v)
    scores, share = weights(q, keys, lse, *numbers)
    slope = torch.einsum("bihd,bihd->bhi", dout, out) - (0 if dlse is None else dlse)
    of_scores = share * (torch.einsum("bihd,bjhd->bhij", dout, values) - slope[..., None])
    if softcap:
        of_scores = of_scores * (1 - (scores / softcap) ** 2)
    of_scores = softmax_scale * of_scores
    dq.copy_(torch.einsum("bhij,bjhd->bihd", of_scores, keys))
    for given, found in (
        (dk, torch.einsum("bhij,bihd->bjhd", of_scores, q)),
        (dv, torch.einsum("bhij,bihd->bjhd", share, dout)),
    ):
        given.copy_(found.unflatten(2, (given.shape[2], -1)).sum(3))
    if learnable_sink is None:
        return dq, dk, dv
    of_sinks = -((learnable_sink[:, None] - lse).exp() * slope).sum((0, 2))
    return dq, dk, dv, of_sinks


@pytest.fixture
def stand_in(monkeypatch):
    """The package, by plain arithmetic on the CPU."""
    made = types.ModuleType("flash_attn.cute.interface")
    made._flash_attn_fwd, made._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, made.__name__, made)


SLIDES = windows_of(19, exact=True)
CASES = {
    "causal": case_of(window=SLIDES, n=83),
    "views": case_of("plain views", window=SLIDES, n=83),
    "both ways, rotary": case_of("rotary, exact both ways", n=131),
    "views, rotary": case_of("views", window=SLIDES, n=61),
    "grouped, softcap, sinks": case_of(
        "grouped queries", window=SLIDES, n=67, d=32, softcap=1.5, sink_heads=6
    ),
    "scale, two windows back": case_of(
        window=windows_of(13, look_backward=2, exact=True), n=71, scale=0.3
    ),
}
CASES = {
    name: case_of("", **{**vars(case.case), "d_v": case.case.d}, softcap=case.softcap,
                  sink_heads=case.sink_heads)
    for name, case in CASES.items()
}  # fmt: skip


def directly(case):
    """Runs the case's call, the checks and the choice aside."""

    rotary = case.rotary()
    turns = None if rotary is None else rotary.inv_freq

    def run(call):
        inputs = Inputs(call.q, call.k, call.v, inv_freq=turns, sinks=call.sinks)
        spec = Spec(case.window, case.case.scale, softcap=case.softcap, return_lse=True)
        return flash_attention.attend(resolved(spec, inputs), shaped(inputs))

    return run


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, stand_in):
    check(CASES[name], torch.float32, tolerance=1e-5, run=directly(CASES[name]))


@pytest.mark.parametrize("name", quick(["causal", "grouped, softcap, sinks"], ["causal"]))
def test_inside_a_compiler(name, stand_in, fresh_compiler):
    run = torch.compile(directly(CASES[name]), fullgraph=True, backend="aot_eager")
    check(CASES[name], torch.float32, tolerance=1e-5, run=run)


@pytest.mark.parametrize("compiled", [False, True], ids=["outside", "inside"])
def test_results_lie_in_memory_as_what_they_are_of(compiled, stand_in, fresh_compiler):
    case = CASES["views"]
    call = case.tensors(torch.float32)
    run = directly(case)
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, _ = run(call)
    assert out.stride() == call.q.stride()
    # One of the results alone, and its gradient an expanded number.
    for x, gradient in zip((call.q, call.k, call.v), torch.autograd.grad(
        out.sum(), (call.q, call.k, call.v)), strict=True):  # fmt: skip
        assert gradient.stride() == x.stride()
    _, lse = run(call)
    assert all(x is not None for x in torch.autograd.grad(lse.sum(), (call.q, call.k)))


def test_without_gradients_nothing_is_kept(stand_in):
    case = CASES["causal"]
    with torch.no_grad():
        out, lse = directly(case)(case.tensors(torch.float32))
    assert not out.requires_grad and not lse.requires_grad


def test_a_second_derivative_is_refused(stand_in):
    case = CASES["causal"]
    call = case.tensors(torch.float32)
    (gradient,) = torch.autograd.grad(
        directly(case)(call)[0].sum(), call.q, create_graph=True
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no second derivative: backend must be 'eager'"):
        torch.autograd.grad(gradient.sum(), call.q)


# On a GPU, by the package itself.

ON_A_GPU = {
    "causal": {"window": windows_of(100, exact=True)},
    "both ways, views": {"transposed": True, "window": windows_of(64, causal=False, exact=True)},
    "rotary, views": {"transposed": True, "rotary": True, "window": windows_of(100, exact=True)},
    "grouped, sinks": {"lead": (2, 6), "kv_heads": 2, "sink_heads": 6},
    "softcap": {"softcap": 1.5},
    "all that is seen": {"window": windows_of(400, exact=True), "scale": 0.2},
}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # flash-attn-4 compiles with deprecated names of CUTLASS
@pytest.mark.parametrize("compiled", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(
    ("d", "dtype"), [(64, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)]
)
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name, d, dtype, compiled, fresh_compiler):
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    more = {"window": SLIDES, "n": 333, "d": d, "d_v": d, **ON_A_GPU[name]}
    case = case_of(**more)
    rotary = case.rotary("cuda")

    def run(call):
        return case.run(call, rotary=rotary)

    if compiled:
        run = torch.compile(run, fullgraph=True)
    with tuning.overriding(tuning.FLASH):
        call = case.tensors(dtype, "cuda")
        told = explain(call.q, call.k, call.v, case.window, **case.arguments(call))
        assert told.flash == "directly"
        check(case, dtype, "cuda", tolerance=2e-2, run=run)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # flash-attn-4 compiles with deprecated names of CUTLASS
@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_same_gradients_again_where_torch_is_told_to(d):
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    window = Window(500, causal=True, exact=True)
    q, k, v = torch.randn(3, 2, 4, 2000, d, device="cuda", dtype=torch.bfloat16).unbind()
    leaves = [x.requires_grad_() for x in (q, k[:, :2], v[:, :2])]
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            with tuning.overriding(tuning.FLASH):
                out = local_attention(*leaves, window)
            found.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], again, strict=True))
