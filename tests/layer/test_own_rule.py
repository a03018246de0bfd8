"""A rule of one's own, on both paths: output, gradients, compiled or not."""

import weakref

import pytest
import rules
import torch
from compilers import needs_compiled_kernels_on_the_cpu, quick

from flexlocal import Rotary, dispatch, explain, local_attention
from flexlocal.masks import Reach, Rule

BACK = torch.tensor([7, 0, 40])


def tensors(device="cpu", n=150, dtype=torch.float32, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, heads, n, 16), (3, kv_heads, n, 16), (3, kv_heads, n, 24), (3, heads, n, 24))
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


CASES = {
    "by entry": (
        lambda device: rules.WindowOfEachEntry(BACK.to(device), 40),
        lambda n: rules.visible_of_entries(BACK, n),
    ),
    "by head": (
        lambda device: rules.WiderByHead(11, 4),
        lambda n: rules.visible_by_head(11, 4, n),
    ),
}


def check(name, run, device="cpu", keep=None, tolerance=1e-5):
    rule, visible = CASES[name]
    q, k, v, grad = tensors(device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    seen = visible(q.shape[2]).to(device)
    found = run(q, k, v, rule(device), mask=keep)
    expected = rules.attend(q, k, v, seen, keep)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    if found.requires_grad:
        grads = torch.autograd.grad(found, (q, k, v), grad)
        true = torch.autograd.grad(expected, (q, k, v), grad.double())
        for one, other in zip(grads, true, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_eager_path(name, masked):
    keep = torch.rand(3, 150, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    check(name, local_attention, keep=keep)
    check(name, torch.compile(local_attention, backend="aot_eager", fullgraph=True), keep=keep)


@pytest.mark.usefixtures("dense_on_the_cpu", "fresh_compiler")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_flex_path(name, masked):
    """On FlexAttention's dense operators, which have gradients on the CPU."""
    keep = torch.rand(3, 150, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    compiled = torch.compile(local_attention, backend="aot_eager", fullgraph=True)
    check(name, lambda *of, **more: compiled(*of, backend="flex", **more), keep=keep)


def on_both_paths(name, **given):
    """Output and gradients of the compiled flex path, each beside the eager path's."""
    found = []
    for backend in ("flex", "eager"):
        attend = local_attention
        if backend == "flex":
            attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
        q, k, v, grad = tensors()
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = attend(q, k, v, CASES[name][0]("cpu"), backend=backend, **given)
        found.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
    return zip(*found, strict=True)


@pytest.mark.usefixtures("dense_on_the_cpu", "fresh_compiler")
@pytest.mark.parametrize("name", quick(CASES, kept=["by entry"]))
def test_dropout_on_the_flex_path_drops_what_the_eager_path_drops(name):
    for fused, eager in on_both_paths(name, dropout=0.3, dropout_seed=torch.tensor(3)):
        torch.testing.assert_close(fused, eager, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("dense_on_the_cpu", "fresh_compiler")
@pytest.mark.parametrize("name", quick(CASES, kept=["by entry"]))
def test_rotary_and_shared_qk_give_the_same_on_both_paths(name):
    for fused, eager in on_both_paths(name, shared_qk=True, rotary=Rotary(16)):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)


def test_shared_qk_over_a_rule_of_ones_own():
    """Keys of length 1, and a token sees itself only when it sees nothing else."""
    q, k, v, _ = tensors(kv_heads=4)
    visible = rules.visible_of_entries(BACK, q.shape[2])
    others = visible & ~torch.eye(q.shape[2], dtype=torch.bool)
    seen = torch.where(others.any(-1, keepdim=True), others, visible)
    found = local_attention(q, k, v, rules.WindowOfEachEntry(BACK, 40), shared_qk=True)
    unit = k.double() / k.double().norm(dim=-1, keepdim=True)
    expected = rules.attend(q, unit, v, seen)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@needs_compiled_kernels_on_the_cpu
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_of_the_cpu(name):
    with torch.no_grad():
        check(name, lambda *of, **more: local_attention(*of, backend="flex", **more))


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
@pytest.mark.usefixtures("no_limit_is_hit")
def test_kernels_are_shared_by_rules_that_differ_in_tensors():
    q, k, v, _ = tensors()
    with torch.no_grad():
        for seed in range(4):
            back = torch.randint(41, (3,), generator=torch.Generator().manual_seed(seed))
            rule = rules.WindowOfEachEntry(back, 40)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            found = local_attention(q, k, v, rule, backend="flex")
            made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
            assert seed == 0 or made == 0
            expected = rules.attend(q, k, v, rules.visible_of_entries(back, q.shape[2]))
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_kernels_of_the_gpu(name, masked):
    keep = None
    if masked:
        keep = torch.rand(3, 150, generator=torch.Generator().manual_seed(1)).cuda() < 0.7
    run = lambda *of, **more: local_attention(*of, backend="flex", **more)  # noqa: E731
    check(name, run, "cuda", keep, tolerance=1e-4)
    check(name, torch.compile(run, fullgraph=True), "cuda", keep, tolerance=1e-4)


@pytest.mark.gpu
def test_dropout_on_a_gpu_drops_what_the_eager_path_drops():
    q, k, v, grad = (x.cuda() for x in tensors())
    found = []
    for backend in ("flex", "eager"):
        a, b, c = (x.clone().requires_grad_() for x in (q, k, v))
        rule, seed = rules.WindowOfEachEntry(BACK.cuda(), 40), torch.tensor(3, device="cuda")
        out = local_attention(a, b, c, rule, dropout=0.3, dropout_seed=seed, backend=backend)
        found.append([out, *torch.autograd.grad(out, (a, b, c), grad)])
    for fused, eager in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)


class WithoutReach(Rule):
    keys = queries = None


def test_what_a_rule_must_give():
    q, k, v, _ = tensors()
    with pytest.raises(TypeError, match="abstract.*reach"):
        WithoutReach()
    with pytest.raises(TypeError, match="window must be a Window, another Rule or an int"):
        local_attention(q, k, v, "64")


class Compared(rules.WindowOfEachEntry):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_rules_that_kernels_cannot_share_are_refused():
    """Each call would compile anew, without a word."""
    q, k, v, _ = tensors()
    with pytest.raises(TypeError, match=r"window must be equal .*Compared.*eq=False"):
        local_attention(q, k, v, Compared(BACK, 40))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("attn_bias", {"attn_bias": torch.zeros(4, 40, 80)}),
        ("rotary with xpos", {"rotary": "xpos"}),
    ],
)
def test_what_is_relative_to_a_window_needs_one(name, more):
    if "rotary" in more:
        more = {"rotary": Rotary(16, True, 20)}
    q, k, v, _ = tensors()
    with pytest.raises(ValueError, match=f"^{name} must be None with WindowOfEachEntry"):
        local_attention(q, k, v, rules.WindowOfEachEntry(BACK, 40), **more)


def test_explain_knows_any_rule():
    q, k, v, _ = tensors()
    assert "q is on cpu" in str(explain(q, k, v, rules.WiderByHead(11, 4)))


def test_the_smallest_rule_runs():
    """Three members are enough."""

    class OwnKeyOnly(Rule):
        reach = Reach(1, 0, 0, "own_key_only")

        def keys(self, batch, head, query):
            return query, query

        queries = keys

    q, k, v, _ = tensors(kv_heads=4)
    torch.testing.assert_close(local_attention(q, k, v, OwnKeyOnly()), v)


def test_nothing_that_is_kept_holds_the_tensors_of_a_rule(monkeypatch):
    monkeypatch.setattr(dispatch, "_PREPARED", {})
    q, k, v, _ = tensors()
    seen = []
    for seed in range(2):
        back = torch.randint(41, (3,), generator=torch.Generator().manual_seed(seed))
        local_attention(q, k, v, rules.WindowOfEachEntry(back, 40))
        seen.append(weakref.ref(back))
        del back
    assert [given() for given in seen] == [None, None]
    assert len(dispatch._PREPARED) == 1
