"""Calls that go to FlashAttention 4 directly: what it is told, and what becomes of its answers."""

import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from compilers import graphs, quick
from features import windows_of
from placed import Placed, case_of, check

from flexlocal import Window, explain, local_attention, local_attention_varlen
from flexlocal.flex import tuning
from flexlocal.flex.compile import prepared
from flexlocal.shapes import shaped
from flexlocal.spec import Inputs, Spec, resolved


def weights(q, k, lse, scale, softcap, before, after):
    """Scores before the window hides any, and the weights, both ``(b, h, n, n)``."""
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    query, key = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    hidden = torch.zeros(len(query), len(key), dtype=torch.bool)
    if before is not None:
        hidden |= key < query - before
    if after is not None:
        hidden |= key > query + after
    return scores, (scores - lse[..., None]).exp().masked_fill(hidden, 0.0)


def for_each_head(q, *tensors):
    return [x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in tensors]


def documents_of(sums, *tensors):
    """Each document's part, ``(1, n, ...)``, of tensors ``(total, ...)``; of a None a None."""
    assert len(sums) > 1  # the package's kernels fail where there is none
    for start, stop in zip(sums[:-1].tolist(), sums[1:].tolist(), strict=True):
        if start < stop:
            yield [None if x is None else x[start:stop][None] for x in tensors]


def _flash_attn_fwd(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, softcap, window_size_left,
    window_size_right, learnable_sink, return_lse, out, lse,
):  # fmt: skip
    assert return_lse and cu_seqlens_k is cu_seqlens_q
    if cu_seqlens_q is not None:
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.is_contiguous()
        for *parts, sums in documents_of(cu_seqlens_q, q, k, v, out, lse.mT):
            _, found, *_ = _flash_attn_fwd(
                *parts[:3], cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=softmax_scale,
                softcap=softcap, window_size_left=window_size_left,
                window_size_right=window_size_right, learnable_sink=learnable_sink,
                return_lse=True, out=parts[3], lse=None,
            )  # fmt: skip
            sums.copy_(found.mT)
        return out, lse, None, None, None
    assert lse is None
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
    q, k, v, out, dout, lse, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, softcap,
    window_size_left, window_size_right, learnable_sink, deterministic, dq, dk, dv, dlse,
):  # fmt: skip
    assert cu_seqlens_k is cu_seqlens_q
    if cu_seqlens_q is not None:
        by_token = None if dlse is None else dlse.mT
        of_sinks = 0
        for *parts, sums, of_sums, one, two, three in documents_of(
            cu_seqlens_q, q, k, v, out, dout, lse.mT, by_token, dq, dk, dv
        ):
            *_, last = _flash_attn_bwd(
                *parts, sums.mT, cu_seqlens_q=None, cu_seqlens_k=None,
                softmax_scale=softmax_scale, softcap=softcap, window_size_left=window_size_left,
                window_size_right=window_size_right, learnable_sink=learnable_sink,
                deterministic=deterministic, dq=one, dk=two, dv=three,
                dlse=None if of_sums is None else of_sums.mT,
            )  # fmt: skip
            if learnable_sink is not None:
                of_sinks = of_sinks + last
        return (dq, dk, dv) if learnable_sink is None else (dq, dk, dv, of_sinks)
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


def clear(sums, *tensors):
    for x in tensors:
        x[:, :, sums[-1] :] = 0


@pytest.fixture
def stand_in(monkeypatch):
    """The package, and our kernel of Triton's, by plain arithmetic on the CPU."""
    made = types.ModuleType("flash_attn.cute.interface")
    made._flash_attn_fwd, made._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, made.__name__, made)
    tail = types.ModuleType("flexlocal.flex.flash_tail")
    tail.clear = clear
    monkeypatch.setitem(sys.modules, tail.__name__, tail)
    return made.__name__


SLIDES = windows_of(19, exact=True)
CASES = {
    "causal": case_of(window=SLIDES, n=83),
    "views": case_of("plain views", window=SLIDES, n=83),
    "both ways, rotary": case_of("rotary, exact both ways", n=131),
    "views, rotary": case_of("views", window=SLIDES, n=61),
    "grouped, softcap, sinks": case_of(
        "grouped queries", window=SLIDES, n=67, d=32, softcap=1.5, sink_heads=6
    ),
    "all that is seen": case_of(window=windows_of(90, exact=True), n=67),
    "all both ways": case_of(window=windows_of(70, causal=False, exact=True), n=67),
    "scale, two windows back": case_of(
        window=windows_of(13, look_backward=2, exact=True), n=71, scale=0.3
    ),
}
CASES = {
    name: case_of("", **{**vars(case.case), "d_v": case.case.d}, softcap=case.softcap,
                  sink_heads=case.sink_heads)
    for name, case in CASES.items()
}  # fmt: skip


