"""Gradients of the flex path without a GPU: what is compiled, on FlexAttention's dense operators.

They compute every score, heed no block list and take no option, but all that surrounds them is
the flex path's own: rotary, xpos's layout, the scores and masks, and dropout's backward pass.
"""

from functools import partial

import budget
import placed
import pytest
import torch
from budget import gradients
from compilers import quick
from features import FEATURES, feature
from hypothesis import Phase, given, settings
from strategies import cases
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from flexlocal import LocalAttention
from flexlocal.flex import own_graph

pytestmark = pytest.mark.usefixtures("dense_on_the_cpu", "fresh_compiler")


QUICK = (
    "rotary, exact both ways",
    "xpos, mask, bias, shared",
    "mask, a row hidden",
    "mask by head",
    "bias and shared",
    "shared both ways",
    "grouped, mask by head",
    "narrow values",
    "views",
    "scale zero",
)
"""Each argument at least once; the others meet in further pairs."""

AHEAD, AS_TRACED = "aot_eager", "eager"
"""Backends: one traces the backward pass ahead of time, the other leaves it to autograd.

The other takes half the time, and serves for cases that repeat what the first has seen.
"""


def compiled(case, by=AHEAD, **more):
    layer = LocalAttention(**{**case.arguments(), **more}, backend="flex")
    return torch.compile(layer, fullgraph=True, backend=by, dynamic=False)


def check_case(case, by=AHEAD):
    run = compiled(case, by)
    budget.check(case, torch.float32, partial(case.run, run))


@pytest.mark.parametrize("name", quick(FEATURES, kept=QUICK))
def test_arguments(name):
    check_case(feature(name), AHEAD if name in QUICK else AS_TRACED)


@pytest.mark.slow
@settings(max_examples=3, phases=[Phase.generate])
@given(cases())
def test_random_calls(case):
    torch.compiler.reset()
    check_case(case)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("poison", quick([torch.nan, torch.inf], kept=[torch.nan]))
def test_what_a_mask_hides_never_gets_out(poison, learning):
    """Without gradients too, where neither keys nor queries are cleared of it."""
    case, found = feature("mask"), []
    for hidden in (poison, 0.0):
        call = case.tensors(torch.float32)
        with torch.no_grad():
            for x in (call.q, call.k, call.v) if learning else (call.k, call.v):
                x.masked_fill_(~call.mask[:, None, :, None], hidden)
        with torch.set_grad_enabled(learning):
            out = case.run(compiled(case), call)
        found.append([out, *(gradients(out, call).values() if learning else ())])
    for poisoned, clean in zip(*found, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(poisoned, clean)


def test_a_mask_may_leave_a_shared_token_nothing_but_itself():
    case = feature("shared", n=301)
    keep = torch.rand(2, 301, generator=torch.Generator().manual_seed(0)) < 0.01
    found = []
    for run in (compiled(case), LocalAttention(**case.arguments(), backend="eager")):
        call = case.tensors(torch.float32)
        out = run(call.q, call.k, call.v, mask=keep)
        found.append([out, *gradients(out, call).values()])
    alone = keep & (found[1][0][:, 0] == call.v[:, 0]).all(-1)
    assert alone.any()
    for fused, eager in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", quick([0.0, 0.3], kept=[0.0]))
@pytest.mark.parametrize("low", [-1e5, pytest.param(-float("inf"), marks=pytest.mark.slow)])
def test_a_bias_may_leave_a_shared_token_nothing_but_itself(low, dropout):
    """Others that it pushes below -5e4 count less than the token itself."""
    case = feature("shared", n=301, bias_heads=1)
    found = []
    for run in (
        compiled(case, dropout=dropout),
        LocalAttention(**{**case.arguments(), "dropout": dropout}, backend="eager"),
    ):
        call = case.tensors(torch.float32)
        bias = torch.zeros_like(call.bias)
        bias[:, ::3] = low
        bias.requires_grad_(low > -torch.inf)
        out = run(call.q, call.k, call.v, attn_bias=bias, dropout_seed=torch.tensor(5))
        wanted = [call.q, call.k, call.v] + [bias] * bias.requires_grad
        found.append([out, *torch.autograd.grad((out * call.cotangent).sum(), wanted)])
    assert found[1][0].isfinite().all()
    left_alone = torch.arange(301) % case.W % 3 == 0
    assert not found[0][1][:, :, left_alone].any(), "a constant score has no gradient"
    for fused, eager in zip(*found, strict=True):
        # Dense operators know log-sum-exps near -5e4 to 2 ** -8; kernels take them as they are.
        torch.testing.assert_close(fused, eager, rtol=5e-3, atol=1e-2)


DROPPED = [
    "plain",
    "far looks",
    "mask, a row hidden",
    "grouped, mask by head",
    "bias over rows",
    "shared",
    "window of one",
    "narrow values",
    "xpos, mask, bias, shared",
]


def check_dropout(case):
    """Against the eager path, which drops the same weights and differentiates them one by one."""
    found = []
    for run in (
        compiled(case, dropout=0.3),
        LocalAttention(**{**case.arguments(), "dropout": 0.3}, backend="eager"),
    ):
        call = case.tensors(torch.float32)
        named = {"mask": call.mask, "attn_bias": call.bias, "window_size": case.override}
        out = run(call.q, call.k, call.v, dropout_seed=torch.tensor(5), **named)
        found.append([out, *gradients(out, call).values()])
    for fused, eager in zip(*found, strict=True):
        size = max(1.0, eager.abs().max().item())
        torch.testing.assert_close(fused, eager, rtol=0, atol=2e-5 * size)


PLACED_AHEAD = ["sinks, bias, mask", "documents, xpos both ways, everything", "a part by row, xpos"]


@pytest.mark.parametrize("name", quick(placed.CASES, kept=PLACED_AHEAD[:1]))
def test_positions_and_scores(name):
    case = placed.CASES[name]
    rotary = case.rotary()
    by = AHEAD if name in PLACED_AHEAD else AS_TRACED

    def run(call, **more):
        compiled = torch.compile(case.run, fullgraph=True, backend=by, dynamic=False)
        return compiled(call, rotary=rotary, **more)

    placed.check(case, torch.float32, tolerance=2e-5, run=run, backend="flex")


DROPPED_AND_QUICK = ["bias over rows", "shared"]


@pytest.mark.parametrize("name", quick(DROPPED, kept=DROPPED_AND_QUICK))
def test_dropout(name):
    check_dropout(feature(name, n=301))


@pytest.mark.slow
@settings(max_examples=4, phases=[Phase.generate])
@given(cases())
def test_dropout_of_random_calls(case):
    torch.compiler.reset()
    check_dropout(case)


def test_checkpointing_drops_the_same_weights_again(monkeypatch):
    """Outside of a compiled model: the backward pass is made while hooks save what it needs."""
    monkeypatch.setattr(own_graph, "inductor", aot_eager)
    monkeypatch.setattr(own_graph, "_detached", lambda x: x)
    case = feature("bias", n=301)
    layer = LocalAttention(**{**case.arguments(), "dropout": 0.3}, backend="flex")
    found = []
    for checkpointed in (True, False):
        call = case.tensors(torch.float32)
        torch.manual_seed(3)
        arguments = call.q, call.k, call.v, None, None, call.bias
        run = partial(checkpoint, layer, use_reentrant=False) if checkpointed else layer
        out = run(*arguments)
        found.append([out, *gradients(out, call).values()])
    for again, once in zip(*found, strict=True):
        assert torch.equal(again, once)