@dataclass(frozen=True)
class Packed(Placed):
    """A call over documents of these lengths, in a row with a few tokens more."""

    lengths: tuple[int, ...] = ()

    def tensors(self, dtype=torch.float64, device="cpu"):
        call = super().tensors(dtype, device)
        numbers = torch.full((self.case.n,), -1)
        start = 0
        for number, length in enumerate(self.lengths):
            numbers[start : start + length] = number
            start += length
        return replace(call, documents=numbers.to(device))

    def sums(self, device="cpu"):
        return torch.tensor([0, *self.lengths], device=device).cumsum(0)

    def in_place(self, function, call, **more):
        """``function`` of the call in varlen functions' shapes."""
        arguments = self.arguments(call, **more)
        del arguments["documents"]
        by_token = (x[0].transpose(0, 1) for x in (call.q, call.k, call.v))
        return function(*by_token, self.window, cu_seqlens=self.sums(call.q.device), **arguments)

    def run(self, call, **more):
        out, lse = self.in_place(local_attention_varlen, call, return_lse=True, **more)
        return out.transpose(0, 1)[None], lse[None]


def packed(lengths, tail, **more):
    case = case_of("", lead=more.pop("lead", (1, 3)), n=sum(lengths) + tail, **more)
    return Packed(**vars(case), lengths=tuple(lengths))


CASES |= {
    "documents": packed([13, 40, 0, 1, 20], 0, window=SLIDES, d=8, d_v=8),
    "documents, rotary, a tail": packed(
        [40, 21, 7, 0], 9, window=windows_of(11, causal=False, exact=True), d=8, d_v=8, rotary=True
    ),
    "documents, views, grouped, softcap, sinks, a tail": packed(
        [5, 64, 30], 5, window=SLIDES, lead=(1, 6), kv_heads=2, d=16, d_v=16, transposed=True,
        softcap=1.5, sink_heads=6,
    ),
    "no document, sinks": packed(
        [], 23, window=SLIDES, lead=(1, 6), kv_heads=2, d=16, d_v=16, sink_heads=6
    ),
}  # fmt: skip


def directly(case):
    """Runs the case's call, the checks and the choice aside."""

    rotary = case.rotary()
    turns = None if rotary is None else rotary.inv_freq

    def run(call):
        inputs = Inputs(call.q, call.k, call.v, inv_freq=turns, sinks=call.sinks)
        if isinstance(case, Packed):
            inputs = inputs._replace(cu_seqlens=case.sums())
        spec = Spec(case.window, case.case.scale, softcap=case.softcap, return_lse=True)
        spec, inputs = resolved(spec, inputs), shaped(inputs)
        return prepared(spec, inputs, "flash")(inputs)

    return run


# Rotation is compiled, by itself.
QUICK = [name for name in CASES if "rotary" not in name] + ["documents, rotary, a tail"]


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_results_and_gradients(name, stand_in):
    check(CASES[name], torch.float32, tolerance=1e-5, run=directly(CASES[name]))


INSIDE = ["causal", "grouped, softcap, sinks", "documents, rotary, a tail"]


@pytest.mark.parametrize("name", quick(INSIDE, ["causal"]))
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


def test_kernels_are_told_of_no_window_that_hides_nothing(stand_in, monkeypatch):
    told = []

    def recorded(function):
        def run(*tensors, window_size_left, window_size_right, **more):
            told.append((window_size_left, window_size_right))
            sides = {"window_size_left": window_size_left, "window_size_right": window_size_right}
            return function(*tensors, **sides, **more)

        return run

    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        monkeypatch.setattr(sys.modules[stand_in], name, recorded(globals()[name]))
    for name in ("causal", "all that is seen", "all both ways"):
        call = CASES[name].tensors(torch.float32)
        directly(CASES[name])(call)[0].sum().backward()
    assert told == [(19, 0), (19, 0), (None, 0), (None, 0), (None, None), (None, None)]


def test_without_gradients_nothing_is_kept(stand_in):
    case = CASES["causal"]
    with torch.no_grad():
        out, lse = directly(case)(case.tensors(torch.float32))
    assert not out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("name", quick(["causal", "views, rotary"], ["causal"]))
def test_a_second_derivative_is_refused(name, stand_in):
    case = CASES[name]
    call = case.tensors(torch.float32)
    call.k.requires_grad_(False), call.v.requires_grad_(False)
    out, _ = directly(case)(call)
    with pytest.raises(RuntimeError, match="no second derivative: create_graph must be False"):
        torch.autograd.grad(out.sum(), call.q, create_graph=True)
    assert torch.autograd.grad(out.sum(), call.q)[0].grad_fn is None


# On a GPU, by the package itself.

ON_A_GPU = {
    "causal": {"window": windows_of(100, exact=True)},
    "both ways, views": {"transposed": True, "window": windows_of(64, causal=False, exact=True)},
    "rotary, views": {"transposed": True, "rotary": True, "window": windows_of(100, exact=True)},
    "grouped, sinks": {"lead": (2, 6), "kv_heads": 2, "sink_heads": 6},
    "softcap": {"softcap": 1.5},
    "all that is seen": {"window": windows_of(400, exact=True), "scale": 0.2},
    "documents": {"lengths": [100, 0, 33, 1, 150], "tail": 0},
    "documents, a tail": {"lengths": [128, 10, 64, 300], "tail": 77, "rotary": True},
    "a long tail, grouped": {
        "lengths": [50, 3], "tail": 1100, "lead": (1, 6), "kv_heads": 3, "transposed": True,
    },
    "no document, sinks": {"lengths": [], "tail": 65, "lead": (1, 6), "sink_heads": 6},
    "many documents": {
        "lengths": [7, 0, 13, 1, 9] * 30, "tail": 3, "lead": (1, 6), "kv_heads": 2, "softcap": 1.5,
        "sink_heads": 6,
    },
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # flash-attn-4 compiles with deprecated names of CUTLASS
@pytest.mark.parametrize("compiled", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(
    ("d", "dtype"), [(64, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)]
)
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name, d, dtype, compiled, fresh_compiler):
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    more = {"window": SLIDES, "d": d, "d_v": d, **ON_A_GPU[name]}
    case = packed(**more) if "lengths" in more else case_of(**{"n": 333, **more})
    rotary = case.rotary("cuda")

    def run(call):
        return case.run(call, rotary=rotary)

    if compiled:
        run = torch.compile(run, fullgraph=True)
    with tuning.overriding(tuning.FLASH):
        call = case.tensors(dtype, "cuda")
        if isinstance(case, Packed):
            told = case.in_place(explain, call)
        else:
            told = explain(call.q, call.k, call.v, case.window, **case.arguments(call))
        assert told.engine == "flash"
        check(case, dtype, "cuda", tolerance=2e-2, run=run)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # flash-attn-4 compiles with deprecated names of CUTLASS
def test_no_packing_waits_or_compiles_anew(fresh_compiler):
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    window = Window(100, causal=True, exact=True)
    q, k, v = torch.randn(3, 3000, 4, 64, device="cuda", dtype=torch.bfloat16).unbind()
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step(cu_seqlens):
        out = local_attention_varlen(*leaves, window, cu_seqlens)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    compiled = torch.compile(lambda cu: local_attention_varlen(*leaves, window, cu), fullgraph=True)
    packings = []
    for count in range(2, 60):
        cuts = torch.randperm(3000)[:count].sort().values
        packings.append(F.pad(cuts, (1, 0)).to("cuda", torch.int32))
    with tuning.overriding(tuning.FLASH):
        for sums in packings[:2] + packings[-1:]:
            step(sums), compiled(sums).sum().backward()
        before = graphs()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [(step(sums)[0], compiled(sums)) for sums in packings]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert graphs() == before
    for one, other in found:
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # flash-attn-4 compiles with deprecated names of CUTLASS
@pytest.mark.parametrize("documents", [False, True], ids=["a row", "documents"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_same_gradients_again_where_torch_is_told_to(d, documents):
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    window = Window(500, causal=True, exact=True)
    q, k, v = torch.randn(3, 2, 4, 2000, d, device="cuda", dtype=torch.bfloat16).unbind()
    leaves = [x.requires_grad_() for x in (q, k[:, :2], v[:, :2])]
    if documents:
        leaves = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
    more = (torch.tensor([0, 700, 800, 2000], device="cuda"),) if documents else ()
    attend = local_attention_varlen if documents else local_attention
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            with tuning.overriding(tuning.FLASH):
                out = attend(*leaves, window, *more)
            found.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], again, strict=True))
